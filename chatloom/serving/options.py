"""How a server behaves: the one home of these values; `chatloom serve` has an option for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EngineKind = Literal["native", "vllm"]
Overflow = Literal["error", "drop-oldest"]


@dataclass(frozen=True)
class Options:
    engine: EngineKind = "native"
    """`native`: the project's own decoders on any device; `vllm`: vLLM, on a CUDA device."""
    gpu_memory_utilization: float = 0.8
    """Share of the device's memory that vLLM takes."""
    batch_size: int = 16
    """Answers that are made at once."""
    queue: int = 64
    """Answers that may wait beside them; more are told to come again (429)."""
    context: int | None = None
    """Tokens of a conversation and its answer, at most; None for what the model was trained for."""
    max_tokens: int | None = None
    """Tokens of one answer, at most; None for what the context holds."""
    overflow: Overflow = "error"
    """What becomes of a conversation that is too long: an error, or its oldest turns are left out."""
    max_body: int = 1_000_000
    """Bytes of a request, at most."""
    body_seconds: float = 30.0
    """Time that a client has to send a request."""
    keys: Path | None = None
    """File of API keys; None lets everybody in."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser."""
    words: Path | None = None
    """File of words that answers end before, and that no message may have."""
    audit: Path | None = None
    """File that gets a JSON line a request."""
    audit_bodies: bool = False
    """Whether messages and answers are written there too."""
    watch_seconds: float = 10.0
    """How often the registry is asked whether the alias has moved; 0 never asks."""
    feedback: Path | None = None
    """Folder for what people say of answers on the page; None keeps nothing."""
