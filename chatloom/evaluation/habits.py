"""Habits of a model that a score may miss: saying things again, and refusing."""

from __future__ import annotations

import re
from collections.abc import Sequence

NGRAM = 4
REFUSAL_LENGTH = 160
"""Characters at the start of an answer in which a refusal shows."""
REFUSAL = re.compile(
    r"\b(i['’]?m|i am) (sorry|unable|not able)\b|\b(i|we) (cannot|can['’]?t|won['’]?t|am unable to) "
    r"(help|assist|answer|provide|do|comply|fulfill?|discuss|give|share)\b|\bas an? (ai|artificial|language model)\b"
    r"|抱歉|对不起|很遗憾|我(无法|不能|没办法|不可以)(回答|提供|帮|协助|完成|满足|讨论|给出)|作为(一个|一名)?(AI|人工智能|语言模型)",
    re.IGNORECASE,
)


def repetition(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that stood earlier in the same answer; 0 for one too short to have two."""
    runs = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_refusal(text: str) -> bool:
    """Whether an answer, English or Chinese, begins by refusing or by saying that an AI cannot."""
    return REFUSAL.search(text[:REFUSAL_LENGTH]) is not None
