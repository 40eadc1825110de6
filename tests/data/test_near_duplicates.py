"""MinHash estimates against exact Jaccard similarities; pairs against all pairs."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from chatloom.data.near_duplicates import NUM_PERM, estimated_similarity, signatures, similar_pairs

WORDS = ["the", "of", "river", "stone", "bridge", "old", "and", "over", "small", "light", "town", "moved", "wind"]


def pieces(text: str) -> set[str]:
    filled = text + "\0" * 4
    return {filled[place : place + 5] for place in range(len(text))}


def jaccard(one: str, other: str) -> float:
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


def texts() -> list[str]:
    """Twelve sentences, each followed by copies with ever more words replaced."""
    draw = random.Random(1)
    found = []
    for _ in range(12):
        words = [draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(40)]
        for replaced in range(6):
            found.append(" ".join(words[replaced:] + [f"new{draw.randrange(100)}"] * replaced))
    return found


def test_estimates_are_near_the_similarities() -> None:
    found = texts()
    signed = signatures(found)
    pairs = [(n, n + step) for n in range(0, len(found), 6) for step in range(1, 6)]
    errors = [float(estimated_similarity(signed[a], signed[b])) - jaccard(found[a], found[b]) for a, b in pairs]
    # The standard error of 128 hashes is 0.044 at most.
    assert np.sqrt(np.mean(np.square(errors))) < 0.05
    assert abs(np.mean(errors)) < 0.015


def test_similar_pairs_are_nearly_all_found_and_no_others() -> None:
    found = texts()
    signed = signatures(found)
    pairs = {(a, b) for a, b in similar_pairs(signed, 0.8).tolist()}
    exact = {(a, b): jaccard(found[a], found[b]) for a, b in combinations(range(len(found)), 2)}
    sure = {pair for pair, similarity in exact.items() if similarity > 0.9}
    assert len(sure) >= 10
    assert sure <= pairs <= {pair for pair, similarity in exact.items() if similarity > 0.65}


def test_signature_ignores_case_and_space_and_place_among_others() -> None:
    one, other, apart = signatures(["An  old\nbridge", "an OLD bridge", "a new boat"])
    assert (one == other).all()
    assert (one != apart).mean() > 0.9
    assert (signatures(["an old bridge"])[0] == one).all()


@pytest.mark.parametrize("few", [[], ["a"], ["", "a"]])
def test_few_and_short_texts(few: list[str]) -> None:
    signed = signatures(few)
    assert signed.shape == (len(few), NUM_PERM)
    assert similar_pairs(signed, 0.8).tolist() == []


def test_many_equal_texts_are_each_paired_with_some() -> None:
    pairs = similar_pairs(signatures(["an old bridge over the river"] * 200), 0.8)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert set(pairs.ravel().tolist()) == set(range(200))
