"""The tiny model that the unit tests share."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from chatloom.config import Lora, Optimizer, RandomSource
from chatloom.device import Device
from chatloom.models import attention
from chatloom.models.checkpoint import ChatModel
from chatloom.models.tiny import random_llama

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SOURCE = RandomSource(kind="random", hidden_size=32, num_layers=2, num_heads=4, vocab_size=300, seed=0)
CPU = Device(torch.device("cpu"), torch.float32)


# A shell that starts the tests in the background makes them ignore Ctrl-C, and so every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny tensors gain nothing from threads, and threads that wait for each other lose much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def chat() -> ChatModel:
    """A fresh tiny LLaMA in float32; changes to it stay in the test."""
    model, tokenizer = random_llama(SOURCE)
    model.set_attn_implementation(attention.NAME)
    model.eval()
    tokenizer.chat_template = (ROOT / "data/templates/chatml.jinja").read_text(encoding="utf-8")
    return ChatModel(model, tokenizer, (tokenizer.eos_token_id,), tokenizer.pad_token_id)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a checkpoint folder; do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "base", SOURCE)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with 64 hidden units: layers of 32 and more outputs, as quantized ones of any bits have them."""
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "base", SOURCE.model_copy(update={"hidden_size": 64}))


def make_checkpoint(folder: Path, source: RandomSource) -> Path:
    from chatloom.config import BaseModelParams
    from chatloom.models.base import make_base_model

    template = str(ROOT / "data/templates/chatml.jinja")
    params = BaseModelParams(source=source, pad_token=None, stop_tokens=None, chat_template=template)
    make_base_model(params, torch.float32, folder)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's store that is initialised, which takes a second, and empty: to be copied."""
    import mlflow

    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{store}").search_experiments()
    return store


@pytest.fixture
def lora() -> Lora:
    return Lora(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], layers=None, base_bits=None)


@pytest.fixture
def optimizer() -> Optimizer:
    return Optimizer(lr=1e-3, weight_decay=0.0, adam_eps=1e-8, warmup_steps=0, schedule="constant", max_grad_norm=1e9)


@pytest.fixture
def fake_hub(checkpoint: Path) -> Iterator[str]:
    """A server with the two calls of a hub that a snapshot needs: the file list and the files."""
    commit = "1" * 40

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            path = self.path.split("?")[0]
            file = checkpoint / path.rsplit("/", 1)[-1]
            if path.startswith("/api/models/me/tiny/revision"):
                names = [{"rfilename": item.name} for item in sorted(checkpoint.iterdir())]
                self._send(json.dumps({"id": "me/tiny", "sha": commit, "siblings": names}).encode(), {}, body)
            elif path.startswith("/api/models/me/tiny/tree"):
                entries = [
                    {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": "0" * 40}
                    for item in sorted(checkpoint.iterdir())
                ]
                self._send(json.dumps(entries).encode(), {}, body)
            elif path.startswith("/me/tiny/resolve/") and file.is_file():
                data = file.read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                self._send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, body)
            else:
                self.send_error(404)

        def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in {
                "Content-Length": str(len(data)),
                "Content-Type": "application/json",
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
