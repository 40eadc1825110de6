"""Supervised fine-tuning: cross-entropy on the answers' tokens, the stop token included."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import islice

import torch

from chatloom.batches import num_steps, steps
from chatloom.config import TrainSftParams
from chatloom.data.examples import Example
from chatloom.evaluation.perplexity import losses_by_group
from chatloom.models.adapters import Role
from chatloom.optim import MasterAdamW, ParameterGroup, lr_factor, require_finite
from chatloom.packing import Packed, pack
from chatloom.progress import Log, progress
from chatloom.resume import Checkpoints


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
) -> dict[str, float]:
    """Train `policy` in place.

    Args:
        held_out: examples by language, looked at before, during and after training.
        log: called with (step, metrics) after each step.
        checkpoints: where the state is saved and found again; None starts afresh and saves none.

    Returns:
        Held-out losses before and after, by language, and the speed.

    Raises:
        InputError: where a loss or a gradient is not finite, before any weight is touched by it.
    """
    total = num_steps(len(examples), params)
    optimizer = MasterAdamW([ParameterGroup(policy.parameters(), params.optimizer.lr)], params.optimizer)
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        done, state = saved
        optimizer.load_state_dict(state["optimizer"])
        first, last, trained_tokens, seconds = state["first"], state["last"], state["tokens"], state["seconds"]
    else:
        done, trained_tokens, seconds = 0, 0, 0.0
        first = last = losses_by_group(policy, held_out, device)
        log(0, {f"eval/loss_{lang}": loss for lang, loss in first.items()})
    with progress("train_sft", total, done) as advance, checkpoints or nullcontext():
        for step, microbatches in enumerate(islice(steps(examples, params), done, None), start=done + 1):
            started = time.monotonic()
            num_tokens = sum(example.num_predicted for rows in microbatches for example in rows)
            loss = 0.0
            for rows in microbatches:
                part = sft_loss(policy, pack(rows, device), num_tokens)
                loss += require_finite(part, "train_sft", step)
                part.backward()
            factor = lr_factor(step - 1, total, params.optimizer)
            norm = optimizer.step(factor, "train_sft", step)

            tokens = sum(len(example.input_ids) for rows in microbatches for example in rows)
            trained_tokens += tokens
            seconds += (took := time.monotonic() - started)
            lr = params.optimizer.lr * factor
            log(step, {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr, "time/tokens_per_s": tokens / took})
            if step % params.eval_every == 0 or step == total:
                last = losses_by_group(policy, held_out, device)
                log(step, {f"eval/loss_{lang}": value for lang, value in last.items()})
            advance(loss=loss, tokens_per_s=tokens / took)
            if checkpoints is not None and checkpoints.due(step):
                state = {"first": first, "last": last, "tokens": trained_tokens, "seconds": seconds}
                checkpoints.save(step, {**state, "optimizer": optimizer.state_dict()})
    return {
        "steps": total,
        "tokens": trained_tokens,
        "time/tokens_per_s_mean": trained_tokens / max(seconds, 1e-9),
        **{f"eval/loss_{lang}_before": loss for lang, loss in first.items()},
        **{f"eval/loss_{lang}": loss for lang, loss in last.items()},
    }
