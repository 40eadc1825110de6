"""What the server adds to the time to a first token: the same prompts given to the batch and over HTTP, in turn."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import uvicorn

from bench.load import ask
from chatloom.models.sampling import Sampling
from chatloom.serving.api import create_app
from chatloom.serving.batches import NativeBatch, Request
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options
from chatloom.serving.prompts import Message


@dataclass(frozen=True, kw_only=True)
class Job:
    checkpoint: str
    prompts: list[str]


@dataclass(frozen=True)
class Seen:
    """Seconds to the first token of each prompt."""

    direct: list[float]
    served: list[float]


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    engine = Engine(Path(job.checkpoint), device="cpu")
    batch = NativeBatch(engine.chat_model, 1)
    options = Options(batch_size=1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(engine, "model", {}, options=options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            seen = asyncio.run(_measure(engine, batch, job.prompts, f"http://127.0.0.1:{listening.getsockname()[1]}"))
        finally:
            server.should_exit = True
            thread.join()
    print(json.dumps(asdict(seen)))


async def _measure(engine: Engine, batch: NativeBatch, prompts: list[str], address: str) -> Seen:
    url = f"{address}/v1/chat/completions"
    direct: list[float] = []
    served: list[float] = []
    async with httpx.AsyncClient(timeout=60) as http:
        for number, prompt in enumerate([*prompts[:2], *prompts]):  # the first two warm up
            body = {
                "model": "model",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 1,
                "temperature": 0,
                "stream": True,
            }
            reply = await ask(http, url, body)
            seconds = first_token(engine, batch, prompt)
            # A first token that is half a character or ends the answer shows no text: the end comes with it.
            if number >= 2:
                served.append(reply.seconds if reply.first_seconds is None else reply.first_seconds)
                direct.append(seconds)
    return Seen(direct, served)


def first_token(engine: Engine, batch: NativeBatch, prompt: str) -> float:
    """Seconds that the batch takes for it, with nothing around it."""
    started = time.perf_counter()
    prompt_ids = engine.prompts.encode([Message("user", prompt)])
    batch.add(0, Request(prompt_ids, Sampling(1, temperature=0.0), seed=0))
    batch.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
