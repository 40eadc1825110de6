"""API keys: a file with the hash of each, and how much its holder may ask for."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from chatloom.errors import InputError
from chatloom.files import atomic_file

log = logging.getLogger(__name__)

PREFIX = "cl-"


class Key(BaseModel):
    """What the file keeps of a key: never the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=60)
    sha256: str
    """Keys are 256 random bits: nobody finds one by trying, so that a fast hash without salt is enough."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and answers together."""
    created: str


KEYS = TypeAdapter(list[Key])


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """
    Raises:
        InputError: where the file cannot be read, is not valid, or names a key twice.
    """
    try:
        keys = KEYS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path}: cannot be read as API keys: {error}; `chatloom keys add` writes such files"
        ) from error
    if len({key.name for key in keys}) < len(keys):
        raise InputError(f"{path}: two keys have one name; remove one")
    return keys


def add_key(path: Path, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> str:
    """Make a key, keep its hash in `path`, and return it: it cannot be had a second time.

    Raises:
        InputError: where the name is taken, or the file is no file of keys.
    """
    keys = read_keys(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise InputError(f"{path} has a key called {name!r} already: remove that first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(
            name=name,
            sha256=hash_key(secret),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        raise InputError(f"the key cannot be made: {error.errors()[0]['msg']}") from error
    _write_keys(path, [*keys, key])
    return secret


def remove_key(path: Path, name: str) -> None:
    """
    Raises:
        InputError: where there is no such key.
    """
    keys = read_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise InputError(f"{path} has no key called {name!r}; it has {', '.join(key.name for key in keys) or 'none'}")
    _write_keys(path, kept)


def _write_keys(path: Path, keys: Sequence[Key]) -> None:
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(KEYS.dump_python(list(keys)), indent=2) + "\n", encoding="utf-8")


class Bucket:
    """So much a minute: what is not used is kept for one minute (a token bucket)."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 where it is."""
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        return max(0.0, (amount - self._level) * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        """Below 0 too: the cost of an answer is known when it is made."""
        self.wait(0)
        self._level -= amount


class Holder:
    """A key with what is left of its rates."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self._requests = Bucket(key.requests_per_minute) if key.requests_per_minute is not None else None
        self._tokens = Bucket(key.tokens_per_minute) if key.tokens_per_minute is not None else None

    def admit(self) -> int:
        """Count a request; seconds to wait before it may be made, 0 where it may."""
        waits = [bucket.wait(1) for bucket in (self._requests, self._tokens) if bucket is not None]
        if wait := max(waits, default=0.0):
            return math.ceil(wait)
        if self._requests is not None:
            self._requests.take(1)
        return 0

    def spend(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)


class KeyRing:
    """The keys of a file, read again when it changes: a key that is removed opens nothing from then on."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: as `read_keys`.
        """
        self._path = path
        self._holders: dict[str, Holder] = {}
        self._stamp: tuple[int, int] | None = None
        self._load(read_keys(path))

    def find(self, secret: str) -> Holder | None:
        self._refresh()
        return self._holders.get(hash_key(secret))

    def _refresh(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load(read_keys(self._path))
        except InputError as error:
            log.error("the keys stay as they were: %s", error)

    def _load(self, keys: Sequence[Key]) -> None:
        self._stamp = self._stamp_now()
        known = self._holders
        # A key that is as it was keeps what is left of its rates.
        self._holders = {
            key.sha256: holder if (holder := known.get(key.sha256)) is not None and holder.key == key else Holder(key)
            for key in keys
        }

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino
