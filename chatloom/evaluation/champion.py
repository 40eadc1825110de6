"""A new model against the present champion, on the same prompts and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatloom.config import EvaluateParams
from chatloom.data.prepared import PreparedRow
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.evaluation.intervals import bootstrap_mean
from chatloom.evaluation.sheets import Answers, answer, in_words_of, loss, measured_rows, spread
from chatloom.evaluation.wins import wins
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel, load_on, load_tokenizer, stop_ids
from chatloom.models.reward_model import score_responses


def against_champion(
    candidate: Mapping[str, Any],
    champion: Path,
    gold: Role,
    sft: Path,
    rows: Sequence[PreparedRow],
    params: EvaluateParams,
    device: Device,
) -> dict[str, float]:
    """Win rate over the champion by the gold reward model, and perplexity as a share of the champion's.

    The champion answers the very prompts that the candidate answered and predicts the same reference texts, each in its
    own tokens; the perplexities are taken over as many tokens, the candidate's.

    Args:
        candidate: as `reports/evaluate.json` has it: `prompts` (ids), `gold` (scores), `nats`, `tokens`.
        champion: its checkpoint.
        gold, sft: the gold reward model, and the checkpoint whose tokens it reads.
        rows: the eval split that the candidate was measured on.

    Raises:
        InputError: where the candidate was measured on other rows.
    """
    prompts = spread(rows, params.num_prompts)
    if [row.id for row in prompts] != candidate["prompts"]:
        raise InputError(
            "reports/evaluate.json was made from other rows than data/prepared/eval has now; run evaluate again"
        )
    measured = [row for own in measured_rows(rows, params.max_rows).values() for row in own]
    chat = load_on(champion, device)
    answers = answer(chat, [row.prompt_ids for row in in_words_of(chat, prompts)], params)
    theirs = loss(chat, in_words_of(chat, measured), device.device)
    scores = score_responses(gold, [row.prompt_ids for row in prompts], _as_read_by(sft, chat, answers))
    rate = bootstrap_mean(wins(candidate["gold"], scores), params.bootstrap_samples, params.seed)
    return {
        "champion/win_rate": rate.mean,
        "champion/win_rate_low": rate.low,
        "champion/win_rate_high": rate.high,
        "champion/perplexity_ratio": math.exp((candidate["nats"] - theirs.nats) / candidate["tokens"]),
    }


def _as_read_by(sft: Path, chat: ChatModel, answers: Answers) -> list[list[int]]:
    """The answers in the tokens of the checkpoint `sft`; as they are where `chat` has the same."""
    tokenizer = load_tokenizer(sft)
    if tokenizer.get_vocab() == chat.tokenizer.get_vocab():
        return answers.ids
    texts = tokenizer(answers.texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    stop, *_ = stop_ids(sft)
    ended = [bool(ids) and ids[-1] in chat.stop_ids for ids in answers.ids]
    return [[*ids, stop] if end or not ids else ids for ids, end in zip(texts, ended, strict=True)]
