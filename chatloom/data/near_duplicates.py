"""Near-duplicates of texts by MinHash and locality-sensitive hashing (Broder 1997; Rajaraman and Ullman 2011)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from chatloom.data.cleaning import normalised

NUM_PERM = 128
"""Hashes of a signature: the estimate of a similarity of 0.8 has a standard error of 0.035."""
BANDS = 16
"""Two texts are compared where all 8 hashes of a band agree: 95 of 100 pairs as similar as 0.8, 6 as 0.5."""
PIECE = 5
"""Characters of the pieces that texts share."""
NEIGHBOURS = 32
"""Texts that agree on a band are each compared with so many of the others, at most."""
SEED = 1

Signatures = NDArray[np.uint32]
"""(N, NUM_PERM)"""


def signatures(texts: Sequence[str]) -> Signatures:
    """(N, NUM_PERM) MinHash signature of each text, normalised: equal hashes as often as two texts share pieces."""
    from rensa import RMinHash

    if not texts:
        return np.empty((0, NUM_PERM), np.uint32)
    hashes, offsets = _pieces([normalised(text) for text in texts])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_PERM, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_PERM)


def _pieces(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A hash of every PIECE characters in a row, and where the pieces of each text begin and end in them.

    A text has as many pieces as characters: those at its end are filled up, so that a short text has some too.
    """
    filled = "".join(text + "\0" * (PIECE - 1) for text in texts)
    characters = np.frombuffer(filled.encode("utf-32-le"), np.uint32).astype(np.uint64)
    hashes: NDArray[np.uint64] = np.zeros(max(len(characters) - PIECE + 1, 0), np.uint64)
    for place in range(PIECE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + characters[place : place + len(hashes)]
    # A good mixer at the end (splitmix64), since MinHash takes the hash as it is.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    lengths = np.array([len(text) for text in texts])
    # Pieces that begin in the filling between two texts belong to none.
    owned = np.repeat(
        np.tile([True, False], len(texts)), np.column_stack([lengths, np.full_like(lengths, PIECE - 1)]).ravel()
    )
    return hashes[owned[: len(hashes)]], np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def estimated_similarity(one: Signatures, other: Signatures) -> NDArray[np.float64]:
    """(N) Jaccard similarity of each pair of texts, estimated from (N, NUM_PERM) signatures of either."""
    return np.asarray((one == other).mean(axis=-1))


def similar_pairs(found: Signatures, threshold: float) -> NDArray[np.int64]:
    """(pairs, 2) numbers of texts whose estimated similarity is `threshold` or more, the smaller number first."""
    candidates = [pairs for band in np.split(found, BANDS, axis=1) for pairs in _agreeing(band)]
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *candidates]), axis=0)
    similar = [
        estimated_similarity(found[part[:, 0]], found[part[:, 1]]) >= threshold
        for part in np.array_split(pairs, 1 + len(pairs) // 100_000)
    ]
    found_pairs: NDArray[np.int64] = pairs[np.concatenate(similar)]
    return found_pairs


def _agreeing(band: Signatures) -> Iterator[NDArray[np.int64]]:
    """Pairs of rows that are equal, near each other in the order of rows with the same content."""
    weights = np.random.default_rng(SEED).integers(1 << 63, size=band.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = (band.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for distance in range(1, NEIGHBOURS + 1):
        equal = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(equal):
            return
        yield np.column_stack([order[equal], order[equal + distance]])
