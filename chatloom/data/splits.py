"""Which split a row goes to: by the hash of what it asks, so that rows added later move none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatloom.config import Split
from chatloom.data.cleaning import normalised
from chatloom.data.drops import RowFault
from chatloom.data.prepared import Message

TRAINING: tuple[Split, ...] = ("sft", "reward", "ppo", "ptx")
SPLITS: tuple[Split, ...] = (*TRAINING, "eval")
MIN_RESPONSES: dict[Split, int] = {"sft": 1, "reward": 1, "ppo": 0, "ptx": 1, "eval": 0}


class Placeable(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def prompt_key(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def splits(self) -> Sequence[Split]: ...
    @property
    def num_responses(self) -> int: ...


def prompt_key(messages: Sequence[Message]) -> str:
    """Equal for contexts that are the same once normalised."""
    turns = [[message["role"], normalised(message["content"])] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


def unit_hash(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on `key` alone; `purpose` keeps two uses of one key independent."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Placement:
    """Split weights and seed."""

    weights: Mapping[Split, float]
    seed: int

    def place(self, key: str, open_to: Collection[Split], num_responses: int) -> Split | None:
        """The split of a row with `key` (its group's, else its prompt's), None where none is open to it.

        Eval comes first and from `key` alone: whether a prompt is held out must not depend on the source it is in.
        """
        open_splits = [
            split
            for split in SPLITS
            if split in open_to and self.weights[split] and num_responses >= MIN_RESPONSES[split]
        ]
        training = [split for split in open_splits if split != "eval"]
        if "eval" in open_splits and (not training or self._held_out(key)):
            return "eval"
        if not training:
            return None
        point = unit_hash(self.seed, "split", key) * sum(self.weights[split] for split in training)
        for split in training[:-1]:
            point -= self.weights[split]
            if point < 0:
                return split
        return training[-1]

    def _held_out(self, key: str) -> bool:
        return unit_hash(self.seed, "eval", key) < self.weights["eval"] / sum(self.weights.values())


@dataclass(frozen=True)
class Placed:
    split: Split
    cluster: str
    """Id of the first row of those that are one question: near-duplicates, translations, other answers to it."""


Near = Mapping[str, Collection[str]]
"""Prompt keys whose prompts are near-duplicates of a prompt; symmetric."""


def assign(rows: Iterable[Placeable], near: Near, placement: Placement) -> Iterator[Placed | RowFault]:
    """The split of each row, in their order; a later row never changes what became of an earlier one.

    A row is placed by its own key, or by that of the first row whose question is nearly the same. Where the splits that
    are open to it then put it on the other side of the line between training and eval, it is a leak and goes nowhere.
    """
    leaders: dict[str, tuple[int, str, str]] = {}
    """Of a group or a prompt: number, id and key of the first row of its cluster."""
    sides: dict[tuple[str, str], bool] = {}
    """Of a kept prompt or group: whether it is in eval."""
    for number, row in enumerate(rows):
        prompts = [row.prompt_key, *sorted(near.get(row.prompt_key, ()))]
        own = row.prompt_key if row.group is None else row.group
        known = [leaders[key] for key in (own, *prompts) if key in leaders]
        leader = leaders[own] if own in leaders else min(known, default=(number, row.id, own))
        leaders.setdefault(own, leader)
        leaders.setdefault(row.prompt_key, leader)
        split = placement.place(leader[2], row.splits, row.num_responses)
        if split is None:
            yield RowFault("no_split", f"it is open to {', '.join(row.splits)} and has {row.num_responses} responses")
            continue
        held_out = split == "eval"
        related = [("prompt", key) for key in prompts]
        if row.group is not None:
            related.append(("group", row.group))
        if any(sides.get(key, held_out) != held_out for key in related):
            other = "training" if held_out else "eval"
            yield RowFault("leak", f"placed in {split}, its question, or its group, is in {other}")
            continue
        for key in (related[0], *related[len(prompts) :]):
            sides[key] = held_out
        yield Placed(split, leader[1])


def leaks(training: Iterable[Placeable], held_out: Iterable[Placeable], near: Near) -> list[Placeable]:
    """The training rows whose question, or one nearly the same, or whose group, is in the held-out rows."""
    prompts: set[str] = set()
    groups: set[str] = set()
    for row in held_out:
        prompts |= {row.prompt_key, *near.get(row.prompt_key, ())}
        if row.group is not None:
            groups.add(row.group)
    return [row for row in training if row.prompt_key in prompts or row.group in groups]
