"""Texts -> the words that are counted, in any language: by BM25 in a hybrid search, and as the
words that mark a cluster.

A word is what Unicode calls letters, marks and digits in a row, without regard to case, width and
accents. Scripts that are written without spaces, and Hangul, whose particles stick to their noun,
are counted by their runs of two and three characters. Stop words are left out, and endings taken
off, only where the language is known.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from common.errors import UserError

if TYPE_CHECKING:
    import regex

VERSION = 2  # of these rules: words that were made by others are made anew
AUTO = "auto"  # no language is known
MAX_GRAM, MIN_GRAM = 3, 2  # characters of a run that are one word
REMEMBERED = 1 << 17  # different words whose stems are kept


class Language(NamedTuple):
    """What is known of a language."""

    name: str
    stemmer: str | None = None  # of Snowball
    stop_words: str | None = None  # in bm25s


LANGUAGES = {
    AUTO: Language("any language"),
    "ar": Language("Arabic", "arabic"),
    "ca": Language("Catalan", "catalan"),
    "cs": Language("Czech", "czech"),
    "da": Language("Danish", "danish", "STOPWORDS_DANISH"),
    "de": Language("German", "german", "STOPWORDS_GERMAN"),
    "el": Language("Greek", "greek"),
    "en": Language("English", "english", "STOPWORDS_EN"),
    "es": Language("Spanish", "spanish", "STOPWORDS_SPANISH"),
    "et": Language("Estonian", "estonian"),
    "eu": Language("Basque", "basque"),
    "fa": Language("Persian", "persian"),
    "fi": Language("Finnish", "finnish"),
    "fr": Language("French", "french", "STOPWORDS_FRENCH"),
    "ga": Language("Irish", "irish"),
    "hi": Language("Hindi", "hindi"),
    "hu": Language("Hungarian", "hungarian"),
    "hy": Language("Armenian", "armenian"),
    "id": Language("Indonesian", "indonesian"),
    "it": Language("Italian", "italian", "STOPWORDS_ITALIAN"),
    "ja": Language("Japanese"),
    "km": Language("Khmer"),
    "ko": Language("Korean", None, "STOPWORDS_KOREAN"),
    "lo": Language("Lao"),
    "lt": Language("Lithuanian", "lithuanian"),
    "my": Language("Burmese"),
    "ne": Language("Nepali", "nepali"),
    "nl": Language("Dutch", "dutch", "STOPWORDS_DUTCH"),
    "no": Language("Norwegian", "norwegian", "STOPWORDS_NORWEGIAN"),
    "pl": Language("Polish", "polish"),
    "pt": Language("Portuguese", "portuguese", "STOPWORDS_PORTUGUESE"),
    "ro": Language("Romanian", "romanian"),
    "ru": Language("Russian", "russian", "STOPWORDS_RUSSIAN"),
    "sr": Language("Serbian", "serbian"),
    "sv": Language("Swedish", "swedish", "STOPWORDS_SWEDISH"),
    "ta": Language("Tamil", "tamil"),
    "th": Language("Thai"),
    "tr": Language("Turkish", "turkish", "STOPWORDS_TURKISH"),
    "zh": Language("Chinese", None, "STOPWORDS_CHINESE"),
}
# 々 and ー belong to no script
RUNS = "".join(
    rf"\p{{{script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar")
)
LETTER, SIGN = rf"[\p{{L}}--[{RUNS}\u3005\u30fc]]", rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{RUNS}\u3005\u30fc]]"
TOKEN = rf"""(?x)
    (?P<run> [{RUNS}\u3005\u30fc] [{RUNS}\u3005\u30fc\p{{M}}]* )
  | (?P<letters> {LETTER} (?: \. {LETTER} )+ (?!{SIGN}) )    # U.S., e.g.
  | (?P<number> \p{{N}}+ (?: [.,] \p{{N}}+ )+ (?!{SIGN}) )   # 4.75
  | (?P<name> {SIGN}{{1,3}} (?: & {SIGN}{{1,3}} )+ (?!{SIGN}) | {SIGN}+ (?: \+\+ | \# ) )  # AT&T, C++, C#
  | (?P<word> {SIGN}+ )
"""
MARK = rf"[[\p{{L}}\p{{M}}]--[{RUNS}\u3005\u30fc]]"
MARKING = rf"(?P<run>[{RUNS}\u3005\u30fc]+)|(?<![\p{{N}}_])(?P<word>{MARK}{{3,}})(?![\p{{N}}_])"
# what is left of Latin and Greek letters without their accents, and of Arabic and Hebrew ones
# without the signs for their vowels; in other scripts a mark is a letter of its own
ACCENTS = r"(?<=[a-z\u03b1-\u03c9])\p{Mn}+|(?<=\u0435)\u0308+"  # the last: a Cyrillic yo is a ye
VOWEL_SIGNS = (*range(0x591, 0x5C8), 0x640, *range(0x64B, 0x660), 0x670)
LETTERS = {"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "ı": "i"}
PLAIN = str.maketrans({**LETTERS, **dict.fromkeys(map(chr, VOWEL_SIGNS))})


@dataclass(frozen=True)
class Words:
    """How the words of a language are found; `language` is a key of LANGUAGES."""

    language: str = AUTO

    @property
    def stamp(self) -> str:
        """What the words of an index are stamped with."""
        return f"words {VERSION} {self.language}"

    def of_text(self, text: str) -> list[str]:
        """Return the words of a text, in their order. Of a run it also has the single characters,
        which a query of one character asks for.
        """
        return list(self._words(text, range(1, MAX_GRAM + 1)))

    def of_query(self, text: str) -> list[str]:
        """Return the words of a query: of a run of characters those of two and three, or its only
        one.
        """
        return list(self._words(text, range(MIN_GRAM, MAX_GRAM + 1)))

    def _words(self, text: str, sizes: range) -> Iterator[str]:
        for match in _pattern(TOKEN).finditer(unicodedata.normalize("NFKC", text)):
            kind, token = match.lastgroup, match[0]
            if kind == "run":
                yield from _grams(token.casefold(), sizes)
            elif word := self._counted(kind, token):
                yield word

    def _counted(self, kind: str | None, token: str) -> str:
        """Return what is counted of a token that is no run, "" for a stop word."""
        if kind != "word":  # a name, which has no ending
            return fold(token.replace(".", "") if kind == "letters" else token)
        return self._stem(token)

    def places(self, text: str, wanted: Set[str]) -> list[tuple[int, int]]:
        """Return where a text has words that are `wanted`, such as those of a query: of each place
        the first character and the one after its last, ascending; places that touch are one.
        """
        plain, origins = _normalized(text)
        spans = []
        for match in _pattern(TOKEN).finditer(plain):
            kind, token, start = match.lastgroup, match[0], match.start()
            if kind == "run":
                spans += [(start + first, start + last) for first, last in _grams_in(token, wanted)]
            elif self._counted(kind, token) in wanted:
                spans.append(match.span())
        joined: list[tuple[int, int]] = []
        for first, last in spans:
            start, end = origins[first][0], origins[last - 1][1]
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined

    @functools.cached_property
    def _stem(self) -> Callable[[str], str]:
        """The function from a word as it is written to the one that is counted, "" for none."""
        known = LANGUAGES[self.language]
        stop = stop_words(self.language) if known.stop_words else frozenset()
        stem = None
        if known.stemmer is not None:
            import snowballstemmer

            stem = snowballstemmer.stemmer(known.stemmer).stemWord

        def counted(token: str) -> str:
            if self.language == "tr":  # whose i has no other capital than this
                token = token.replace("İ", "i").replace("I", "ı")
            lower = unicodedata.normalize("NFC", token.casefold())
            # IT and US are names where they are written like this
            if lower in stop and not (token.isupper() and len(token) > 1):
                return ""
            return fold(stem(lower) if stem else lower)

        return functools.lru_cache(REMEMBERED)(counted)


def fold(word: str) -> str:
    """Return a word without case and accents."""
    letters = unicodedata.normalize("NFD", word.casefold()).translate(PLAIN)  # accents stand apart
    return unicodedata.normalize("NFC", _pattern(ACCENTS).sub("", letters))


def _grams(run: str, sizes: range) -> Iterator[str]:
    """Yield the pieces of a run that have these numbers of characters, as a reader counts them; of
    a single character itself.
    """
    characters = _pattern(r"\X").findall(run)
    if len(characters) == 1:
        yield run
        return
    for size in sizes:
        for start in range(len(characters) - size + 1):
            yield "".join(characters[start : start + size])


def _grams_in(run: str, wanted: Set[str]) -> list[tuple[int, int]]:
    """Return where a run has pieces that are `wanted`, ascending by their first character."""
    spans = [match.span() for match in _pattern(r"\X").finditer(run)]
    found = []
    for number, (first, _) in enumerate(spans):
        for _, last in spans[number : number + MAX_GRAM]:
            if run[first:last].casefold() in wanted:
                found.append((first, last))
    return found


def _normalized(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text in NFKC, and for each character of it where that comes
    from: the first character in `text` and the one after the last. What a
    reader takes for one character stays together.
    """
    if unicodedata.is_normalized("NFKC", text):
        return text, [(place, place + 1) for place in range(len(text))]
    parts, origins = [], []
    for match in _pattern(r"\X").finditer(text):
        parts.append(unicodedata.normalize("NFKC", match[0]))
        origins += [match.span()] * len(parts[-1])
    return "".join(parts), origins


@functools.cache
def _pattern(text: str) -> regex.Pattern[str]:
    import regex  # not Python's, whose \w lacks the vowels of Hindi and which knows no scripts

    return regex.compile(text, regex.V1)


def marking_words(text: str, stop: frozenset[str]) -> list[str]:
    """Return the words of a text that may mark a cluster, in lower case as they are written: of
    three letters or more, or two characters of a script without spaces.
    """
    found = []
    for match in _pattern(MARKING).finditer(unicodedata.normalize("NFKC", text).lower()):
        word = match[0]
        if match.lastgroup == "run":
            found += _grams(word, range(MIN_GRAM, MIN_GRAM + 1))
        elif word not in stop:
            found.append(word)
    return found


def stop_words(name: str) -> frozenset[str]:
    """Return the stop words of a language, or those of a file with one word on each line, in lower
    case. Raises UserError for a name that is neither.
    """
    known = LANGUAGES.get(name)
    if known is None:
        from common import reading

        return frozenset(line.strip().casefold() for line in reading.read_lines(name)) - {""}
    if known.stop_words is None:
        languages = ", ".join(code for code, language in LANGUAGES.items() if language.stop_words)
        problem = f"no stop words of {known.name} are known, but of {languages}"
        raise UserError(f"{name}: {problem}; name a file")
    from bm25s import stopwords

    return frozenset(word.casefold() for word in getattr(stopwords, known.stop_words))
