"""Which split a row goes to: by the hash of what it asks, so that rows added later move none."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatloom.config import Split
from chatloom.data.prepared import Message

TRAINING: tuple[Split, ...] = ("sft", "reward", "ppo", "ptx")
SPLITS: tuple[Split, ...] = (*TRAINING, "eval")
MIN_RESPONSES: dict[Split, int] = {"sft": 1, "reward": 1, "ppo": 0, "ptx": 1, "eval": 0}


class Placeable(Protocol):
    @property
    def prompt_key(self) -> str: ...
    @property
    def group(self) -> str | None: ...


def normalised(text: str) -> str:
    """Text without what does not make it another question: case, runs of space, compatibility forms of characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


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


def leaked(training: Iterable[Placeable], held_out: Iterable[Placeable]) -> list[bool]:
    """For each training row, whether its prompt, or a row of its group, is in the held-out rows."""
    prompts: set[str] = set()
    groups: set[str] = set()
    for row in held_out:
        prompts.add(row.prompt_key)
        if row.group is not None:
            groups.add(row.group)
    return [row.prompt_key in prompts or row.group in groups for row in training]
