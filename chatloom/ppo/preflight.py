"""What must hold before PPO spends hours: one tokenizer, a pad token of its own, memory, equal scores, a ratio of 1."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import AutoConfig

from chatloom.config import Lora, Parallel, TrainPpoParams
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models import four_bit
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel, load_tokenizer, stop_ids
from chatloom.models.reward_model import read_adapter
from chatloom.packing import pack
from chatloom.ppo.experience import Experience
from chatloom.ppo.roles import Roles
from chatloom.tensors import LOGITS_CHUNK

log = logging.getLogger(__name__)

FIRST_STEP_TOLERANCE = 0.05
"""Largest mean |log ratio| or |KL| a token before the first update: rounding of bfloat16 stays far below it."""
SCORE_TOLERANCE = 0.1
"""Largest mean difference of two scorings, in standard deviations of the reference scores: a lost head or another
backbone moves scores by about 1."""
CLOSE = 0.8
"""Share of the available memory from which on the estimate warns: it leaves out fragmentation."""
OPTIMIZER_BYTES = 16
"""Of each trained parameter: float32 master, gradient and two Adam moments (`chatloom.optim`)."""
FLOAT_COPIES, MODEL_COPIES = 2, 2
"""Of each logit of a chunk: itself and its probability, in float32 and in the model's precision."""
CACHE_ROOM = 1.5
"""Of the longest sequence: the cache of keys and values grows by half (`chatloom.models.decoder`)."""


# --- before anything is loaded ---


def require_same_tokenizer(sft: Path, reward: Path) -> None:
    """Policy and reward model read the same text as the same tokens and stop at the same ones.

    A reward model that is an adapter has no tokenizer of its own: it sits on the SFT model.

    Raises:
        InputError: naming what differs.
    """
    if not (reward / "tokenizer.json").is_file():
        return
    ours, theirs = load_tokenizer(sft), load_tokenizer(reward)
    pairs = {
        "vocabularies": (ours.get_vocab(), theirs.get_vocab()),
        "chat templates": (ours.chat_template, theirs.chat_template),
        "stop tokens": (stop_ids(sft), stop_ids(reward)),
    }
    for name, (one, other) in pairs.items():
        if one != other:
            raise InputError(
                f"train_ppo: {sft} and {reward} have different {name}: the reward model would read another text "
                "than the policy wrote; run train_reward again, starting from this SFT model"
            )


def require_same_base(reward: Path, lora: Lora) -> None:
    """A reward model that is an adapter was trained on the frozen weights that it will share with the policy.

    Raises:
        InputError: where those were in other bits.
    """
    adapter = read_adapter(reward)
    if adapter is not None and adapter.base_bits != lora.base_bits:
        theirs, ours = ("null" if bits is None else bits for bits in (adapter.base_bits, lora.base_bits))
        raise InputError(
            f"train_ppo.lora.base_bits = {ours}: {reward} was trained with {theirs}, and its adapter shares a backbone "
            f"with the policy; set it to {theirs}, or train_reward.lora.base_bits to {ours}"
        )


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on, read from its files."""

    tensors: dict[str, tuple[int, ...]]
    """Shape of each weight; (out, in) of a linear layer."""
    hidden: int
    intermediate: int
    key_value: int
    """Keys and values that one layer caches of a token."""
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, checkpoint: Path) -> Shape:
        if not (checkpoint / "config.json").is_file():
            raise InputError(f"{checkpoint}: no checkpoint (config.json is missing); run the stage that makes it")
        config = AutoConfig.from_pretrained(checkpoint)
        return cls(
            tensors=tensor_shapes(checkpoint),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            key_value=2 * config.num_key_value_heads * config.head_dim,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )

    def weight_bytes(self, dtype: torch.dtype, base_bits: int | None) -> int:
        """Of the whole model in memory, its layers' matrices in `base_bits`."""
        total = _count(self.tensors)
        if base_bits is None:
            return dtype.itemsize * total
        rounded = _count({n: shape for n, shape in self.tensors.items() if ".layers." in n and len(shape) == 2})
        return dtype.itemsize * (total - rounded) + int(four_bit.BYTES * rounded)

    def adapter_parameters(self, lora: Lora) -> int:
        """rank * (in + out) of each adapted layer (Hu 2021)."""
        first = 0 if lora.layers is None else self.layers - lora.layers
        total = 0
        for name, shape in self.tensors.items():
            layer = re.search(r"\.layers\.(\d+)\..*?(\w+)\.weight$", name)
            if layer and int(layer[1]) >= first and layer[2] in lora.target_modules:
                total += lora.rank * sum(shape)
        return total

    def activation_bytes(self, dtype: torch.dtype) -> int:
        """What one token of one layer leaves behind for the backward pass, without activation checkpointing.

        Two normalisations keep their input in float32; in the model's precision stay the normalised inputs of
        attention and MLP, queries, attention's output in both its layouts, keys and values, and the MLP's gate, its
        activation, the up projection and their product.
        """
        return 2 * 4 * self.hidden + dtype.itemsize * (5 * self.hidden + self.key_value + 4 * self.intermediate)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files, read from their headers."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes that PPO needs in one of its processes, by what needs them."""

    weights: int
    """Of every role, adapters included."""
    optimizer: int
    update: int
    """Activations and logits of one microbatch, and what the lower layers made of the rollout."""
    rollout: int
    """Cache of keys and values of a batch of responses, and the sampler's copy of the weights; of vLLM, its share."""

    @property
    def fixed(self) -> int:
        return self.weights + self.optimizer

    @property
    def peak(self) -> int:
        return self.fixed + max(self.update, self.rollout)

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "optimizer", "update", "rollout")}
        return f"{_text(self.peak)} ({', '.join(f'{name} {_text(size)}' for name, size in parts.items())})"


def estimate_memory(
    sft: Path, reward: Path, params: TrainPpoParams, device: Device, *, longest_prompt: int, longest_ptx: int
) -> Memory:
    """What PPO with the models in `sft` and `reward` will need, to within a factor of about 1.5."""
    shape, dtype = Shape.of(sft), device.dtype
    sft_parameters, reward_parameters = _count(shape.tensors), _count(tensor_shapes(reward))
    policy_adapter, head = shape.adapter_parameters(params.lora), shape.hidden + 1
    # The value model starts as a copy of the reward adapter, or as a fresh one on the reward model's own trunk.
    value_adapter = reward_parameters if (reward / "adapter.safetensors").is_file() else policy_adapter + head
    trained = policy_adapter + value_adapter if params.method == "lora" else 2 * sft_parameters + head
    adapted_layers = (params.lora.layers or shape.layers) if params.method == "lora" else shape.layers

    sequence = longest_prompt + params.max_new_tokens
    update_tokens = max(params.batch_size * sequence, params.ptx_batch * longest_ptx)
    kept_tokens = params.rollout_batch * sequence if adapted_layers < shape.layers else 0
    logits = min(LOGITS_CHUNK, update_tokens) * shape.vocabulary
    if params.generation.kind == "vllm":
        rollout = int(params.generation.gpu_memory_utilization * torch.cuda.mem_get_info(device.device)[1])
    else:
        cached = CACHE_ROOM * params.generation_batch * sequence * shape.layers * shape.key_value
        # On a CPU the policy's weights and its head are laid out once more for sampling (`LlamaDecoder`), but no layers
        # of 4 bits.
        copied = sft_parameters if params.lora.base_bits is None else 0
        snapshot = copied + shape.vocabulary * shape.hidden if device.device.type == "cpu" else 0
        rollout = dtype.itemsize * (int(cached) + snapshot)
    return Memory(
        weights=shape.weight_bytes(dtype, params.lora.base_bits) + dtype.itemsize * (reward_parameters + trained),
        optimizer=int(optimizer_bytes(params.parallel, device) * trained),
        update=update_tokens * adapted_layers * shape.activation_bytes(dtype)
        + (4 * FLOAT_COPIES + dtype.itemsize * MODEL_COPIES) * logits
        + dtype.itemsize * kept_tokens * shape.hidden,
        rollout=rollout,
    )


def optimizer_bytes(parallel: Parallel, device: Device) -> float:
    """Of each trained parameter, on the device of one process.

    ZeRO slices masters, moments and their gradient; the gradient in the model's precision is whole under ZeRO-1 only.
    """
    if parallel.strategy in ("none", "ddp"):
        return OPTIMIZER_BYTES
    sliced, gradient = OPTIMIZER_BYTES / parallel.num_processes, device.dtype.itemsize
    if parallel.strategy == "colossalai_zero1":
        return gradient + sliced
    on_host = parallel.strategy == "colossalai_zero2_cpu" and device.device.type == "cuda"
    return gradient / parallel.num_processes + (0 if on_host else sliced)


def available_memory(device: torch.device) -> int:
    """Bytes that this process could still get on `device`; of the host's memory, its share beside the others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    room = min([psutil.virtual_memory().available, *room_in_cgroups()])
    return int(room) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def room_in_cgroups(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under each memory limit of the control groups, v1 or v2, that this process is in: a container's.

    A group's use counts the file cache, which the kernel gives up where memory is short: what of it was not used lately
    is room. A group without a limit has a huge number there (v1) or the word `max` (v2).
    """
    rooms = []
    for line in proc.read_text().splitlines() if proc.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, (limit, used, idle) = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            limit, used, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's while the container's own group is what is mounted: up to the root.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if (folder / limit).is_file() and (size := (folder / limit).read_text().strip()) != "max":
                cache = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                rooms.append(int(size) - int((folder / used).read_text()) + int(cache[idle]))
            if folder == root:
                break
    return rooms


def require_memory(memory: Memory, available: int, params: TrainPpoParams) -> None:
    """Log the estimate; warn where it comes close to what is available.

    Raises:
        InputError: where it is more than that, naming the keys to lower.
    """
    log.info("train_ppo: needs about %s of %s available", memory, _text(available))
    if memory.peak > available:
        raise InputError(
            f"train_ppo needs about {memory} and {_text(available)} are available; {_remedy(memory, available, params)}"
        )
    if memory.peak > CLOSE * available:
        log.warning("train_ppo: memory may not suffice; if not, %s", _remedy(memory, available, params))


def _remedy(memory: Memory, available: int, params: TrainPpoParams) -> str:
    """The keys that weigh most on what is too large."""
    if memory.fixed > CLOSE * available:
        if params.method == "full":
            return "set train_ppo.method to 'lora', or take a smaller base model"
        rounded = "" if params.lora.base_bits else ", set base_bits to 4 in the lora of train_reward and train_ppo"
        return f"lower train_ppo.lora.rank = {params.lora.rank}{rounded}, or take a smaller base model"
    if memory.update >= memory.rollout:
        return f"lower train_ppo.batch_size = {params.batch_size} or train_ppo.ptx_batch = {params.ptx_batch}"
    if params.generation.kind == "vllm":
        return f"lower train_ppo.generation.gpu_memory_utilization = {params.generation.gpu_memory_utilization}"
    return (
        f"lower train_ppo.generation_batch = {params.generation_batch} "
        f"or train_ppo.max_new_tokens = {params.max_new_tokens}"
    )


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _text(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# --- with the models loaded ---


def require_own_pad_token(chat: ChatModel) -> None:
    """The pad token ends no answer.

    Raises:
        InputError: where it does.
    """
    if chat.pad_id in chat.stop_ids:
        raise InputError(
            f"train_ppo: the pad token {chat.tokenizer.convert_ids_to_tokens(chat.pad_id)!r} is also a stop token; "
            "set base_model.pad_token to another token, or to null to add one"
        )


@torch.no_grad()
def require_reward_parity(
    reward_model: Role, sequences: Sequence[Sequence[int]], recorded: Sequence[float], device: torch.device
) -> None:
    """Sequences score in one pack what they score alone, and what reward training said of them.

    Args:
        sequences: prompt and response together, as reward training packed them.
        recorded: the score of each by the reward model that was saved, gain and bias included.

    Raises:
        InputError: where it is not so: another SFT model, a lost head or a mask lies behind it.
    """
    examples = [Example(list(ids), [False] * len(ids)) for ids in sequences]
    together = reward_model.scores(pack(examples, device))
    alone = torch.cat([reward_model.scores(pack([example], device)) for example in examples])
    for name, scores in (("scored one by one", alone), ("scored by train_reward", together.new_tensor(recorded))):
        gap = float((together - scores).abs().mean())
        if not gap <= SCORE_TOLERANCE:  # NaN included
            raise InputError(
                f"train_ppo: the reward model's scores differ by {gap:.3g} on average from those {name}; "
                "models/sft and models/reward do not belong together: run train_reward and what follows it again"
            )


@torch.no_grad()
def require_first_step_parity(roles: Roles, experience: Experience, params: TrainPpoParams) -> None:
    """Before the first update the policy is its reference, and a second pass repeats the first one's logprobs.

    Raises:
        InputError: where it is not so: another tokenizer, template, dropout or adapter state stands behind it, and
            PPO would optimise noise.
    """
    packed = pack(experience.examples[: params.batch_size], roles.chat.device)
    mask = experience.response_mask[: params.batch_size]
    again = roles.policy.logprobs(packed, params.temperature)
    log_ratio = float((again - experience.old_logprobs[: params.batch_size][mask]).abs().mean())
    drift = float(experience.kl[experience.response_mask].abs().mean())
    for name, value in (("log ratio", log_ratio), ("KL to the reference", drift)):
        if not value <= FIRST_STEP_TOLERANCE:  # NaN included
            raise InputError(
                f"train_ppo: before the first update the mean absolute {name} a token is {value:.3g}, not 0; "
                "models/sft and models/reward do not belong together, or the policy is not the reference: "
                "run train_sft and what follows it again"
            )
