"""Child processes that serve: started with a log of their own, asked for their health, ended with all below them."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from tasks.processes import end_tree

SECONDS_TO_START, SECONDS_BETWEEN_LOOKS = 120.0, 0.3
LINES_OF_A_LOG = 20
MISSES = 3
"""Times in a row that a server may not answer before it is started again."""
SECONDS_TO_TRUST = 60.0
"""After which earlier failures of a server that answers are forgotten."""
LONGEST_PAUSE = 60.0


class ServerFailed(RuntimeError):
    """A server did not start, or ended."""


class Server:
    """A child process, `python -m` something, whose output goes to a file `<name>.log`."""

    def __init__(
        self, name: str, command: list[str], root: Path, environment: Mapping[str, str], logs: Path = Path(".state/ui")
    ) -> None:
        self.name = name
        self.log = root / logs / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # Ctrl-C reaches us alone, so that we end them in the right order.
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, url: str) -> None:
        """Return when `url` answers."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(url):
            self.check()
            if time.monotonic() > deadline:
                self.fail(f"did not answer at {url} within {SECONDS_TO_START:.0f} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def finish(self) -> None:
        """Return when the process has ended well."""
        if status := self.process.wait(SECONDS_TO_START):
            self.fail(f"ended with status {status}")

    def check(self) -> None:
        if (status := self.process.poll()) is not None:
            self.fail(f"ended with status {status}")

    def fail(self, what: str) -> NoReturn:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_LOG:]
        raise ServerFailed("\n".join([f"{self.name} {what}; the end of {self.log}:", *lines]))

    def end(self) -> None:
        if self.process.poll() is None:
            end_tree(self.process.pid)
        self.process.wait()


def watch(
    start: Callable[[], Server], health: str, say: Callable[[str], None], *, patience: int, pause: float = 5.0
) -> NoReturn:
    """Keep a server up: start it, ask for its health, and start it again where it ends or does not answer.

    Args:
        health: address that answers while the server is well.
        patience: failures in a row after which it is given up.
        pause: seconds between two looks; the wait before a new start begins with it and doubles.

    Raises:
        ServerFailed: where it was given up.
    """
    failures = 0
    while True:
        server = start()
        try:
            server.wait_for(health)
            say(f"{server.name} answers at {health}")
            began, missed = time.monotonic(), 0
            while missed < MISSES:
                time.sleep(pause)
                server.check()
                missed = 0 if answers(health) else missed + 1
                if time.monotonic() - began > SECONDS_TO_TRUST:
                    failures = 0
            server.fail(f"did not answer {MISSES} times in a row")
        except ServerFailed as error:
            failures += 1
            if failures > patience:
                raise
            say(f"{error}\n{server.name} is started again, failure {failures} of {patience} that are borne")
        finally:
            server.end()
        time.sleep(min(pause * 2 ** (failures - 1), LONGEST_PAUSE))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
