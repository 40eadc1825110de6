"""What stops a PPO run, or warns, while it goes wrong.

The rules are pure functions of the metrics of all steps so far, oldest first. They keep no state of their own, so a
resumed run, whose checkpoint holds those metrics, decides as an uninterrupted one would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from chatloom.config import Action, Guards, TrainPpoParams
from chatloom.data.prepared import PreparedRow
from chatloom.data.similarity import chrf
from chatloom.errors import InputError
from chatloom.models.adapters import Role, use_adapter
from chatloom.models.reward_model import score_responses
from chatloom.models.sampling import Sampling
from chatloom.parallel.ranks import ALONE, Ranks
from chatloom.ppo import kl
from chatloom.ppo.roles import Roles

log = logging.getLogger(__name__)

History = Sequence[Mapping[str, float]]
"""Metrics of each step so far, as the loop logs them."""


class GuardStop(InputError):
    """A guard whose action is `stop` found something; the loop saves its state before it raises this."""


def check(history: History, limits: Guards) -> GuardStop | None:
    """What the loop must raise, once its state is saved, if the last step was one too many; warnings are logged.

    A guard that finds the same at step after step warns at the first of them.
    """
    earlier = {guard for guard, _, _ in _findings(history[:-1], limits)}
    for guard, action, message in _findings(history, limits):
        if action == "stop":
            return GuardStop(
                f"train_ppo.guards.{guard}: {message}; stopped after step {len(history)} with its state saved: "
                f"change these params to start afresh, or set train_ppo.guards.{guard} to 'warn' to go on"
            )
        if guard not in earlier:
            log.warning("train_ppo.guards.%s: at step %d %s", guard, len(history), message)
    return None


def _findings(history: History, limits: Guards) -> Iterator[tuple[str, Action, str]]:
    """(guard, action, message) of each guard that is on and finds something."""
    if not history:
        return
    rules: tuple[tuple[str, Action, str | None], ...] = (
        ("kl", limits.kl, kl_beyond(history, limits.max_kl)),
        ("length_collapse", limits.length_collapse, collapsed(history, limits.min_length_share, limits.window)),
        ("reward_hacking", limits.reward_hacking, hacked(history, limits.max_held_out_fall, limits.window)),
        ("engine_gap", limits.engine_gap, sampled_elsewhere(history, limits.max_engine_gap)),
    )
    yield from ((guard, action, found) for guard, action, found in rules if action != "off" and found is not None)


def kl_beyond(history: History, max_kl: float) -> str | None:
    """The policy is further from its reference than any reward is worth, or the KL is no number."""
    kl = history[-1]["objective/kl"]
    if kl <= max_kl:
        return None
    return (
        f"the KL to the reference is {kl:.3g} nats a response, over max_kl = {max_kl:g}; raise train_ppo.kl.init_coef "
        "or lower train_ppo.optimizer.lr"
    )


def collapsed(history: History, min_share: float, window: int) -> str | None:
    """Responses shrank to less than `min_share` of what they were in the first `window` steps."""
    means = _ends(history, "objective/response_tokens", window)
    if means is None or means[1] >= min_share * means[0]:
        return None
    return (
        f"responses went from {means[0]:.3g} to {means[1]:.3g} tokens, under min_length_share = {min_share:g} of the "
        "first steps'; raise train_ppo.kl.init_coef or lower train_ppo.missing_stop_penalty"
    )


def hacked(history: History, max_fall: float, window: int) -> str | None:
    """The score of the training prompts rose while held-out answers got worse, by more than chance (Gao 2023)."""
    means = _ends(history, "objective/score", window)
    measured = [metrics for metrics in history if "held_out/score_t" in metrics]
    if means is None or means[1] <= means[0] or not measured:
        return None
    for measure, meaning in (("score", "the reward model's score"), ("chrf", "the likeness to reference answers")):
        fall = -measured[-1][f"held_out/{measure}_t"]
        if fall > max_fall:
            return (
                f"the score rose from {means[0]:.3g} to {means[1]:.3g} while on held-out prompts {meaning} fell by "
                f"{fall:.3g} standard errors, over max_held_out_fall = {max_fall:g}; raise train_ppo.kl.init_coef, "
                "lower train_ppo.num_steps, or train the reward model on more comparisons"
            )
    return None


def sampled_elsewhere(history: History, max_gap: float) -> str | None:
    """The engine that sampled gives its tokens other probabilities than the policy: its weights are not the policy's.

    The ratio of the update would hide it, since both of its sides are the policy's own.
    """
    gap = history[-1].get("rollout/engine_gap")
    if gap is None or gap <= max_gap:
        return None
    return (
        f"logprobs of the rollout engine are {gap:.3g} nats a token from the policy's, over max_engine_gap = "
        f"{max_gap:g}: responses are not the policy's own; set train_ppo.generation to {{kind: native}}"
    )


def _ends(history: History, name: str, window: int) -> tuple[float, float] | None:
    """Means over the first and the last `window` steps, one step being mostly noise; None while the two overlap."""
    if len(history) < 2 * window:
        return None
    return fmean(row[name] for row in history[:window]), fmean(row[name] for row in history[-window:])


# --- held-out answers ---


@dataclass(frozen=True)
class Answers:
    """Greedy answers to the held-out prompts, measured one by one."""

    ids: list[list[int]]
    scores: list[float]
    """By the reward model."""
    chrf: list[float]
    """Likeness to the prompt's best answer, in which no reward model takes part."""
    kl: list[float]
    """From the reference, exact, along the answer (`chatloom.ppo.kl.along`)."""


def answer(
    roles: Roles, policy: Role, rows: Sequence[PreparedRow], params: TrainPpoParams, ranks: Ranks = ALONE
) -> Answers:
    """What `policy` answers to `rows`, each of which has a best response. No random state is touched.

    With `roles.ref_policy` it is the baseline, the same before and after a resume.
    """
    chat = roles.chat
    prompts = [row.prompt_ids for row in rows]
    use_adapter(policy.model, policy.adapter)
    responses = roles.engine(
        policy.model,
        prompts,
        Sampling(params.max_new_tokens, temperature=0),
        stop_ids=chat.stop_ids,
        generator=torch.Generator(),  # not the one the run draws from
        ranks=ranks,
    ).responses
    texts = chat.tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Answers(
        responses,
        score_responses(roles.reward_model, prompts, responses),
        [chrf(text.strip(), row.responses[0]) for text, row in zip(texts, rows, strict=True)],
        kl.along(policy, roles.ref_policy, prompts, responses, params.temperature),
    )


def held_out_metrics(now: Answers, baseline: Answers) -> dict[str, float]:
    """Means, and how many standard errors scores and likeness moved from the baseline."""
    return {
        "held_out/score": fmean(now.scores),
        "held_out/score_t": paired_t(now.scores, baseline.scores),
        "held_out/chrf": fmean(now.chrf),
        "held_out/chrf_t": paired_t(now.chrf, baseline.chrf),
        "held_out/kl": fmean(now.kl),
    }


def paired_t(now: Sequence[float], before: Sequence[float]) -> float:
    """Student's t of the differences: their mean over its standard error.

    The prompts are the same ones, so how hard each is cancels and few of them suffice.
    """
    differences = [a - b for a, b in zip(now, before, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) / max(error, 1e-6)  # finite where every prompt moved alike, and 0 where none did
