"""Kernels in C for what PyTorch does slowly on a CPU in bfloat16, compiled where they run, when first asked for.

Everything here gives None where there is no use for a kernel or no C compiler: callers then do the same with PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
LANES = 16
LINEAR_ROWS = 256
"""`linear` is for this many: with more rows the weights' memory no longer counts, and oneDNN is faster."""
SHARES = 16
"""Parts that sums over rows are made in: fixed, so that results do not depend on the number of threads."""
ADAMW_BLOCK = 2048
"""Numbers whose squares make one sum, as in adamw.c."""
OFF = "CHATLOOM_KERNELS"
"""Environment variable; 0 computes everything with PyTorch."""


@functools.cache
def compiled(name: str, **macros: int) -> ctypes.CDLL | None:
    """`<name>.c` as a library, kept in the user's cache folder; None without a compiler that can make it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get(OFF) == "0":
        log.info("kernels: %s", "off" if compiler else "no C compiler; PyTorch does their work, more slowly")
        return None
    flags = [*FLAGS, "-shared", "-fPIC", *(f"-D{macro}={value}" for macro, value in macros.items())]
    source = SOURCES / f"{name}.c"
    parts = [source.read_bytes(), (SOURCES / "vectors.h").read_bytes(), " ".join(flags).encode(), _machine(compiler)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    library = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatloom", f"{name}-{digest}.so")
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder, library.name)
                command = [compiler, *flags, str(source), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        message = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning("kernels: %s cannot be compiled; PyTorch does its work, more slowly: %s", source.name, message)
        return None


def norm_library(x: Tensor) -> ctypes.CDLL | None:
    """For `rms_norm` and `rms_norm_backward` over the last dimension of `x`."""
    return compiled("norm") if _fits(x) and x.shape[-1] % LANES == 0 else None


def attention_library(x: Tensor, head_size: int, group: int) -> ctypes.CDLL | None:
    """For `attend_rows` and `attention_backward` on tensors like `x`: `group` query heads share a key head."""
    return compiled("attention", HEAD=head_size, GROUP=group) if _fits(x) and head_size % LANES == 0 else None


def linear_library(weight: Tensor) -> ctypes.CDLL | None:
    """For `linear` with a weight (outputs, inputs), on processors with AMX."""
    if not _fits(weight) or weight.shape[0] < LANES or weight.shape[1] % (2 * LANES):
        return None
    library = compiled("linear")
    return library if library is not None and library.linear_works() else None


def adamw_library(x: Tensor) -> ctypes.CDLL | None:
    """For `gradient_norm` and `adamw` of models that have parameters like `x`."""
    return compiled("adamw") if _fits(x) else None


def vocabulary_library(x: Tensor) -> ctypes.CDLL | None:
    """For `log_softmax` of tensors like `x`."""
    return compiled("vocabulary") if _fits(x) else None


def rms_norm(library: ctypes.CDLL, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x) like x (..., H), and 1 / rms(x) (...) in float32."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, width = scale.numel(), x.shape[-1]
    library.rms_norm(
        *_pointers(x, weight, y, scale), ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_float(epsilon)
    )
    return y, scale


def rms_norm_backward(
    library: ctypes.CDLL, upstream: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (..., H) and of the weight (H), the latter in float32."""
    upstream, x = upstream.contiguous(), x.contiguous()
    x_grad, weight_grads = torch.empty_like(x), x.new_zeros((SHARES, x.shape[-1]), dtype=torch.float32)
    counts = (ctypes.c_int64(value) for value in (scale.numel(), x.shape[-1], SHARES))
    library.rms_norm_backward(*_pointers(upstream, x, weight, scale, x_grad, weight_grads), *counts)
    return x_grad, weight_grads.sum(0)


def log_softmax(
    library: ctypes.CDLL, logits: Tensor, targets: Tensor, temperature: float, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N) of `targets` (N) and entropies (N), float32, of softmax(logits / temperature).

    Args:
        logits: (N, V); with `keep` one-hot(targets) - probabilities is written over them.
    """
    logprobs, entropies = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    counts = (ctypes.c_int64(value) for value in logits.shape)
    library.log_softmax(
        *_pointers(logits, targets, logprobs, entropies), *counts, ctypes.c_float(1 / temperature), ctypes.c_int(keep)
    )
    return logprobs, entropies


def gradient_norm(library: ctypes.CDLL, gradients: Sequence[Tensor]) -> Tensor:
    """() float64 norm of all of them together; each is bfloat16 or float32."""
    total = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        sums = torch.empty(-(-gradient.numel() // ADAMW_BLOCK))
        numbers, results = _pointers(gradient, sums)
        library.squares(numbers, _is_half(gradient), results, ctypes.c_int64(gradient.numel()))
        total += sums.sum(dtype=torch.float64)
    return total.sqrt()


def adamw(
    library: ctypes.CDLL,
    parameter: Tensor,
    gradient: Tensor,
    master: Tensor,
    moments: tuple[Tensor, Tensor],
    rates: tuple[float, ...],
) -> None:
    """One step of AdamW on a float32 master and its moments, rounded into the parameter.

    Args:
        gradient: bfloat16 or float32.
        rates: the factor that clips the gradient, the learning rate over the mean's correction, learning rate * weight
            decay, both betas, epsilon, 1 / the root of the variance's correction.
    """
    rounded = parameter if parameter.dtype == torch.bfloat16 else None
    grads, weights, means, variances = _pointers(gradient, master, *moments)
    result = None if rounded is None else _pointers(rounded)[0]
    floats = (ctypes.c_float(rate) for rate in rates)
    count = ctypes.c_int64(master.numel())
    library.adamw(grads, _is_half(gradient), weights, means, variances, result, count, *floats)
    if rounded is None:
        parameter.copy_(master)


def attend_rows(
    library: ctypes.CDLL, states: Tensor, cosine: Tensor, sine: Tensor, cache: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of one new token in each of n sequences, whose key and value are put into the cache.

    Args:
        states: (n, (heads + 2 key heads) * D) queries, keys and values, positions not yet in them.
        cosine, sine: (n, D) of each token's position; the sine has the sign of the rotation.
        cache: (rows, room, 2, key heads, D), n rows or more; written to.
        lengths: (n) int64 tokens of each sequence, the new one counted in.

    Returns:
        (n, heads * D)
    """
    room, _, key_heads, size = cache.shape[1:]
    out = states.new_empty(len(states), states.shape[1] - 2 * key_heads * size)
    counts = (ctypes.c_int64(value) for value in (len(states), room, key_heads))
    library.attend_rows(*_pointers(states, cosine, sine, cache, lengths, out), *counts, ctypes.c_float(scale))
    return out


def attention_backward(
    library: ctypes.CDLL,
    states: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    upstream: Tensor,
    logsumexp: Tensor,
    lengths: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of causal attention over sequences laid end to end.

    Args:
        states: queries (T, heads, D), keys and values (T, key heads, D), contiguous.
        out, upstream: (T, heads, D), contiguous.
        logsumexp: (heads, T) float32 of each query's scores.
        lengths: of the sequences, summing to T.

    Raises:
        MemoryError: where the longest sequence's scores do not fit.
    """
    gradients = tuple(torch.empty_like(state) for state in states)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    counts = (ctypes.c_int64(value) for value in (len(lengths), states[1].shape[1]))
    tensors = (*states, out, upstream, logsumexp, *gradients, starts)
    if library.attention_backward(*_pointers(*tensors), *counts, ctypes.c_float(scale)):
        raise MemoryError(f"no memory for the attention gradient of {max(lengths)} tokens")
    query, key, value = gradients
    return query, key, value


def linear(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """x W^T + bias, or silu(x gate^T) * x W^T, of x (rows, inputs), any number of them: (rows, outputs).

    A row's result has the same bits whatever rows are beside it.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    x, y = x.contiguous(), x.new_empty(rows, outputs)
    tiles = x.new_empty(-(-rows // LANES) * LANES, inputs)
    optional = [None if tensor is None else _pointers(tensor)[0] for tensor in (gate, bias)]
    counts = (ctypes.c_int64(value) for value in (rows, inputs, outputs))
    library.linear(*_pointers(x, weight), *optional, *_pointers(y, tiles), *counts)
    return y


def quantized_library(x: Tensor, bits: int) -> ctypes.CDLL | None:
    """For `multiply_quantized` and `dequantize` with activations like `x`, bfloat16 or float32, and 4 or 8 bits."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    return compiled("quantized", BITS=bits, BFLOAT16=int(x.dtype == torch.bfloat16))


def multiply_quantized(
    library: ctypes.CDLL, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int
) -> Tensor:
    """x W^T of a few rows, with weights widened on their way from memory.

    Args:
        x: (rows, in).
        codes, scales, zeros: tiles of `chatloom.models.quantized_linear`.

    Returns:
        (rows, out)

    Raises:
        MemoryError: where the rows do not fit a second time.
    """
    x = x.contiguous()
    y = x.new_empty(len(x), len(codes) * LANES)
    counts = (ctypes.c_int64(value) for value in (*x.shape, len(codes), group_size))
    if library.multiply(*_pointers(x, codes, scales, zeros, y), *counts):
        raise MemoryError(f"no memory for {len(x)} rows of {x.shape[1]} activations")
    return y


def dequantize(
    library: ctypes.CDLL, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The tiles' weights (in, out) in `dtype`, which is the one that the library is for."""
    num_inputs = scales.shape[1] * group_size
    weights = torch.empty(num_inputs, len(codes) * LANES, dtype=dtype)
    counts = (ctypes.c_int64(value) for value in (num_inputs, len(codes), group_size))
    library.dequantize(*_pointers(codes, scales, zeros, weights), *counts)
    return weights


def _fits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _is_half(x: Tensor) -> ctypes.c_int:
    return ctypes.c_int(x.dtype == torch.bfloat16)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _machine(compiler: str) -> bytes:
    """What `-march=native` depends on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_bytes().splitlines() if cpu.exists() else [platform.processor().encode()]
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), lines[0])
    version = subprocess.run([compiler, "--version"], check=False, capture_output=True).stdout
    return flags + version
