"""A 7B model at 4 bits on a CPU: what it takes in memory, loading included, and how fast it answers.

    python -m bench.seven_b --out seven_b.json

Makes a checkpoint with the shapes of LLaMA-7B and random weights in the GPTQ layout (4 bits, groups of 128), a shard at
a time; a fresh process loads it and answers a prompt as the server does. Needs 4 GB of disk and as much memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from bench.machine import describe_machine, resident
from bench.presets import ROOT
from chatloom.files import atomic_dir, write_json
from chatloom.models.checkpoint import load_causal_lm
from chatloom.models.generation import stream_tokens
from chatloom.models.sampling import Sampling
from chatloom.models.tiny import byte_level_tokenizer
from chatloom.progress import progress

BITS, GROUP_SIZE = 4, 128
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SMOKE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS_A_SHARD = 8
LIMIT_BYTES = 4.5e9
FOLDER = ROOT / ".bench" / "seven_b"
SPREAD = 0.02
"""Standard deviation of the weights, as LLaMA's are initialised."""
SEED = 42

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Answered:
    """What the process that answers found; bytes are resident ones."""

    after_imports_bytes: int
    loaded_bytes: int
    """Once the model is there."""
    load_peak_bytes: int
    """Until then."""
    peak_bytes: int
    """Of the whole process, from its start to its end."""
    load_seconds: float
    prompt_seconds: float
    """To the first new token."""
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    """Of the new tokens behind the first."""
    threads: int

    @property
    def over_imports(self) -> int:
        return self.peak_bytes - self.after_imports_bytes


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where the checkpoint is made, or is already.")] = FOLDER,
    tokens: Annotated[int, typer.Option(min=66, help="Context: the prompt, and 64 tokens of an answer.")] = 512,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoint there.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny model, to see it run.")] = False,
) -> None:
    """Build the checkpoint, load it in a fresh process, answer; exit status 1 where memory is over 4.5 GB."""
    if context.invoked_subcommand is not None:
        return
    shape = SMOKE if smoke else LLAMA_7B
    made = not folder.exists()
    if made:
        build(folder, shape)
    try:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found = _answer_elsewhere(folder, tokens)
    finally:
        if made and not keep:
            shutil.rmtree(folder)
    show(found, size)
    if out is not None:
        figures = {"over_imports_bytes": found.over_imports, "checkpoint_bytes": size, "limit_bytes": LIMIT_BYTES}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        machine = describe_machine().model_dump(mode="json")
        write_json(out, {"finished": when, "machine": machine, "shape": shape, **asdict(found), **figures})
    raise typer.Exit(int(found.over_imports > LIMIT_BYTES))


@app.command(hidden=True)
def answer(folder: Path, tokens: int) -> None:
    """What the fresh process does: load, answer a prompt of random tokens, print the figures as JSON."""
    after_imports = resident("VmRSS")
    started = time.perf_counter()
    chat = load_causal_lm(folder, "cpu", "auto")
    loaded = time.perf_counter()
    loaded_bytes, load_peak = resident("VmRSS"), resident("VmHWM")
    sampling = Sampling(64, temperature=0.0)
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(chat.model.config.vocab_size, (tokens - 64,), generator=generator).tolist()
    answering = time.perf_counter()
    ends = [time.perf_counter() for _ in stream_tokens(chat.model, prompt, sampling, stop_ids=())]
    found = Answered(
        after_imports_bytes=after_imports,
        loaded_bytes=loaded_bytes,
        load_peak_bytes=load_peak,
        peak_bytes=resident("VmHWM"),
        load_seconds=loaded - started,
        prompt_seconds=ends[0] - answering,
        prompt_tokens=len(prompt),
        new_tokens=len(ends),
        tokens_per_second=(len(ends) - 1) / (ends[-1] - ends[0]),
        threads=torch.get_num_threads(),
    )
    typer.echo(json.dumps(asdict(found)))


def build(folder: Path, shape: dict[str, int]) -> None:
    """A checkpoint with random weights; one shard is in memory at a time."""
    config = LlamaConfig(
        **shape,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        quantization_config={
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        },
    )
    generator = torch.Generator().manual_seed(SEED)
    layers = range(config.num_hidden_layers)
    places = [layers[start : start + LAYERS_A_SHARD] for start in layers[::LAYERS_A_SHARD]]
    weight_map: dict[str, str] = {}
    with atomic_dir(folder) as made, progress("seven_b", len(places) + 1) as advance:
        for number, place in enumerate([(), *places]):
            named = _layers(config, place, generator) if place else _ends(config, generator)
            tensors, file = dict(named), f"model-{number:05d}.safetensors"
            save_file(tensors, made / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            advance()
        write_json(made / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        config.save_pretrained(made)
        tokenizer = byte_level_tokenizer(300)
        tokenizer.chat_template = (ROOT / "data/templates/chatml.jinja").read_text(encoding="utf-8")
        tokenizer.save_pretrained(made)
        GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(made)


def _ends(config: LlamaConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, head and the last norm."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        size = (config.vocab_size, config.hidden_size)
        yield name, torch.empty(size, dtype=torch.float16).normal_(0, SPREAD, generator=generator)
    yield "model.norm.weight", torch.ones(config.hidden_size, dtype=torch.float16)


def _layers(config: LlamaConfig, numbers: Sequence[int], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    width, inner = config.hidden_size, config.intermediate_size
    attention = {f"self_attn.{kind}_proj": (width, width) for kind in "qkvo"}
    mlp = {"mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner), "mlp.down_proj": (inner, width)}
    for number in numbers:
        prefix = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", torch.ones(width, dtype=torch.float16)
        for name, (inputs, outputs) in (attention | mlp).items():
            for key, tensor in _quantized(inputs, outputs, generator).items():
                yield f"{prefix}.{name}.{key}", tensor


def _quantized(inputs: int, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Codes of 0 to 15, all as likely, around a zero of 8: their standard deviation is 4.6."""
    groups, codes_a_word = inputs // GROUP_SIZE, 32 // BITS
    size = (inputs // codes_a_word, outputs)
    scales = torch.empty(groups, outputs).uniform_(0.8, 1.2, generator=generator) * (SPREAD / 4.6)
    return {
        "qweight": torch.randint(-(2**31), 2**31, size, dtype=torch.int32, generator=generator),
        "qzeros": torch.full((groups, outputs // codes_a_word), 0x77777777, dtype=torch.int32),  # 8, stored less one
        "scales": scales.half(),
        "g_idx": (torch.arange(inputs) // GROUP_SIZE).int(),
    }


def show(found: Answered, size: int) -> None:
    table = Table(
        title=f"{size / 1e9:.2f} GB of checkpoint, {BITS} bits, groups of {GROUP_SIZE}, {found.threads} threads"
    )
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "resident after imports": f"{found.after_imports_bytes / 1e9:.2f} GB",
        "resident with the model": f"{found.loaded_bytes / 1e9:.2f} GB",
        "peak while it was loaded": f"{found.load_peak_bytes / 1e9:.2f} GB",
        "peak, loading and answering": f"{found.peak_bytes / 1e9:.2f} GB",
        f"over imports (at most {LIMIT_BYTES / 1e9} GB)": f"{found.over_imports / 1e9:.2f} GB",
        "loaded in": f"{found.load_seconds:.1f} s",
        f"first token after {found.prompt_tokens} of a prompt": f"{found.prompt_seconds:.1f} s",
        f"the other {found.new_tokens - 1} tokens": f"{found.tokens_per_second:.2f} a second",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _answer_elsewhere(folder: Path, tokens: int) -> Answered:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench.seven_b", "answer", str(folder.resolve()), str(tokens)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Answered(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    app()
