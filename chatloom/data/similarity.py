"""How alike two texts are."""

from __future__ import annotations


def chrf(text: str, reference: str) -> float:
    """0 to 100: the F2 score of `text`'s character n-grams against those of `reference` (chrF, Popovic 2015).

    Characters serve Chinese and English alike, and no reward model takes part in it.
    """
    from sacrebleu.metrics import CHRF  # only where texts are compared: it takes its time

    return float(CHRF().sentence_score(text, [reference]).score)
