"""From a checkpoint to a version that can be served, once it has shown that it can."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from chatloom.errors import InputError
from chatloom.registry.hashes import dvc_md5
from chatloom.registry.lineage import NONE, WEIGHTS_TAG
from chatloom.registry.resolve import Resolved
from chatloom.serving.batches import NativeBatch
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options
from chatloom.serving.scheduler import Scheduler
from chatloom.serving.served import Model, Served, check
from chatloom.serving.vllm_batch import open_vllm


def open_model(path: Path, device: str, options: Options) -> Model:
    """
    Raises:
        InputError: where `path` holds no usable checkpoint, or the engine cannot run here.
    """
    if options.engine == "vllm":
        return open_vllm(path, device, options)
    return native_model(Engine(path, device=device, context=options.context), options)


def native_model(engine: Engine, options: Options) -> Model:
    chat = engine.chat_model
    return Model(engine.prompts, chat.stop_ids, lambda: NativeBatch(chat, options.batch_size))


def make_served(model: Model, name: str, version: str | None, lineage: Mapping[str, str], options: Options) -> Served:
    """
    Raises:
        InputError: where the model fails its self-check.
    """
    batch = model.open_batch()
    check(model.prompts, batch)
    scheduler = Scheduler(batch, model.open_batch, size=options.batch_size, queue=options.queue)
    return Served(name, version, lineage, model, scheduler, int(time.time()))


def opener(device: str, options: Options) -> Callable[[Resolved], Served]:
    """What makes a version that the registry gave ready to be served.

    Raises:
        InputError: where its files are not those that were registered, cannot be loaded, or fail the self-check.
    """

    def open_served(resolved: Resolved) -> Served:
        require_registered_bytes(resolved)
        model = open_model(resolved.path, device, options)
        return make_served(model, resolved.name, resolved.version, resolved.tags, options)

    return open_served


def require_registered_bytes(resolved: Resolved) -> None:
    """Raise where the checkpoint is not, byte for byte, the one that was registered: safetensors have no checksum."""
    registered = resolved.tags.get(WEIGHTS_TAG, NONE)
    if registered != NONE and (found := dvc_md5(resolved.path)) != registered:
        raise InputError(
            f"{resolved.path}: its files have the hash {found}, version {resolved.version} was registered with "
            f"{registered}: a file is damaged or missing; look with `chatloom verify`, or register it again"
        )
