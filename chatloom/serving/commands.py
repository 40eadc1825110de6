"""`chatloom serve` and `chatloom keys`."""

from __future__ import annotations

import ipaddress
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer

from chatloom.serving.options import EngineKind, Options, Overflow
from chatloom.terminal import ModelOption, input_errors

app = typer.Typer()
keys_app = typer.Typer(help="API keys of `chatloom serve --keys`.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

DEFAULT = Options()
ENGINE, LIMITS, SAFETY = "Engine", "Limits", "Safety"


@app.command()
def serve(
    model: ModelOption = "models:/chatloom@champion",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks at where the alias points; 0 never swaps.")
    ] = DEFAULT.watch_seconds,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="auto takes CUDA where there is one.", rich_help_panel=ENGINE),
    ] = "auto",
    engine: Annotated[
        EngineKind, typer.Option(help="vllm needs a CUDA device.", rich_help_panel=ENGINE)
    ] = DEFAULT.engine,
    gpu_memory: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the device that vLLM takes.", rich_help_panel=ENGINE)
    ] = DEFAULT.gpu_memory_utilization,
    batch: Annotated[
        int, typer.Option(min=1, help="Answers made at once.", rich_help_panel=ENGINE)
    ] = DEFAULT.batch_size,
    queue: Annotated[
        int, typer.Option(min=0, help="Answers that may wait; more get 429.", rich_help_panel=LIMITS)
    ] = DEFAULT.queue,
    context: Annotated[
        int | None,
        typer.Option(
            min=64, help="Tokens of a conversation with its answer; the model's own if none.", rich_help_panel=LIMITS
        ),
    ] = DEFAULT.context,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one answer; the context if none.", rich_help_panel=LIMITS)
    ] = DEFAULT.max_tokens,
    overflow: Annotated[
        Overflow, typer.Option(help="What becomes of a conversation that is too long.", rich_help_panel=LIMITS)
    ] = DEFAULT.overflow,
    max_body: Annotated[
        int, typer.Option(min=1000, help="Bytes of a request.", rich_help_panel=LIMITS)
    ] = DEFAULT.max_body,
    body_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds that a client has to send one.", rich_help_panel=LIMITS)
    ] = DEFAULT.body_seconds,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of `chatloom keys add`; without it nobody is asked.", rich_help_panel=SAFETY),
    ] = DEFAULT.keys,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may call the server; repeatable. None may, by default.", rich_help_panel=SAFETY
        ),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="File of words that end an answer, one a line.", rich_help_panel=SAFETY)
    ] = DEFAULT.words,
    audit: Annotated[
        Path | None, typer.Option(help="File that gets a JSON line a request.", rich_help_panel=SAFETY)
    ] = DEFAULT.audit,
    audit_bodies: Annotated[
        bool, typer.Option("--audit-bodies", help="Messages and answers too.", rich_help_panel=SAFETY)
    ] = DEFAULT.audit_bodies,
    feedback: Annotated[
        Path, typer.Option(help="Folder for what people say of answers on the page; raw_data can read it.")
    ] = Path("data/own/feedback"),
) -> None:
    """Serve a model: OpenAI's API and a page to talk to it; a version by its alias is swapped when the alias moves."""
    options = Options(
        engine=engine,
        gpu_memory_utilization=gpu_memory,
        batch_size=batch,
        queue=queue,
        context=context,
        max_tokens=max_tokens,
        overflow=overflow,
        max_body=max_body,
        body_seconds=body_seconds,
        keys=keys,
        cors=tuple(cors or ()),
        words=words,
        audit=audit,
        audit_bodies=audit_bodies,
        watch_seconds=watch,
        feedback=feedback,
    )
    # GPTQModel writes its banner to stdout.
    with input_errors(), redirect_stdout(sys.stderr):
        from chatloom.registry.resolve import resolve

        resolved = resolve(model)

        from chatloom.serving.api import Watch, create_app
        from chatloom.serving.loading import open_model, opener, require_registered_bytes

        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
        require_registered_bytes(resolved)
        alias = model.startswith("models:") and "@" in model
        web = create_app(
            open_model(resolved.path, device, options),
            resolved.name,
            resolved.tags,
            version=resolved.version,
            options=options,
            watch=Watch(model, opener(device, options)) if alias else None,
        )
    import uvicorn

    version = f" version {resolved.version}" if resolved.version else ""
    typer.echo(f"Serving {resolved.name}{version}; OpenAI clients take the address below with /v1 behind it", err=True)
    if options.keys is None and not _is_loopback(host):
        typer.echo(f"warning: everybody who reaches {host} may ask: --keys lets in only those with a key", err=True)
    # A client that listens to a long answer does not keep the server from stopping.
    uvicorn.run(web, host=host, port=port, timeout_graceful_shutdown=5, server_header=False)


@keys_app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="File of the keys; made if it is not there.")],
    name: Annotated[str, typer.Argument(help="Whose it is; logs say it.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Of prompts and answers together.")] = None,
) -> None:
    """Make a key and print it, this once: the file has its hash only."""
    from chatloom.serving.keys import add_key

    with input_errors():
        typer.echo(add_key(file, name, requests_per_minute, tokens_per_minute))


@keys_app.command("remove")
def remove(file: Path, name: str) -> None:
    """Take a key away; a server that runs notices with the next request."""
    from chatloom.serving.keys import remove_key

    with input_errors():
        remove_key(file, name)


@keys_app.command("list")
def show(file: Path) -> None:
    """Names, rates and dates."""
    from chatloom.serving.keys import read_keys

    with input_errors():
        for key in read_keys(file):
            rates = [
                f"{rate} {what} a minute"
                for what, rate in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
                if rate is not None
            ]
            typer.echo(f"{key.name}  {', '.join(rates) or 'no limit'}  since {key.created}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
