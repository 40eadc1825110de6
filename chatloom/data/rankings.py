"""Rankings by people: one JSON line each, in a file an annotator; what they agree on; what becomes of several of them.

A line holds the prompt and the answers that were ranked, so that rankings outlive the model that gave the answers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from chatloom.data.prepared import Message
from chatloom.errors import InputError
from chatloom.files import append_line

CANDIDATES = "candidates.jsonl"
_STRICT = ConfigDict(extra="forbid", strict=True)


@checked_dataclass(frozen=True, config=_STRICT)
class Candidate:
    """A prompt with several answers to rank."""

    id: str
    lang: str
    messages: list[Message]
    responses: list[str]
    sft: str
    """Hash of the model that gave the answers."""


@checked_dataclass(frozen=True, config=_STRICT)
class Ranking:
    """What one annotator said of one prompt's answers."""

    id: str
    lang: str
    messages: list[Message]
    responses: list[str]
    sft: str
    ranks: list[int]
    """Of each response, 0 the best; equal ranks are ties. Empty where all are bad."""
    annotator: str
    at: str
    """When, in UTC, as ISO 8601."""
    comment: str = Field(default="")

    @property
    def all_bad(self) -> bool:
        return not self.ranks


@dataclass(frozen=True)
class Consensus:
    """What the annotators of one prompt said together."""

    ranking: Ranking
    """The last of them, for what they share."""
    ranks: list[int]
    annotators: list[str]
    at: str
    """Of the last one."""


def write_candidates(path: Path, candidates: Iterable[Candidate]) -> None:
    path.write_text("".join(_line(candidate) for candidate in candidates), encoding="utf-8")


def read_candidates(path: Path) -> list[Candidate]:
    """Raises InputError naming file and line where one cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: no answers to rank; run the stage compare with compare.num_prompts above 0")
    adapter = TypeAdapter(Candidate)
    return [candidate for _, candidate in _read(path.read_text(encoding="utf-8"), str(path), adapter)]


def read_rankings(folder: Path) -> list[Ranking]:
    """The rankings in the files of `folder`; where somebody ranked a prompt twice, the later one.

    Raises:
        InputError: naming file and line where one cannot be read.
    """
    found: dict[tuple[str, str], Ranking] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for ranking in parse_rankings(file.read_text(encoding="utf-8"), str(file)):
            key = (ranking.annotator, ranking.id)
            if key not in found or found[key].at <= ranking.at:
                found[key] = ranking
    return list(found.values())


def parse_rankings(text: str, name: str) -> list[Ranking]:
    """Rankings of JSON lines.

    Raises:
        InputError: naming every line that is none.
    """
    rankings = []
    faults = []
    for number, ranking in _read(text, name, TypeAdapter(Ranking)):
        if ranking.ranks and len(ranking.ranks) != len(ranking.responses):
            faults.append(f"{name}:{number}: {len(ranking.ranks)} ranks of {len(ranking.responses)} responses")
        elif not ranking.annotator.strip():
            faults.append(f"{name}:{number}: no annotator")
        rankings.append(ranking)
    if faults:
        raise InputError("\n".join(faults))
    return rankings


def append_ranking(folder: Path, ranking: Ranking) -> None:
    """Add a line to the annotator's file; it is on the disk when this returns."""
    append_line(folder / f"{file_stem(ranking.annotator)}.jsonl", asdict(ranking))


def file_stem(annotator: str) -> str:
    """A file's name for an annotator's: letters and digits of any language stay."""
    name = unicodedata.normalize("NFC", annotator).strip()
    return re.sub(r"[^\w-]", "_", name).strip("_") or "_"


def consensus(rankings: Iterable[Ranking]) -> list[Consensus]:
    """One ranking a prompt, by the mean of what its annotators said; none where most of them say "all bad"."""
    by_prompt: defaultdict[tuple[str, tuple[str, ...]], list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        by_prompt[ranking.id, tuple(ranking.responses)].append(ranking)
    found = []
    for several in by_prompt.values():
        ranked = [ranking for ranking in several if not ranking.all_bad]
        if 2 * len(ranked) < len(several) or not ranked:
            continue
        means = np.mean([dense(ranking.ranks) for ranking in ranked], axis=0)
        last = max(several, key=lambda ranking: ranking.at)
        annotators = sorted({ranking.annotator for ranking in ranked})
        found.append(Consensus(last, dense(means.tolist()), annotators, last.at))
    return found


def dense(ranks: Sequence[float]) -> list[int]:
    """Ranks 0, 1, ... without gaps, in the same order, ties kept."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return [places[rank] for rank in ranks]


def agreement(rankings: Sequence[Ranking]) -> float | None:
    """Krippendorff's alpha (ordinal) over the answers that two annotators or more ranked: 1 is perfect, 0 is chance.

    None where there is none, or all said the same of everything.
    """
    import krippendorff

    annotators = sorted({ranking.annotator for ranking in rankings})
    cells: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for ranking in rankings:
        for number, rank in enumerate(dense(ranking.ranks)):
            cells[ranking.id, number][ranking.annotator] = rank
    shared = [cell for cell in cells.values() if len(cell) > 1]
    if not shared or len({rank for cell in shared for rank in cell.values()}) < 2:
        return None
    said = np.array([[cell.get(annotator, np.nan) for cell in shared] for annotator in annotators], float)
    return float(krippendorff.alpha(reliability_data=said, level_of_measurement="ordinal"))


def _line(value: Any) -> str:
    return json.dumps(asdict(value), ensure_ascii=False) + "\n"


def _read(text: str, name: str, adapter: TypeAdapter[Any]) -> Iterator[tuple[int, Any]]:
    """Values with their lines; a last line that was cut in the middle, by a crash, is left out."""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, adapter.validate_json(line)
        except ValidationError as error:
            if number == len(lines) and error.errors()[0]["type"] == "json_invalid":
                return
            [first, *_] = error.errors()
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{name}:{number}: {where + ': ' if where else ''}{first['msg']}") from error
