"""The rows of an index in the order of their scores for queries: exact or approximate cosine
similarity, fused with BM25; the caches of BM25 and FAISS.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from common import files
from common.errors import UserError, note, quoted
from common.reading import evenly_spaced
from common.search import kernel
from common.search.index import CACHE_PREFIX, CACHE_STAMP, Snapshot, cache_stamp
from common.search.kernel import Ranking
from common.search.words import Words

if TYPE_CHECKING:  # each is imported by the step that needs it
    import bm25s
    import faiss

FUSED = 100  # best rows of each ranking that are fused, or more if more are wanted
RRF_K = 60  # of reciprocal rank fusion: Cormack, Clarke, Buettcher (SIGIR 2009)
NO_WORDS = "no-words"  # a file that stands for BM25 data if no text has a word that BM25 counts
# with a --where that leaves a smaller share of the rows, exact search is faster
SMALL_SHARE = 0.1
# Exact scores are computed for the SCANNED rows with the best codes, or for SCANNED_FOR_EACH times as many
# rows as are wanted, if that is more: docs/benchmarks.md says how many of the nearest they find.
SCANNED, SCANNED_FOR_EACH = 200, 10
CODE_BITS, CODE_WIDTH = 4, 2  # of FAISS's fast scan: bits of a code, dimensions that share one
TRAINED = 20_000  # vectors that the codes are fitted to
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder that belongs to others
Cached = TypeVar("Cached")


@dataclass
class Ranker:
    """An index and the way in which its rows are ranked. `allowed` (rows) is False for rows that may
    not be found.
    """

    snapshot: Snapshot
    allowed: np.ndarray
    approximate: bool = False
    hybrid: bool = False
    words: Words = Words()  # what BM25 counts
    say: Callable[[str], None] = print

    def prepare(self, queries: list[str]) -> None:
        """Make the caches that this way of ranking reads, where they are missing, and say which
        queries have no word that counts.
        """
        if self.hybrid:
            self._say_wordless(queries)
        if self._uses_codes:
            _ = self._codes

    def rank_rows(self, queries: list[str], vectors: np.ndarray, depth: int) -> list[Ranking]:
        """Return at least the `depth` best rows for each query, or all if there are fewer; `vectors`
        (queries, width) are the embeddings of the queries.
        """
        depth = max(depth, FUSED) if self.hybrid else depth
        rank_by_cosine = self._rank_approximately if self._uses_codes else self._rank_exactly
        by_cosine = rank_by_cosine(vectors, depth)
        if not self.hybrid:
            return by_cosine
        by_words = self._rank_by_words(queries, depth)
        # only the order counts, not the scores
        return [fuse([dense, sparse]) for (dense, _), (sparse, _) in zip(by_cosine, by_words)]

    @property
    def _uses_codes(self) -> bool:
        """Whether FAISS's codes are searched: exact search is quicker where a filter leaves few rows."""
        if not self.approximate:
            return False
        is_live = self.snapshot.is_live()
        return bool((self.allowed & is_live).sum() >= SMALL_SHARE * is_live.sum())

    def _rank_exactly(self, vectors: np.ndarray, depth: int) -> list[Ranking]:
        blocks, vectors_of = self.snapshot.vector_blocks(kernel.BLOCK), self.snapshot.vectors_of
        return kernel.nearest_rows(blocks, vectors, depth, vectors_of=vectors_of, allowed=self.allowed)

    def _rank_approximately(self, vectors: np.ndarray, depth: int) -> list[Ranking]:
        """Rank the rows whose codes FAISS finds to be the best, by their exact scores."""
        live = np.flatnonzero(self.snapshot.is_live())
        chosen = np.flatnonzero(self.allowed[live])
        codes, code_of = self._codes
        wanted = max(SCANNED, SCANNED_FOR_EACH * depth)
        # the scan knows no filter: of `count` rows, about `wanted` pass it
        count = int(wanted * len(live) / max(len(chosen), 1))
        if count >= codes.ntotal:
            return self._rank_exactly(vectors, depth)
        _, nearest = codes.search(vectors, count)  # (queries, count)
        rankings, near = [], np.zeros(codes.ntotal, bool)
        for numbers, vector in zip(nearest, vectors):
            near[:] = False
            near[numbers[numbers >= 0]] = True
            rows = live[chosen[near[code_of[chosen]]]]
            if len(rows) < wanted // 2:  # a filter that few of the best pass
                rankings += self._rank_exactly(vector[None], depth)
            else:
                rankings.append(kernel.rank_plainly(rows, vector, depth, self.snapshot.vectors_of))
        return rankings

    @functools.cached_property
    def _codes(self) -> tuple[faiss.Index, np.ndarray]:
        load = functools.partial(_load_codes, snapshot=self.snapshot)
        return cached(self.snapshot, "faiss", build=self._build_codes, load=load, say=self.say)

    def _build_codes(self, folder: Path) -> None:
        """Write a code for each different vector by product quantisation (Jegou, Douze, Schmid
        2011; Andre, Kermarrec, Le Scouarnec 2015), and the number of the code of each live row:
        equal vectors would fill the best places.
        """
        import faiss

        width, live = self.snapshot.width, np.flatnonzero(self.snapshot.is_live())
        sample = self.snapshot.vectors_of(live[evenly_spaced(len(live), TRAINED)])
        num_parts = width // CODE_WIDTH if width % CODE_WIDTH == 0 else width
        codes = faiss.IndexPQFastScan(width, num_parts, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
        codes.pq.cp.min_points_per_centroid = 1  # no warning about few vectors
        codes.train(np.resize(sample, (max(len(sample), 1 << CODE_BITS), width)))
        is_live, code_of, known = self.snapshot.is_live(), [], {}
        for start, vectors in self.snapshot.vector_blocks(kernel.BLOCK):
            vectors, before = vectors[is_live[start : start + len(vectors)]], len(known)
            keys = [hashlib.blake2b(vector, digest_size=16).digest() for vector in vectors]
            numbers = [known.setdefault(key, len(known)) for key in keys]
            _, firsts = np.unique(numbers, return_index=True)
            new = [row for row in firsts if numbers[row] >= before]
            codes.add(np.ascontiguousarray(vectors[new]))
            code_of += numbers
        faiss.write_index(codes, str(folder / "codes.faiss"))
        np.save(folder / "codes.npy", np.array(code_of, dtype=np.int64), allow_pickle=False)

    def _rank_by_words(self, queries: list[str], depth: int) -> list[Ranking]:
        """Return (rows, BM25 scores) of the rows that share a word with each query."""
        live = np.flatnonzero(self.snapshot.is_live())
        bm25, rankings = self._bm25, []
        for query in queries:
            known = self.words.of_query(query)
            known = [word for word in known if bm25 and word in bm25.vocab_dict]
            scores = bm25.get_scores(known) if bm25 and known else np.zeros(len(live))
            sharing = np.flatnonzero((scores > 0) & self.allowed[live])
            order = sharing[np.lexsort((sharing, -scores[sharing]))[:depth]]
            rankings.append((live[order], scores[order]))
        return rankings

    @functools.cached_property
    def _bm25(self) -> bm25s.BM25 | None:
        options = {"build": self._build_bm25, "load": _load_bm25, "say": self.say}
        return cached(self.snapshot, "bm25", made_with=self.words.stamp, **options)

    def _build_bm25(self, folder: Path) -> None:
        import bm25s

        vocabulary: dict[str, int] = {}
        numbers = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in self.words.of_text(text)]
            for text in self.snapshot.texts()
        ]
        if not vocabulary:  # only stop words and punctuation, which bm25s can't count
            (folder / NO_WORDS).touch()
            return
        bm25 = bm25s.BM25()
        bm25.index((numbers, vocabulary), show_progress=False)
        bm25.save(folder, show_progress=False)

    def _say_wordless(self, queries: list[str]) -> None:
        """Say which queries have no word that counts, so that BM25 finds nothing for them."""
        bm25 = self._bm25
        without, unknown = [], []
        for query in queries:
            words = self.words.of_query(query)
            if not words:
                without.append(query)
            elif not bm25 or not any(word in bm25.vocab_dict for word in words):
                unknown.append(query)
        several, language = len(queries) > 1, f"(--language {self.words.language})"
        reasons = {"no word that counts": without, "no word that a text has": unknown}
        for problem, found in reasons.items():
            if found and several:
                which = f"{len(found):,} of {len(queries):,} queries have {problem} {language}"
                self.say(f"words    {which}, such as {quoted(found[0])}: found by meaning alone")
            elif found:
                which = f"{quoted(found[0])} has {problem} {language}"
                self.say(f"words    {which}: found by meaning alone")


def fuse(rankings: list[np.ndarray]) -> Ranking:
    """Return several rankings of rows as one by reciprocal rank fusion: each gives a row
    1 / (60 + its position). Equal sums are ordered by row.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for position, row in enumerate(ranking.tolist(), start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF_K + position)
    order = sorted(scores, key=lambda row: (-scores[row], row))
    return np.array(order, dtype=np.int64), np.array([scores[row] for row in order])


def _load_codes(folder: Path, snapshot: Snapshot) -> tuple[faiss.Index, np.ndarray]:
    """Return the codes and the number of the code of each live row. Raises ValueError for those of
    another index.
    """
    import faiss

    codes = faiss.read_index(str(folder / "codes.faiss"))
    code_of = np.load(folder / "codes.npy", allow_pickle=False)
    if not isinstance(codes, faiss.IndexPQFastScan) or codes.d != snapshot.width:
        raise ValueError("it is another index")
    num_rows = int(snapshot.is_live().sum())
    if code_of.shape != (num_rows,) or code_of.dtype != np.int64:
        raise ValueError("it is of other rows")
    if num_rows and not 0 <= code_of.min() <= code_of.max() < codes.ntotal:
        raise ValueError("a row has no code")
    return codes, code_of


def _load_bm25(folder: Path) -> bm25s.BM25 | None:
    import bm25s

    return None if (folder / NO_WORDS).exists() else bm25s.BM25.load(folder)


def cached(
    snapshot: Snapshot,
    name: str,
    *,
    build: Callable[[Path], None],
    load: Callable[[Path], Cached],
    say: Callable[[str], None] = lambda line: None,
    made_with: str = "",
) -> Cached:
    """Return `load(folder)` of the cache `cache-<name>` in the index's folder; `build(folder)`
    fills it where it is missing, stale or damaged.

    A cache carries the stamp of the state that it was made of, and of what it was `made_with`, and is never
    used for another state. Where the index can't be written, as one that others share, it lasts for this
    command alone, and a note says so. Raises UserError for other faults of the disk.
    """
    folder = snapshot.folder / f"{CACHE_PREFIX}{name}"
    stamp = f"{snapshot.sha256} {made_with}".rstrip()
    if cache_stamp(folder) == stamp and files.find_damage(folder) is None:
        # whatever a library raises about files that are not its own, or that another process replaces
        # meanwhile: the cache is built again
        with contextlib.suppress(Exception):
            return load(folder)
    try:
        try:
            workplace = _temporary_folder(folder, beside_it=True)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            note(f"{folder}: built for this command alone, and not kept: {error.strerror}")
            with _temporary_folder(folder, beside_it=False) as parent:
                build(Path(parent))
                return load(Path(parent))
        say(f"cache    {folder}: built for this state of the index")
        with workplace as parent:
            return _built(folder, stamp, Path(parent), build=build, load=load)
    except OSError as error:
        problem = f"the cache can't be written: {error.strerror or error}"
        advice = "correct that, or copy the index to a folder of your own"
        raise UserError(f"{folder}: {problem}; {advice}") from error


def _temporary_folder(folder: Path, *, beside_it: bool) -> tempfile.TemporaryDirectory[str]:
    """Return a new folder in which that of a cache is made."""
    place = folder.parent if beside_it else None
    return tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=place, ignore_cleanup_errors=True)


def _built(
    folder: Path, stamp: str, parent: Path, *, build: Callable[[Path], None], load: Callable[[Path], Cached]
) -> Cached:
    """Return what is loaded from a cache that is built anew in `parent` and takes its place."""
    # a temporary folder is private; this one has the permissions of the index
    fresh = parent / "cache"
    fresh.mkdir()
    build(fresh)
    (fresh / CACHE_STAMP).write_text(stamp, encoding="utf-8")
    files.write_manifest(fresh)
    loaded = load(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process was faster
        fresh.rename(folder)
    return loaded
