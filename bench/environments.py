"""The peers' own virtual environments, built from pinned versions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.parts import OURS
from chatloom.errors import InputError

PINS = Path(__file__).parent / "peers"


def python_of(environment: str, folder: Path) -> Path:
    """The interpreter of an environment, which is built under `folder` where it is not there as pinned.

    Raises:
        InputError: where pip cannot install it.
    """
    if environment == OURS:
        return Path(sys.executable)
    place = folder / environment
    pins = PINS / f"{environment}.txt"
    stamp = place / "pins.txt"
    python = place / "bin" / "python"
    if stamp.is_file() and stamp.read_bytes() == pins.read_bytes():
        return python
    shutil.rmtree(place, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(pins)],
    ):
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise InputError(f"{pins}: {' '.join(command)} failed; see its message above")
    shutil.copyfile(pins, stamp)  # last: what was left half made is made anew
    return python
