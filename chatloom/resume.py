"""Exact resume: the state of a training loop on disk, and stopping a loop between two steps.

A loop that was killed at any step and goes on from its last state ends as if it had never stopped, bit for bit.

    if saved := checkpoints.load():
        done, state = saved
    ...
    with checkpoints:
        for step in range(done + 1, ...):
            ...
            if checkpoints.due(step):
                checkpoints.save(step, {...})
"""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from chatloom.parallel.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

KEPT = 2
"""States kept: where the newest turns out to be torn, the one before is used."""


class Stateful(Protocol):
    """Something beside the loop whose state is saved and restored with the loop's (curves logged so far)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The states of one loop in a folder of its own.

    A state is one file, written under another name and renamed, with its SHA-256 in its name. It holds tensors,
    numbers, text, lists and mappings only, so that reading it runs no code. With several ranks, each but the first
    writes its part of the optimizer's state to a file of its own, in the same folder; the first one's file, which names
    and so completes them, comes last. Any number of ranks can go on from it.

    Inside `with checkpoints`, the first SIGTERM or SIGINT waits until the loop has finished its step and saved its
    state; then, as for a second one at any time, what happens is what happens outside.

    Args:
        folder: of this loop alone; its name is that of the loop in log lines.
        key: what the loop's result depends on, by name, as hashes. A state with another key is never used.
        every: steps between two states.
        beside: what is saved and restored together with the loop.
        ranks: who run the loop together; all of them load, and save, at the same steps.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, str],
        every: int,
        beside: Stateful | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.key, self.every, self.beside, self.ranks = folder, dict(key), every, beside, ranks
        self._asked: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def load(self, **also: str) -> tuple[int, dict[str, Any]] | None:
        """The step and the state that `save` was given last, every RNG set as then; None: the loop starts afresh.

        What it was given as `optimizer` comes back as a list: the part of each rank.

        Args:
            also: more of the key, known only now.
        """
        self.key |= also
        # The first rank looks, so that all go on from the same state.
        found = self.ranks.gather(str(self._newest() or "") if self.ranks.rank == 0 else "")[0]
        if not found:
            return None
        state = _read(Path(found))
        parts = [_read(self.folder / name) for name in state["parts"]]
        own = parts[self.ranks.rank - 1] if 0 < self.ranks.rank <= len(parts) else state
        set_rng_state(own["rng"])
        if self.beside is not None:
            self.beside.load_state_dict(state["beside"])
        log.info("%s: resumes after step %d", self.folder.name, state["step"])
        loop: dict[str, Any] = state["loop"]
        if "optimizer" in loop:
            loop["optimizer"] = [loop["optimizer"], *(part["optimizer"] for part in parts)]
        return state["step"], loop

    def _newest(self) -> Path | None:
        """The newest whole state, where it is of this run; others are removed."""
        for path in reversed(self._paths()):
            state = _read(path) if _is_whole(path) else None
            if state is not None and (changed := _differences(state["key"], self.key)):
                log.warning(
                    "%s: starts afresh, the state of step %d is of another run; changed since: %s",
                    self.folder.name,
                    state["step"],
                    ", ".join(changed),
                )
                break
            if state is not None and all(_is_whole(self.folder / part) for part in state["parts"]):
                return path
            log.warning("%s: %s is torn or corrupt and is not used", self.folder.name, path)
            path.unlink()
        self.remove()
        return None

    def due(self, step: int) -> bool:
        """Whether the state has to be saved after `step`: it is time for it, or somebody wants to stop here."""
        return self.ranks.any(self._asked is not None) or step % self.every == 0

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step`, and stop where a signal asked for it.

        Tensors are written as they are, without a copy. The file is left to the operating system to flush: should the
        machine itself go down, a state that did not reach the disk is found out by its hash.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, part = self.ranks.rank, ""
        if rank > 0:
            part = self._write({"optimizer": state["optimizer"], "rng": rng_state()}, f"part-{step:08d}-{rank:04d}")
        parts = self.ranks.gather(part)[1:]
        if rank == 0:
            content = {"step": step, "key": self.key, "rng": rng_state(), "loop": dict(state), "parts": parts}
            if self.beside is not None:
                content["beside"] = self.beside.state_dict()
            self._write(content, f"step-{step:08d}")
            for path in self._paths()[:-KEPT]:
                path.unlink()
            kept = {_step(path) for path in self._paths()}
            for path in self.folder.glob("part-*.pt"):
                if _step(path) not in kept:
                    path.unlink()
            log.info("%s: state of step %d saved", self.folder.name, step)
        # Also so that no rank goes on before the state is whole; and one that was asked to stop asks the others.
        asked = max(self.ranks.gather(int(self._asked or 0)))
        if asked:
            self._asked = signal.Signals(asked)
            log.warning("%s: stopped; run again, it goes on after step %d", self.folder.name, step)
            self._act()

    def remove(self) -> None:
        """Forget every state."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                # Ignored by who started us (a background job), or handled by somebody who is not Python: left alone.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._give_back()
        if self._asked is not None and kind is None:  # it came when the last step was over
            self._act()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)
        self._give_back()
        log.warning("%s: stops after this step, with its state saved; once more stops now", self.folder.name)

    def _act(self) -> None:
        """Deliver the signal that waited, to whoever handled it before us."""
        assert self._asked is not None
        self._give_back()
        number, self._asked = self._asked, None
        signal.raise_signal(number)

    def _give_back(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _write(self, content: dict[str, Any], name: str) -> str:
        """Write a file under its name and hash, whole or not at all; that name."""
        temporary = self.folder / f"unfinished{self.ranks.rank or ''}.pt"
        torch.save(content, temporary)
        path = self.folder / f"{name}.{file_hash(temporary)}.pt"
        temporary.replace(path)
        return path.name

    def _paths(self) -> list[Path]:
        """Finished states, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))


def _step(path: Path) -> str:
    """The step in a file's name."""
    return path.name.split(".")[0].split("-")[1]


def _read(path: Path) -> dict[str, Any]:
    # Mapped, not read: what is copied out of it is never in memory twice.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _is_whole(path: Path) -> bool:
    return path.is_file() and file_hash(path) == path.suffixes[0][1:]


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's own weights as they are in memory, adapters left out."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """The state of every global random number generator."""
    numpy = np.random.get_state(legacy=False)
    key, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": position}},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
