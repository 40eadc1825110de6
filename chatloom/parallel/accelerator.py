"""What stands in for a GPU where ColossalAI runs on CPUs alone.

ColossalAI asks one object, the accelerator, about the device. Its own for CPUs raises in most methods. The one here
answers, and `use_cpu` changes the few other places that assume a GPU. This proves numerics, saving and resuming, and
says nothing about speed or memory. With CUDA none of it is used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.zero.gemini.chunk import Chunk, ChunkManager
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer


class _NoStream:
    """In place of a CUDA stream or event: on a CPU all work is done when the call returns."""

    def wait_stream(self, stream: object) -> None:
        """Nothing is under way that could be waited for."""

    def synchronize(self) -> None:
        """The same."""


class Cpu(CpuAccelerator):  # type: ignore[misc]
    """Each method with what it stands in for."""

    def synchronize(self, device: object = None) -> None:
        """cuda.synchronize: waits for kernels; there are none."""

    def empty_cache(self) -> None:
        """cuda.empty_cache: there is no cache of the allocator."""

    def set_device(self, device: object = None) -> None:
        """cuda.set_device: there is one device."""

    def current_device(self) -> int:
        """cuda.current_device: the number of the only one."""
        return 0

    def device_count(self) -> int:
        """cuda.device_count: a process has one."""
        return 1

    def Stream(self, *_: object, **__: object) -> _NoStream:
        """cuda.Stream: where communication would overlap computation."""
        return _NoStream()

    def Event(self, *_: object, **__: object) -> _NoStream:
        """cuda.Event: what another stream would wait for."""
        return _NoStream()

    def current_stream(self, device: object = None) -> _NoStream:
        """cuda.current_stream: where computation would be queued."""
        return _NoStream()

    def stream(self, stream_: object) -> AbstractContextManager[None]:
        """cuda.stream: work inside is queued elsewhere; here it is done at once."""
        return nullcontext()

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """cuda.get_rng_state: the stock one hands `device` to a function that takes none."""
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: object = None) -> None:
        """cuda.set_rng_state."""
        torch.set_rng_state(new_state)

    def manual_seed(self, seed: int) -> None:
        """cuda.manual_seed."""
        torch.manual_seed(seed)

    def memory_allocated(self, device: object = None) -> int:
        """cuda.memory_allocated: nothing of a GPU's memory."""
        return 0

    def max_memory_allocated(self, device: object = None) -> int:
        """cuda.max_memory_allocated: the same."""
        return 0

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """cuda.reset_peak_memory_stats: there are none."""


def use_cpu() -> None:
    """Make ColossalAI run on CPUs, in this process, from now on."""
    set_accelerator(Cpu())
    # ZeRO asserts a GPU, and then that all its parameters are of one precision: only the second is kept.
    LowLevelZeroOptimizer._sanity_checks = _one_precision
    # Gemini moves slices between GPU and host. Here both are one place, the one it calls the GPU's: a slice is always
    # there, and never moves.
    Chunk.close_chunk = _close_on_device
    Chunk.device_type = property(_device_type)
    Chunk.shard_move = ChunkManager.move_chunk = _stay
    # Its Adam loads a compiled kernel for a CPU, and leaves bfloat16 gradients, the only ones here, to PyTorch.
    CPUAdamLoader.REGISTRY = [_NoKernel]


_close_chunk = Chunk.close_chunk


def _close_on_device(chunk: Any) -> None:
    _close_chunk(chunk)
    if chunk.cuda_shard is None and chunk.cpu_shard is not None:
        chunk.cuda_shard, chunk.cpu_shard = chunk.cpu_shard, None


def _device_type(chunk: Any) -> str:
    """As the original, which asks the accelerator for the name of a device that is no CPU."""
    return "cpu" if chunk.chunk_temp is not None else "cuda"


def _stay(*_: object, **__: object) -> None:
    """Where a slice would move."""


class _NoKernel:
    """An extension of CPUAdamLoader."""

    name, priority = "none", 1

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None:
        """With everything: it does nothing."""

    def load(self) -> Any:
        return SimpleNamespace(CPUAdamOptimizer=lambda *_: None)


def _one_precision(optimizer: Any) -> None:
    precisions = {p.dtype for group in optimizer.optim.param_groups for p in group["params"]}
    assert precisions == {optimizer.dtype}, f"ZeRO shards parameters of one precision, and got {precisions}"
