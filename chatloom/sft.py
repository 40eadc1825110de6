"""Supervised fine-tuning: cross-entropy on the answers' tokens, the stop token included."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice

import torch

from chatloom.batches import num_steps, steps
from chatloom.config import TrainSftParams
from chatloom.data.examples import Example
from chatloom.evaluation.perplexity import losses_by_group
from chatloom.models.adapters import Role
from chatloom.optim import ParameterGroup, lr_factor, require_finite
from chatloom.packing import Packed, pack
from chatloom.parallel.ranks import ALONE, Ranks
from chatloom.parallel.strategies import open_updates
from chatloom.progress import Log, progress
from chatloom.resume import Checkpoints, weights_hash


def sft_loss(policy: Role, packed: Packed, num_tokens: int) -> torch.Tensor:
    """Sum of the microbatch's token losses over the predicted tokens of the whole optimizer step.

    Not the mean of means: so 8 microbatches of 1 row are the same step as 1 microbatch of 8.
    """
    return -policy.logprobs(packed).sum() / num_tokens


def train_sft(
    policy: Role,
    examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
    params: TrainSftParams,
    device: torch.device,
    log: Log,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train `policy` in place.

    Args:
        policy, examples, held_out, params: the same on every rank.
        held_out: examples by language, looked at before, during and after training.
        log: called with (step, metrics) after each step.
        checkpoints: where the state is saved and found again; None starts afresh and saves none.
        ranks: who train it together; each step's rows are shared out.

    Returns:
        Held-out losses before and after, by language, and the speed.

    Raises:
        InputError: where a loss or a gradient is not finite, before any weight is touched by it.
    """
    total = num_steps(len(examples), params, ranks)
    ranks.require_same(
        params=lambda: [params],
        rows=lambda: chain(examples, held_out.items()),
        weights=lambda: [weights_hash(policy.model)],
    )
    groups = [ParameterGroup(policy.parameters(), params.optimizer.lr)]
    optimizer = open_updates(groups, params.optimizer, params.parallel, ranks, policy.model)
    looking = ranks if optimizer.whole_weights else ALONE  # who share the held-out rows
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        done, state = saved
        optimizer.load_state_dict(*state["optimizer"])
        first, last, trained_tokens, seconds = state["first"], state["last"], state["tokens"], state["seconds"]
    else:
        done, trained_tokens, seconds = 0, 0, 0.0
        first = last = losses_by_group(policy, held_out, device, looking)
        log(0, {f"eval/loss_{lang}": loss for lang, loss in first.items()})
    batches = islice(steps(examples, params, ranks, lambda example: len(example.input_ids)), done, None)
    with progress("train_sft", total, done) as advance, checkpoints or nullcontext():
        for step, microbatches in enumerate(batches, start=done + 1):
            started = time.monotonic()
            own = [example for rows in microbatches for example in rows]
            num_tokens = int(ranks.sum(sum(example.num_predicted for example in own)))
            loss = 0.0
            for rows in microbatches:
                # Without rows left, a rank still takes part: the others may wait for its gradients.
                part = sft_loss(policy, pack(rows or examples[:1], device), num_tokens)
                part = part if rows else 0 * part
                loss += require_finite(part, "train_sft", step)
                optimizer.backward(part)
            loss = ranks.sum(loss)
            factor = lr_factor(step - 1, total, params.optimizer)
            norm = optimizer.step(factor, "train_sft", step)

            tokens = int(ranks.sum(sum(len(example.input_ids) for example in own)))
            trained_tokens += tokens
            seconds += (took := time.monotonic() - started)
            lr = params.optimizer.lr * factor
            log(step, {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr, "time/tokens_per_s": tokens / took})
            if step % params.eval_every == 0 or step == total:
                last = losses_by_group(policy, held_out, device, looking)
                log(step, {f"eval/loss_{lang}": value for lang, value in last.items()})
            advance(loss=loss, tokens_per_s=tokens / took)
            if checkpoints is not None and checkpoints.due(step):
                state = {"first": first, "last": last, "tokens": trained_tokens, "seconds": seconds}
                checkpoints.save(step, {**state, "optimizer": optimizer.state_dict()})
    optimizer.finish()
    return {
        "steps": total,
        "tokens": trained_tokens,
        "time/tokens_per_s_mean": trained_tokens / max(seconds, 1e-9),
        **{f"eval/loss_{lang}_before": loss for lang, loss in first.items()},
        **{f"eval/loss_{lang}": loss for lang, loss in last.items()},
    }
