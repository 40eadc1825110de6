"""Reward model training on ranked responses (Ouyang 2022, Stiennon 2020)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from chatloom.batches import chunks, num_steps, steps
from chatloom.config import TrainRewardParams
from chatloom.data.comparisons import SAMPLED, Comparison
from chatloom.data.examples import Example
from chatloom.models.adapters import Role
from chatloom.optim import ParameterGroup, lr_factor, require_finite
from chatloom.packing import pack
from chatloom.parallel.ranks import ALONE, Ranks
from chatloom.parallel.strategies import open_updates
from chatloom.progress import Log, progress
from chatloom.resume import Checkpoints, weights_hash

REFERENCE_PROMPTS = 200


def ranking_loss(
    scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor, margin: float = 0.0, centering: float = 0.0
) -> Tensor:
    """Weighted sum over pairs of -log sigmoid(s_better - s_worse - margin) + centering (s_better + s_worse)^2.

    Args:
        scores: (S) float32, every response of every prompt.
        better, worse: (M) indices into `scores`.
        weights: (M); 1 / pairs of the pair's prompt, so that a prompt counts once however many responses it has.
    """
    chosen, rejected = scores[better], scores[worse]
    loss = -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
    return (weights * loss).sum()


def score_comparisons(reward_model: Role, comparisons: Sequence[Comparison], device: torch.device) -> list[Tensor]:
    """The scores (K) of each comparison's responses, all of them in one pass."""
    examples = [Example.of_response(c.prompt_ids, ids) for c in comparisons for ids in c.response_ids]
    return list(reward_model.scores(pack(examples, device)).split([len(c.response_ids) for c in comparisons]))


def microbatch_loss(
    reward_model: Role, comparisons: Sequence[Comparison], params: TrainRewardParams, device: torch.device
) -> Tensor:
    """Sum over prompts of their pairs' mean loss; all K responses of a prompt are scored together."""
    scores = score_comparisons(reward_model, comparisons, device)
    better, worse, weights, offset = [], [], [], 0
    for comparison, own in zip(comparisons, scores, strict=True):
        pairs = comparison.pairs
        better += [offset + i for i, _ in pairs]
        worse += [offset + j for _, j in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        offset += len(own)
    return ranking_loss(
        torch.cat(scores),
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(weights, device=device),
        params.margin,
        params.centering,
    )


def pair_margins(
    reward_model: Role, comparisons: Sequence[Comparison], device: torch.device, ranks: Ranks = ALONE
) -> list[list[float]]:
    """Of each comparison, s_better - s_worse of its pairs."""
    scored = spread_scores(reward_model, comparisons, device, ranks)
    return [
        [float(scores[i] - scores[j]) for i, j in comparison.pairs]
        for comparison, scores in zip(comparisons, scored, strict=True)
    ]


@torch.no_grad()
def spread_scores(
    reward_model: Role, comparisons: Sequence[Comparison], device: torch.device, ranks: Ranks
) -> list[Tensor]:
    """As `score_comparisons`, two at a time, by all ranks together; in the host's memory."""

    def score(rows: list[Comparison]) -> list[Tensor]:
        return [scores.cpu() for two in chunks(rows, 2) for scores in score_comparisons(reward_model, two, device)]

    return ranks.spread(comparisons, [comparison.num_tokens for comparison in comparisons], score)


def accuracy(margins: Sequence[Sequence[float]]) -> float:
    """Share of all pairs that are ordered rightly; an exact tie counts half."""
    flat = [margin for row in margins for margin in row]
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in flat) / len(flat)


@torch.no_grad()
def normalize(reward_model: Role, comparisons: Sequence[Comparison], device: torch.device, ranks: Ranks = ALONE) -> int:
    """Set the head's gain and bias so that reference responses score mean 0, std 1; how many there were.

    Reference responses are those the SFT model sampled; without any, all responses stand in. `REFERENCE_PROMPTS` of
    either are enough for a mean and a standard deviation.
    """
    assert reward_model.head is not None
    sampled = [comparison for comparison in comparisons if SAMPLED in comparison.origins]
    rows = (sampled or comparisons)[:REFERENCE_PROMPTS]
    reference = []
    for comparison, scores in zip(rows, spread_scores(reward_model, rows, device, ranks), strict=True):
        keep = [not sampled or origin == SAMPLED for origin in comparison.origins]
        reference.append(scores[torch.tensor(keep)])
    reward_model.head.normalize(torch.cat(reference).to(device))
    return sum(map(len, reference))


def train_reward(
    reward_model: Role,
    train: Sequence[Comparison],
    held_out: Sequence[Comparison],
    params: TrainRewardParams,
    device: torch.device,
    log: Log,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train `reward_model` (its adapter or trunk, and its head) in place, then normalise its scores.

    Args:
        reward_model, train, held_out, params: the same on every rank.
        log: called with (step, metrics) after each step; with 0 and the accuracy before the first.
        checkpoints: where the state is saved and found again; None starts afresh and saves none.
        ranks: who train it together; each step's prompts are shared out.

    Raises:
        InputError: where a loss or a gradient is not finite, before any weight is touched by it.
    """
    total = num_steps(len(train), params, ranks)
    ranks.require_same(
        params=lambda: [params],
        rows=lambda: chain(train, held_out),
        weights=lambda: [weights_hash(reward_model.model)],
    )
    groups = [ParameterGroup(reward_model.parameters(), params.optimizer.lr)]
    optimizer = open_updates(groups, params.optimizer, params.parallel, ranks, reward_model.model)
    looking = ranks if optimizer.whole_weights else ALONE  # who share the held-out rows
    held_out = held_out[: params.eval_rows]
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        done, state = saved
        optimizer.load_state_dict(*state["optimizer"])
        last, trained_tokens = state["last"], state["tokens"]
    else:
        done, trained_tokens = 0, 0
        last = accuracy(pair_margins(reward_model, held_out, device, looking)) if held_out else float("nan")
        if held_out:
            log(0, {"eval/accuracy": last})
    batches = islice(steps(train, params, ranks, size=lambda comparison: comparison.num_tokens), done, None)
    with progress("train_reward", total, done) as advance, checkpoints or nullcontext():
        for step, microbatches in enumerate(batches, start=done + 1):
            started = time.monotonic()
            prompts = int(ranks.sum(sum(map(len, microbatches))))
            loss = 0.0
            for rows in microbatches:
                # Without rows left, a rank still takes part: the others may wait for its gradients.
                part = microbatch_loss(reward_model, rows or train[:1], params, device) / prompts
                part = part if rows else 0 * part
                loss += require_finite(part, "train_reward", step)
                optimizer.backward(part)
            loss = ranks.sum(loss)
            factor = lr_factor(step - 1, total, params.optimizer)
            norm = optimizer.step(factor, "train_reward", step)

            took = time.monotonic() - started
            tokens = int(ranks.sum(sum(comparison.num_tokens for comparison in chain(*microbatches))))
            trained_tokens += tokens
            lr = params.optimizer.lr * factor
            log(step, {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr, "time/tokens_per_s": tokens / took})
            if held_out and (step % params.eval_every == 0 or step == total):
                last = accuracy(pair_margins(reward_model, held_out, device, looking))
                log(step, {"eval/accuracy": last})
            advance(loss=loss, tokens_per_s=tokens / took, accuracy=last)
            if checkpoints is not None and checkpoints.due(step):
                state = {"last": last, "tokens": trained_tokens, "optimizer": optimizer.state_dict()}
                checkpoints.save(step, state)
    optimizer.finish()
    reference = normalize(reward_model, train, device, ranks)
    return {
        "steps": total,
        "prompts": len(train),
        "pairs": sum(len(c.pairs) for c in train),
        "tokens": trained_tokens,
        "reference_responses": reference,
        **({"eval/accuracy": last, "eval/prompts": len(held_out)} if held_out else {}),
    }
