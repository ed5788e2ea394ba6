"""Which row a text or an id stands in, for millions of them."""

import hashlib

import numpy as np


class Lookup:
    """Digest (16 bytes) -> row, in 24 bytes an entry: a dict of them would take ten times
    as much.
    """

    def __init__(self):
        self.keys, self.rows, self.recent = np.empty(0, "S16"), np.empty(0, np.int64), {}

    def find(self, digests: list[bytes]) -> np.ndarray:
        """Return the row of each digest, -1 for one that was never added."""
        wanted = np.array(digests, dtype="S16")
        places = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        found = (
            np.where(self.keys[places] == wanted, self.rows[places], -1)
            if len(self.keys)
            else np.full(len(wanted), -1)
        )
        return np.array([self.recent.get(digest, row) for digest, row in zip(digests, found)], dtype=np.int64)

    def add(self, digests: list[bytes], rows):
        """Add entries; a digest that is there already gets the new row."""
        self.recent.update(zip(digests, map(int, rows)))
        if len(self.recent) > max(65_536, len(self.keys) // 8):
            fresh = np.array(list(self.recent), dtype="S16")
            kept = ~np.isin(self.keys, fresh)
            keys = np.concatenate([self.keys[kept], fresh])
            rows, order = (
                np.concatenate([self.rows[kept], np.array(list(self.recent.values()))]),
                np.argsort(keys),
            )
            self.keys, self.rows, self.recent = keys[order], rows[order], {}


def digest(text: str) -> bytes:
    """Return the hash (16 bytes) by which texts and ids are compared."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
