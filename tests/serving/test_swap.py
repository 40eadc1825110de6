"""Versions that come and go beside each other, with and without a registry."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest

from chatloom.errors import InputError
from chatloom.models.checkpoint import ChatModel
from chatloom.registry.hashes import dvc_md5
from chatloom.registry.register import AGENT
from chatloom.registry.resolve import ARTIFACT, Resolved, resolve
from chatloom.serving import swap
from chatloom.serving.api import Watch, create_app
from chatloom.serving.engine import Engine
from chatloom.serving.loading import make_served, native_model, open_model, opener, require_registered_bytes
from chatloom.serving.metrics import Metrics
from chatloom.serving.options import Options
from chatloom.serving.served import Served, Slot
from chatloom.serving.swap import Watcher
from tests.loopback import poll, running
from tests.mlflow_server import MlflowServer, own_experiment

NAME = "tiny-chat"
BODY: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "count"}], "temperature": 0}
COUNTED = "one two three four five six"
CHAT = "/v1/chat/completions"


def damaged(source: Path, folder: Path, harm: Callable[[Path], object]) -> Path:
    """A copy of a checkpoint with its weights harmed."""
    shutil.copytree(source, folder)
    harm(folder / "model.safetensors")
    return folder


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x01  # of a fraction: the model answers as before, and only a hash can tell
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


# --- one swap after the other, the registry played by a variable ---


@pytest.fixture
def make(parrot: Engine) -> Callable[[str], Served]:
    options = Options(batch_size=2)
    return lambda version: make_served(native_model(parrot, options), NAME, version, {}, options)


def watch_it(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[str], Served],
    test: Callable[[Watcher, Slot, dict[str, Any]], Any],
    open_served: Callable[[Resolved], Served] | None = None,
) -> None:
    """Run `test` with a watcher; `registry["version"]` is what the alias means, or the error of who asks."""
    registry: dict[str, Any] = {"version": "1"}

    def current_version(_: str) -> str:
        if isinstance(registry["version"], Exception):
            raise registry["version"]
        return str(registry["version"])

    def resolved(uri: str, into: Path) -> Resolved:
        assert into.is_dir()
        return Resolved(into, NAME, current_version(uri), {})

    monkeypatch.setattr(swap, "current_version", current_version)
    monkeypatch.setattr(swap, "resolve", resolved)

    async def run() -> None:
        slot = Slot(make("1"))
        slot.current.scheduler.start()
        watcher = Watcher(
            "models:/x@champion", open_served or (lambda found: make(str(found.version))), slot, Metrics(slot)
        )
        try:
            async with asyncio.timeout(60):
                await test(watcher, slot, registry)
        finally:
            await watcher.close()
            await slot.current.scheduler.close()

    asyncio.run(run())


def test_an_old_version_ends_with_its_last_request(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    async def test(watcher: Watcher, slot: Slot, registry: dict[str, Any]) -> None:
        await watcher.look()
        old = slot.current
        assert old.version == "1"
        old.enter()
        registry["version"] = "2"
        await watcher.look()
        assert slot.current.version == "2"
        assert old.scheduler.alive  # somebody has it still
        assert slot.current.scheduler.alive
        old.leave()
        while old.scheduler.alive:
            await asyncio.sleep(0)
        registry["version"] = "1"  # a rollback
        await watcher.look()
        assert slot.current.version == "1"
        assert slot.current is not old

    watch_it(monkeypatch, make, test)


@pytest.mark.parametrize("error", [InputError("damaged"), RuntimeError("size mismatch"), MemoryError()])
def test_a_version_that_fails_is_refused_once(monkeypatch: pytest.MonkeyPatch, make: Any, error: Exception) -> None:
    tried: list[str | None] = []

    def open_served(resolved: Resolved) -> Served:
        tried.append(resolved.version)
        if resolved.version == "2":
            raise error
        return make(str(resolved.version))  # type: ignore[no-any-return]

    async def test(watcher: Watcher, slot: Slot, registry: dict[str, Any]) -> None:
        first = slot.current
        registry["version"] = "2"
        for _ in range(3):
            await watcher.look()
        assert slot.current is first
        assert tried == ["2"]
        registry["version"] = "3"
        await watcher.look()
        registry["version"] = "2"  # after another one it gets a second chance
        await watcher.look()
        assert tried == ["2", "3", "2"]
        assert slot.current.version == "3"

    watch_it(monkeypatch, make, test, open_served)


def test_a_registry_that_is_down(monkeypatch: pytest.MonkeyPatch, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def test(watcher: Watcher, slot: Slot, registry: dict[str, Any]) -> None:
        first = slot.current
        registry["version"] = InputError("the registry did not answer")
        for _ in range(3):
            await watcher.look()
        assert slot.current is first
        assert sum("did not answer" in record.message for record in caplog.records) == 1
        registry["version"] = "2"
        await watcher.look()
        assert slot.current.version == "2"

    watch_it(monkeypatch, make, test)


# --- what makes a version unfit ---


def test_bytes_that_are_not_those_registered(parrot_path: Path, tmp_path: Path) -> None:
    tags = {"dvc.model": str(dvc_md5(parrot_path))}
    require_registered_bytes(Resolved(parrot_path, NAME, "1", tags))
    require_registered_bytes(Resolved(parrot_path, NAME, None, {}))
    flipped = damaged(parrot_path, tmp_path / "flipped", flip_a_byte)
    with pytest.raises(InputError, match="version 1 was registered with"):
        require_registered_bytes(Resolved(flipped, NAME, "1", tags))


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_shard_that_is_corrupt_or_missing(parrot_path: Path, tmp_path: Path, harm: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        open_model(damaged(parrot_path, tmp_path / "model", harm), "cpu", Options())


def test_a_pickle_is_not_read(parrot_path: Path, tmp_path: Path) -> None:
    folder = damaged(parrot_path, tmp_path / "model", lambda file: file.rename(file.with_name("pytorch_model.bin")))
    with pytest.raises(InputError, match="cannot be loaded"):
        open_model(folder, "cpu", Options())


def test_weights_that_are_no_numbers(chat: ChatModel, parrot: Engine) -> None:
    chat.model.model.norm.weight.data.fill_(float("nan"))
    spoilt = Engine.__new__(Engine)
    spoilt.chat_model, spoilt.prompts = chat, parrot.prompts
    with pytest.raises(InputError, match="the self-check: the model's probabilities are not numbers"):
        make_served(native_model(spoilt, Options(batch_size=1)), NAME, "1", {}, Options(batch_size=1))


# --- with a real registry, under load ---


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[MlflowServer]:
    """A MLflow server of its own, which is MLflow's store here."""
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", f"{tmp_path}/files"]
    server = MlflowServer(tmp_path, *store)
    server.up()
    try:
        with own_experiment(server.uri):
            yield server
    finally:
        server.down()


def put(path: Path, registered_hash: str) -> str:
    """A new version, as the stage `register` makes it but for what is of no use here."""
    with mlflow.start_run():
        logged = mlflow.pyfunc.log_model(
            name="chat", python_model=str(AGENT), artifacts={ARTIFACT: str(path)}, pip_requirements=["mlflow"]
        )
    return str(mlflow.register_model(logged.model_uri, NAME, tags={"dvc.model": registered_hash}).version)


@pytest.mark.smoke
def test_a_swap_and_a_rollback_under_load(registry: MlflowServer, parrot_path: Path, tmp_path: Path) -> None:
    """No request fails while versions change, one is damaged, and the registry dies."""
    good = str(dvc_md5(parrot_path))
    first, second = put(parrot_path, good), put(parrot_path, good)
    bad = put(damaged(parrot_path, tmp_path / "flipped", flip_a_byte), good)
    client, uri = mlflow.MlflowClient(), f"models:/{NAME}@champion"
    client.set_registered_model_alias(NAME, "champion", first)
    options = Options(batch_size=4, watch_seconds=0.1)
    resolved = resolve(uri)
    app = create_app(
        open_model(resolved.path, "cpu", options),
        resolved.name,
        resolved.tags,
        version=resolved.version,
        options=options,
        watch=Watch(uri, opener("cpu", options)),
    )
    answers: Counter[str] = Counter()
    failures: list[str] = []
    over = threading.Event()

    def load(address: str, stream: bool) -> None:
        with httpx.Client(timeout=60) as http:
            while not over.is_set():
                response = http.post(f"{address}{CHAT}", json=BODY | {"stream": stream})
                whole = response.text.endswith("data: [DONE]\n\n") if stream else COUNTED in response.text
                if response.status_code != 200 or not whole:
                    failures.append(response.text)
                for version in (first, second, bad):
                    answers[version] += f'"{NAME}/{version}"' in response.text

    def metric(address: str, name: str) -> float:
        lines = httpx.get(f"{address}/metrics", timeout=30).text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    with running(app) as address, ThreadPoolExecutor(6) as pool:
        running_load = [pool.submit(load, address, bool(number % 2)) for number in range(6)]
        try:
            for alias, now in ((second, second), (bad, second), (first, first), (second, second)):
                client.set_registered_model_alias(NAME, "champion", alias)
                if alias == bad:
                    poll(lambda: metric(address, 'chatloom_swaps_total{result="refused"}') == 1, seconds=120)
                poll(lambda now=now: httpx.get(f"{address}/ready", timeout=30).json()["version"] == now, seconds=120)  # type: ignore[misc]
                so_far = answers[now]
                poll(lambda now=now, so_far=so_far: answers[now] > so_far + 5, seconds=60)  # type: ignore[misc]
            registry.down()
            poll(lambda: metric(address, "chatloom_registry_up ") == 0, seconds=240)
            so_far = answers[second]
            poll(lambda: answers[second] > so_far + 5, seconds=60)
        finally:
            over.set()
        for each in running_load:
            each.result(timeout=60)
    assert failures == []
    assert answers[bad] == 0
    assert answers[first] > 5
    assert answers[second] > 10
