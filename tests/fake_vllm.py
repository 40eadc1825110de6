"""A stand-in for the package `vllm`: what this project asks of vLLM 0.32, answered on a CPU.

It samples by the project's own engine, so that the same seeds give the same tokens, and reads weights and adapters from
where vLLM reads them: the checkpoint, what `reload_weights` is handed, the adapter's files. Arguments that are not here
vLLM may have, but nobody asked for them. Weights that level 2 of sleep forgets are NaN until they are loaded anew.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chatloom.device import Device
from chatloom.models.checkpoint import load_on
from chatloom.models.generation import Engine, open_decoder
from chatloom.models.sampling import Sampling

MEMORY = {"weights", "kv_cache"}


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        if gpu_memory_utilization > 0.9:
            raise ValueError("Free memory on device is less than desired GPU memory utilization.")
        assert max_model_len == -1, "the whole context needs memory that may not be there"
        self._chat = load_on(Path(model), Device(torch.device("cpu"), getattr(torch, dtype)))
        self.model_config = SimpleNamespace(max_model_len=self._chat.model.config.max_position_embeddings)
        self._batch_size, self._logprobs_mode = max_num_seqs, logprobs_mode
        self._sleeps, self._adapts, self._max_rank, self._max_loras = (
            enable_sleep_mode,
            enable_lora,
            max_lora_rank,
            max_loras,
        )
        self.asleep: set[str] = set()
        self.sleep_level = 0
        self._adapters: dict[int, Any] = {}

    def sleep(self, level: int = 1) -> None:
        assert self._sleeps, "enable_sleep_mode is off"
        self.asleep, self.sleep_level = set(MEMORY), level
        if level == 2:
            for parameter in self._chat.model.parameters():
                parameter.data.fill_(torch.nan)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.asleep -= set(tags) if tags is not None else MEMORY

    def collective_rpc(self, method: str, kwargs: dict[str, Iterable[tuple[str, Tensor]]]) -> None:
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        own = dict(self._chat.model.named_parameters())
        for name, weight in kwargs["weights_iterator"]:
            own.pop(name).data.copy_(weight)
        assert not own, f"weights that were not loaded: {sorted(own)}"

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[SimpleNamespace]:
        assert not self.asleep
        model = self._chat.model if lora_request is None else self._adapted(lora_request)
        engine = Engine(open_decoder(model, self._batch_size, snapshot=False), self._batch_size)
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.seed is not None
            own_eos = () if params.ignore_eos else self._chat.stop_ids
            engine.add(
                prompt["prompt_token_ids"],
                Sampling(params.max_tokens, params.temperature, params.top_p),
                stop_ids=[*params.stop_token_ids, *own_eos],
                seed=params.seed,
            )
        tokens: list[list[int]] = [[] for _ in prompts]
        while not engine.idle:
            for event in engine.step():
                tokens[event.request].append(event.token)
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        outputs = []
        told = functools.cache(self._logprobs)
        for prompt, params, response in zip(prompts, sampling_params, tokens, strict=True):
            logprobs = told(plain, tuple(prompt["prompt_token_ids"]), tuple(response), params.temperature)
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=response, logprobs=logprobs)]))
        return outputs

    def _adapted(self, request: LoRARequest) -> Any:
        """The model with an adapter's product added to its weights; a number that is known is not read again."""
        assert self._adapts
        if request.lora_int_id not in self._adapters:
            folder = Path(request.lora_path)
            settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            assert settings["peft_type"] == "LORA"
            assert settings["r"] <= self._max_rank
            factors = load_file(folder / "adapter_model.safetensors")
            model = copy.deepcopy(self._chat.model)
            for name, down in factors.items():
                if ".lora_A." in name:
                    layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    up = factors[name.replace(".lora_A.", ".lora_B.")]
                    model.get_submodule(layer).weight.data += settings["lora_alpha"] / settings["r"] * up @ down
            self._adapters[request.lora_int_id] = model
        return self._adapters[request.lora_int_id]

    def _logprobs(
        self, model: Any, prompt: tuple[int, ...], response: tuple[int, ...], temperature: float
    ) -> list[dict[int, Any]]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
        if self._logprobs_mode == "processed_logprobs" and temperature > 0:
            logits = logits / temperature
        told = logits.log_softmax(-1)
        return [{token: SimpleNamespace(logprob=float(told[i, token]))} for i, token in enumerate(response)]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `import vllm` find this."""
    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(package).update(LLM=LLM, SamplingParams=SamplingParams, lora=lora)
    vars(lora).update(request=request)
    vars(request).update(LoRARequest=LoRARequest)
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
