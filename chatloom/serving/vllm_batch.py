"""vLLM as the server's engine on a CUDA device: its own scheduler and kernels behind the same steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatloom.device import resolve_device
from chatloom.errors import InputError
from chatloom.models.checkpoint import load_tokenizer, stop_ids
from chatloom.serving.batches import Request, Token
from chatloom.serving.logits import Logprobs
from chatloom.serving.options import Options
from chatloom.serving.prompts import Prompts
from chatloom.serving.served import Model


def open_vllm(path: Path, device: str, options: Options) -> Model:
    """
    Raises:
        InputError: without a CUDA device or vLLM, or where it does not start with these settings.
    """
    remedy = "or leave out --engine vllm"
    where = resolve_device(device)
    if where.device.type != "cuda":
        raise InputError(f"--engine vllm: needs a CUDA device, and this is {where.device.type}; use one, {remedy}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise InputError(f"--engine vllm: vLLM cannot be imported ({error}); see docs/vllm.md, {remedy}") from error
    arguments = vllm.EngineArgs(
        model=str(path.resolve()),
        dtype=str(where.dtype).removeprefix("torch."),
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=options.batch_size,
        max_model_len=options.context or -1,  # -1: the model's context, or as much of it as there is memory for
        max_logprobs=20,
        trust_remote_code=False,
        load_format="safetensors",
    )
    try:
        engine = vllm.LLMEngine.from_engine_args(arguments)
    except ValueError as error:
        raise InputError(
            f"--engine vllm, --gpu-memory {options.gpu_memory_utilization}: vLLM does not start ({error}); "
            f"change the share, {remedy}"
        ) from error
    stops = stop_ids(path)
    prompts = Prompts(load_tokenizer(path), engine.model_config.max_model_len)
    return Model(prompts, stops, lambda: VllmBatch(engine, stops))


class VllmBatch:
    """Requests with our own seeds, limits and stop tokens: no default of the checkpoint applies."""

    def __init__(self, engine: Any, stops: Sequence[int]) -> None:
        """
        Args:
            engine: a `vllm.LLMEngine`; requests of another batch over it are forgotten by that one.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine, self._stops = engine, list(stops)
        self._settings, self._deltas = SamplingParams, RequestOutputKind.DELTA

    def add(self, number: int, request: Request) -> None:
        settings = self._settings(
            max_tokens=request.sampling.max_new_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.top_k or 0,
            seed=request.seed,
            repetition_penalty=request.penalties.repetition,
            presence_penalty=request.penalties.presence,
            frequency_penalty=request.penalties.frequency,
            logprobs=request.num_logprobs,
            stop_token_ids=self._stops,
            ignore_eos=True,  # the checkpoint's own, which are stop tokens only where `stops` says so
            detokenize=False,
            output_kind=self._deltas,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": list(request.prompt_ids)}, settings)

    def cancel(self, number: int) -> None:
        self._engine.abort_request([str(number)])

    def step(self) -> list[Token]:
        if not self._engine.has_unfinished_requests():
            return []
        return [token for output in self._engine.step() for token in _tokens(output)]


def _tokens(output: Any) -> list[Token]:
    """Of one request, those that a step made: several where vLLM guesses ahead."""
    made = output.outputs[0]
    told = made.logprobs or [None] * len(made.token_ids)
    return [
        Token(
            int(output.request_id),
            id,
            output.finished and place == len(made.token_ids) - 1,
            None if logprobs is None else _logprobs(logprobs, id),
        )
        for place, (id, logprobs) in enumerate(zip(made.token_ids, told, strict=True))
    ]


def _logprobs(told: dict[int, Any], sampled: int) -> Logprobs:
    """vLLM tells the sampled token too, whether it is among the likeliest or not."""
    ranked = sorted(told.items(), key=lambda item: item[1].rank)
    asked = len(told) - (told[sampled].rank > len(told) - 1)
    return Logprobs(told[sampled].logprob, tuple((id, entry.logprob) for id, entry in ranked[:asked]))
