"""The `chatloom` command: serve and talk to a model, trace and move versions, plan a training, bring in files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chatloom.config import Strategy
from chatloom.data.commands import app as data_app
from chatloom.errors import InputError
from chatloom.registry.commands import app as registry_app
from chatloom.serving.commands import app as serving_app
from chatloom.terminal import ModelOption, input_errors

# torch, MLflow and FastAPI take seconds to import: commands import them when they run, so that --help is quick.
if TYPE_CHECKING:
    from chatloom.serving.engine import Engine
    from chatloom.serving.prompts import Message

app = typer.Typer(
    help="Serve the chat model that the pipeline registered, talk to it, see what it was made from; plan a training "
    "before it is paid for; look at data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(registry_app)
app.add_typer(serving_app)

DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes CUDA where there is one.")]


@app.command()
def rank(
    candidates: Annotated[Path, typer.Option(help="Answers to rank, which the stage compare writes.")] = Path(
        "data/comparisons/candidates.jsonl"
    ),
    rankings: Annotated[Path, typer.Option(help="Folder for what is said, a file an annotator.")] = Path(
        "data/rankings"
    ),
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the prompts that every annotator ranks.")
    ] = 0.2,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8010,
) -> None:
    """Open the page on which people rank answers."""
    with input_errors():
        from chatloom.data.rankings import read_candidates
        from chatloom.ranking.app import create_app

        web = create_app(read_candidates(candidates), rankings, overlap=overlap)
    import uvicorn

    uvicorn.run(web, host=host, port=port, log_level="warning" if host == "127.0.0.1" else "info")


@app.command()
def chat(
    model: ModelOption = "models:/chatloom@champion",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one answer, at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Talk to a model; every line is a message, /reset forgets the conversation, /exit ends it."""
    with input_errors():
        if top_p == 0:
            raise InputError("--top-p 0 leaves no token to choose: use --temperature 0 for the likeliest one")
        from chatloom.registry.resolve import resolve

        engine = _load(resolve(model).path, device)
        from chatloom.serving.prompts import Message

        opening = [Message("system", system)] if system is not None else []
        conversation = list(opening)
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                conversation = list(opening)
                continue
            asked = [*conversation, Message("user", line)]
            try:
                answer = _answer(engine, asked, temperature, top_p, max_tokens, seed)
            except InputError as error:  # a conversation that grew too long is no reason to leave
                typer.echo(f"{error} (or /reset)", err=True)
                continue
            conversation = [*asked, Message("assistant", answer)]


@app.command("import-colossalchat")
def import_colossalchat(
    data: Annotated[
        list[Path] | None,
        typer.Argument(help="Its data: .jsonl, .json, prompts.csv, or the folders jsonl/ and arrow/ of prepared data."),
    ] = None,
    out: Annotated[Path, typer.Option(help="New folder for the rows, the chat template and the preset.")] = Path(
        "data/own/colossalchat"
    ),
    template: Annotated[Path | None, typer.Option(help="Its conversation template, a JSON file.")] = None,
    base_model: Annotated[
        Path | None, typer.Option(help="Its --pretrain: a checkpoint folder, with the tokenizer the data was made by.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Its --lora_config, a JSON file.")] = None,
    license: Annotated[str, typer.Option(help="Licence of the data, kept in the lineage of every model.")] = "unknown",
) -> None:
    """Turn ColossalChat's data, conversation template and LoRA config into rows, a chat template and a preset."""
    from chatloom.colossalchat.importer import import_colossalchat as run

    with input_errors():
        report = run(data or [], out, template=template, base_model=base_model, lora=lora, license=license)
    for kind, rows in report.rows.items():
        typer.echo(f"{out / kind}.jsonl: {rows} rows")
    for reason, found in report.drops.report().items():
        typer.echo(f"left out, {reason}: {found['rows']} rows, as {found['examples'][0]}", err=True)
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{report.preset}: copy it to params/colossalchat.yaml, then: make repro PRESET=colossalchat")


@app.command("plan")
def plan_training(
    model: Annotated[str, typer.Option(help="A known name (llama-7b), a config.json, or a folder with one.")],
    stage: Annotated[Literal["sft", "reward", "ppo"], typer.Option(help="Which training.")],
    gpus: Annotated[str, typer.Option(help="How many of which: 4x80GB, 8xh100-80gb.")],
    params: Annotated[
        Path | None,
        typer.Option(help="Preset whose values hold where no option is given; params/MODEL.yaml where there is one."),
    ] = None,
    strategy: Annotated[Strategy | None, typer.Option(help="parallel.strategy.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a microbatch on one GPU.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Microbatches of a step.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a row.")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Compute activations again in the backward pass.")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=0, help="Rank of adapters; 0 trains every weight.")] = None,
    base_bits: Annotated[
        Literal["4", "16"] | None, typer.Option(help="Of the frozen weights under adapters (lora.base_bits).")
    ] = None,
    placement: Annotated[
        Literal["resident", "offload"] | None, typer.Option(help="PPO's scoring models while the others learn.")
    ] = None,
    tensor: Annotated[int | None, typer.Option(min=1, help="Parts of each layer (colossalai_hybrid).")] = None,
    pipeline: Annotated[int | None, typer.Option(min=1, help="Parts of the stack (colossalai_hybrid).")] = None,
) -> None:
    """Say what a training will need: memory by kind, time and cost; and what to change where it does not fit."""
    options = {
        "strategy": strategy,
        "batch": batch,
        "accumulation": accumulation,
        "seq": seq,
        "checkpointing": checkpointing,
        "lora_rank": lora_rank,
        "base_bits": int(base_bits) if base_bits is not None else None,
        "placement": placement,
        "tensor": tensor,
        "pipeline": pipeline,
    }
    with input_errors():
        from chatloom.config import load_params, load_preset, validate_params
        from chatloom.parallel.hardware import load_hardware
        from chatloom.parallel.plan import describe, job_of, largest_batch, plan, ways_to_fit
        from chatloom.parallel.shapes import Shape

        own = Path("params", f"{model}.yaml")
        preset = params or (own if own.is_file() else None)
        values = validate_params(load_preset(preset), str(preset)) if preset else load_params()
        shape, hardware = Shape.named(model), load_hardware()
        count, gpu = hardware.parse_gpus(gpus)
        given = {name: value for name, value in options.items() if value is not None}
        job = job_of(values, stage, count, given)
        made = plan(shape, job, gpu, hardware)
        ways = [] if made.fits else ways_to_fit(shape, job, gpu, hardware, values.train_sft.lora)
        typer.echo(describe(made, model, largest_batch(shape, job, gpu, hardware), ways))


@app.command("import-gptq")
def import_gptq(
    source: Annotated[Path, typer.Argument(help="Its folder, or one .safetensors file of GPTQ or AutoGPTQ.")],
    out: Annotated[Path, typer.Argument(help="New folder, for `chatloom serve --model`.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model that was quantized: config.json and tokenizer.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file; the tokenizer's own without it.")] = None,
    stop_token: Annotated[
        list[str] | None, typer.Option(help="Ends an answer; repeatable. The tokenizer's EOS without it.")
    ] = None,
    pad_token: Annotated[
        str | None, typer.Option(help="The tokenizer's own, or its unknown token, without it.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Where the checkpoint does not say.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Where the checkpoint does not say; -1: all inputs.")] = None,
    format: Annotated[
        Literal["gptq", "gptq_v2"] | None, typer.Option(help="gptq (AutoGPTQ) stores zeros less one, gptq_v2 does not.")
    ] = None,
) -> None:
    """Check a GPTQ checkpoint of another project and make it ready to be served."""
    from chatloom.models.gptq_import import Chat
    from chatloom.models.gptq_import import import_gptq as run

    given = {"bits": bits, "group_size": group_size, "checkpoint_format": format}
    settings = {key: value for key, value in given.items() if value is not None}
    with input_errors():
        chat = Chat(chat_template, stop_token or (), pad_token)
        imported = run(source, out, chat, base=base, settings=settings)
    checkpoint = imported.checkpoint
    typer.echo(
        f"{out}: {imported.num_layers} layers of {checkpoint.bits} bits, group size {checkpoint.group_size or 'all'}, "
        f"format {checkpoint.format}; chatloom serve --model {out}"
    )


def _load(path: Path, device: str) -> Engine:
    # GPTQModel writes its banner to stdout, where the answers belong.
    with redirect_stdout(sys.stderr):
        from chatloom.serving.engine import Engine

        return Engine(path, device=device)


def _lines() -> Iterator[str]:
    """Messages typed or piped in, without the empty ones; Ctrl-C and the end of the input end them."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            typer.echo("> ", nl=False)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not {error.encoding} text: convert it first") from error
        if not line:
            if interactive:
                typer.echo()
            return
        if text := line.strip():
            yield text


def _answer(
    engine: Engine,
    messages: list[Message],
    temperature: float,
    top_p: float,
    max_tokens: int | None,
    seed: int | None,
) -> str:
    """Print the answer as it comes; Ctrl-C ends it there."""
    from chatloom.models.sampling import Sampling

    prompt_ids = engine.prompts.encode(messages)
    sampling = Sampling(engine.prompts.room(prompt_ids, max_tokens), temperature, top_p)
    generation = engine.generate(prompt_ids, sampling, seed=seed)
    parts: list[str] = []
    try:
        for delta in generation:
            parts.append(delta)
            typer.echo(delta, nl=False)
    except KeyboardInterrupt:
        generation.close()
    typer.echo()
    return "".join(parts)


if __name__ == "__main__":
    app()
