"""What samples responses: the project's own engine, or vLLM, behind one function type."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from chatloom.config import Lora, NativeGeneration, VllmGeneration
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.generation import draw_seeds, generate
from chatloom.models.sampling import Sampling
from chatloom.parallel.ranks import ALONE, Ranks

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for; an adapter of another rank takes the next larger one."""


@dataclass(frozen=True)
class Sampled:
    responses: list[list[int]]
    """In the prompts' order; each ends with its stop token unless the limit came first."""
    logprobs: list[list[float]] | None
    """Of each token at the sampling temperature, by the engine's own arithmetic; None where it tells none. To compare
    with only: what PPO learns from is recomputed by the policy that trains."""


class RolloutEngine(Protocol):
    """Samples one response a prompt from a model as it is now, with the adapter that is on."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        ranks: Ranks = ALONE,
        on_done: Callable[[int], object] = lambda rows: None,
    ) -> Sampled:
        """
        Args:
            generator: draws a seed a prompt, and nothing else; PyTorch's default one where it is None.
            ranks: who share the prompts, all with the same model and the same generator; each gets all responses.
            on_done: called with the number of responses finished since the last call.
        """


def require_available(generation: NativeGeneration | VllmGeneration, device: torch.device, key: str) -> None:
    """Refuse an engine that this machine cannot run, before anything is loaded.

    Raises:
        InputError: naming `key`, the params key of `generation`, and the remedy.
    """
    if generation.kind == "native":
        return
    remedy = f"or set {key} to {{kind: native}}"
    if device.type != "cuda":
        raise InputError(
            f"{key}.kind = 'vllm': needs a CUDA device, and the stage runs on {device.type}; use one, {remedy}"
        )
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{key}.kind = 'vllm': vLLM cannot be imported ({error}); install it as docs/vllm.md says, {remedy}"
        ) from error


def open_engine(
    generation: NativeGeneration | VllmGeneration, batch_size: int, checkpoint: Path, device: Device, lora: Lora | None
) -> RolloutEngine:
    """The engine that `generation` names; vLLM takes a while to start.

    Args:
        batch_size: sequences at once.
        checkpoint: what the models that it will sample from were loaded from.
        lora: of the adapters that train on them; None where they train in full, or not at all.

    Raises:
        InputError: where vLLM does not start with these settings.
    """
    if generation.kind == "vllm":
        return VllmEngine(checkpoint, device, batch_size, generation.gpu_memory_utilization, lora)
    return native(batch_size)


def native(batch_size: int) -> RolloutEngine:
    """The project's own engine (`chatloom.models.generation`)."""

    def sample(model: Any, prompts: Sequence[list[int]], sampling: Sampling, **settings: Any) -> Sampled:
        return Sampled(generate(model, prompts, sampling, batch_size=batch_size, **settings), None)

    return sample


class VllmEngine:
    """vLLM in this process, on the device that trains, asleep while nobody asks.

    Its weights are its own. Where adapters train they are the checkpoint's, in the CPU's memory while it sleeps, and
    each call hands it the adapter that is on: W + BA in bfloat16 would lose what is smaller than half a unit in W's
    last place, and the policy that samples would not be the one that is trained. Where whole models train it sleeps
    without any, and each call copies those of the model.
    """

    def __init__(
        self, checkpoint: Path, device: Device, batch_size: int, gpu_memory_utilization: float, lora: Lora | None
    ) -> None:
        """
        Raises:
            InputError: where vLLM does not start with these settings.
        """
        # A process of its own would take no tensors, and schedules by the clock: the same seeds, other roundings.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm

        self._settings: Callable[..., Any] = vllm.SamplingParams
        self._adapts = lora is not None
        self._numbers = itertools.count(1)
        try:
            self._llm = vllm.LLM(
                str(checkpoint.resolve()),
                dtype=str(device.dtype).removeprefix("torch."),
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=batch_size,
                max_model_len=-1,  # the model's context, or as much of it as there is memory for
                enable_sleep_mode=True,
                logprobs_mode="processed_logprobs",  # at the sampling temperature, as ours are
                **(_room_for(lora) if lora is not None else {}),
            )
        except ValueError as error:
            raise InputError(
                f"generation.kind = 'vllm', gpu_memory_utilization = {gpu_memory_utilization}: vLLM does not start "
                f"({error}); change the share, or set generation to {{kind: native}}"
            ) from error
        self._sleep()

    def __call__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        ranks: Ranks = ALONE,
        on_done: Callable[[int], object] = lambda rows: None,
    ) -> Sampled:
        assert ranks.size == 1, "params refuse more"
        if not prompts:
            return Sampled([], [])
        longest, room = max(map(len, prompts)) + sampling.max_new_tokens, self._llm.model_config.max_model_len
        if longest > room:  # vLLM would end such a response early
            raise InputError(
                f"a prompt and max_new_tokens = {sampling.max_new_tokens} make {longest} tokens, and vLLM has room for "
                f"{room}: lower max_new_tokens, or raise generation.gpu_memory_utilization"
            )
        settings = [
            self._settings(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,  # the checkpoint's own, which are stop tokens only where `stop_ids` says so
                detokenize=False,
                logprobs=0,  # of the sampled token alone
            )
            for seed in draw_seeds(len(prompts), generator)
        ]
        with self._awake(model) as adapter:
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], settings, lora_request=adapter, use_tqdm=False
            )
        on_done(len(prompts))
        responses = [output.outputs[0] for output in outputs]
        return Sampled(
            [list(response.token_ids) for response in responses],
            [
                [told[token].logprob for token, told in zip(response.token_ids, response.logprobs, strict=True)]
                for response in responses
            ],
        )

    @contextmanager
    def _awake(self, model: Any) -> Iterator[Any]:
        """vLLM with what `model` has learned; yields the request for its adapter, None without one."""
        name = _adapter_on(model)
        assert self._adapts or name is None, "opened for models without adapters"
        torch.cuda.empty_cache()  # memory that PyTorch keeps for later is memory that vLLM cannot have
        with tempfile.TemporaryDirectory() as folder:
            try:
                if self._adapts:
                    self._llm.wake_up()
                else:
                    # In this order the old cache, the old weights and the new ones are never there together.
                    self._llm.wake_up(tags=["weights"])
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(model)})
                    self._llm.wake_up(tags=["kv_cache"])
                yield self._request(model, name, Path(folder)) if name is not None else None
            finally:
                self._sleep()

    def _request(self, model: Any, name: str, folder: Path) -> Any:
        """The adapter in PEFT's layout, under a number that vLLM has not seen: it would not read a known one again."""
        from vllm.lora.request import LoRARequest

        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        save_file(
            {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()},
            folder / "adapter_model.safetensors",
        )
        model.peft_config[name].save_pretrained(folder)
        number = next(self._numbers)
        return LoRARequest(f"{name}-{number}", number, str(folder))

    def _sleep(self) -> None:
        # Level 1 moves the weights to the CPU's memory, level 2 forgets them.
        self._llm.sleep(level=1 if self._adapts else 2)


def _room_for(lora: Lora) -> dict[str, Any]:
    """vLLM's settings for one adapter at a time."""
    rank = next((rank for rank in LORA_RANKS if rank >= lora.rank), None)
    if rank is None:
        raise InputError(
            f"lora.rank = {lora.rank}: vLLM takes adapters of rank {LORA_RANKS[-1]} at most; lower it, or set "
            "generation to {kind: native}"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def _adapter_on(model: nn.Module) -> str | None:
    layers: Iterator[Any] = (module for module in model.modules() if isinstance(module, LoraLayer))
    return next((layer.active_adapters[0] for layer in layers if not layer.disable_adapters), None)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's own weights by their names in a checkpoint, adapters left out."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter.detach()
