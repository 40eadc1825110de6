"""The table of hardware, `hardware.yaml`, as frozen types."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from chatloom.config import Fraction, Positive, Rate, Section, read_yaml
from chatloom.errors import InputError

TABLE = Path(__file__).with_name("hardware.yaml")
GIB = 2**30


class Gpu(Section):
    """One card. GB/s are 1e9 bytes a second, one way."""

    memory_gb: Positive
    usable_gib: Rate
    tflops: Rate
    memory_gb_s: Rate
    link_gb_s: Rate
    host_link_gb_s: Rate
    host_gib: Rate
    usd_per_hour: Rate


class Node(Section):
    gpus: Positive
    network_gb_s: Rate
    host_memory_gb_s: Rate


class Reached(Section):
    """Shares of the rated speed."""

    compute: Fraction
    memory: Fraction
    links: Fraction


class Hardware(Section):
    gpus: dict[str, Gpu]
    node: Node
    reserve_gib: Rate
    reached: Reached

    def room(self, gpu: str) -> int:
        """Bytes that tensors may take on one card."""
        return round((self.gpus[gpu].usable_gib - self.reserve_gib) * GIB)

    def host_room(self, gpu: str) -> int:
        """Bytes of host memory for one card."""
        return round(self.gpus[gpu].host_gib * GIB)

    def parse_gpus(self, text: str) -> tuple[int, str]:
        """`4x80GB` or `8xh100-80gb`: how many, and the name of the card.

        Raises:
            InputError: where it says neither, or names no card of the table.
        """
        known = ", ".join(self.gpus)
        match = re.fullmatch(r"([1-9]\d*)x(.+)", text.strip().lower())
        if match is None:
            raise InputError(f"--gpus {text}: write a number and a card, such as 4x80GB or 8xh100-80gb ({known})")
        count, card = int(match[1]), match[2]
        if card in self.gpus:
            return count, card
        for name, gpu in self.gpus.items():
            if card == f"{gpu.memory_gb}gb":
                return count, name
        raise InputError(f"--gpus {text}: hardware.yaml has no card {match[2]!r}; it has {known}")


def load_hardware(path: Path = TABLE) -> Hardware:
    """Read and check the table.

    Raises:
        InputError: naming the key and its value.
    """
    try:
        return Hardware.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise InputError("\n".join(lines)) from error
