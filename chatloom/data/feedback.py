"""What people said of answers on the chat page, as rows to learn from.

The page's server writes a line for everything said: a thumb `up` or `down`, one answer `better` than an `other`, a
`tie` of the two, or `none`, which takes back what was said. Lines are only ever added, and a row depends on the lines
before it and on whether it was taken back: what else is said tomorrow leaves the rows of today as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from chatloom.data.drops import RowFault
from chatloom.data.schemas import Fields
from chatloom.data.sources import Item

Rating = Literal["up", "down", "none", "better", "tie"]
RATINGS: tuple[Rating, ...] = get_args(Rating)
COMPARED: tuple[Rating, ...] = ("better", "tie")
"""Ratings of two answers to one prompt."""
OPPOSITE: dict[Rating, Rating] = {"up": "down", "down": "up"}


@dataclass(frozen=True)
class _Said:
    rating: Rating
    subject: str
    """Equal for everything that one annotator said of one answer, or of one pair of answers."""
    prompt: str
    response: Any
    other: Any
    fields: Fields

    @property
    def row(self) -> dict[str, Any]:
        """A `ranked` row without its responses."""
        kept = {key: self.fields[key] for key in ("id", "lang") if key in self.fields}
        return {**kept, "messages": self.fields.get("messages")}


def learn(items: Iterable[Item]) -> Iterator[Item]:
    """The lines of one file of feedback as rows of the format `ranked`, each at its line, or why there is none.

    - `better` is a pair.
    - A thumb makes a pair with the latest opposite one on the same prompt that is still up to date.
    - A thumb up without one is an instruction with its answer. A thumb down without one says nothing to learn from.
    - What an annotator says of an answer replaces what the same one said of it before.
    """
    lines = [(line, _read(fields)) for line, fields in items]
    last = {said.subject: line for line, said in lines if isinstance(said, _Said)}
    thumbs: dict[tuple[str, Rating], list[Any]] = {}
    for line, said in lines:
        if isinstance(said, RowFault):
            yield line, said
        elif last[said.subject] != line:
            yield line, RowFault("replaced", f"line {last[said.subject]} says something else of the same answer")
        else:
            yield line, _row(said, thumbs)


def _row(said: _Said, thumbs: dict[tuple[str, Rating], list[Any]]) -> Fields | RowFault:
    """`thumbs` has the answers of each prompt by their rating so far; that of `said` is added."""
    if said.rating == "none":
        return RowFault("taken_back", "what was said of this answer was taken back")
    if said.rating == "tie":
        return RowFault("no_preference", "neither of the two answers is better")
    if said.rating == "better":
        return {**said.row, "responses": [said.response, said.other]}
    thumbs.setdefault((said.prompt, said.rating), []).append(said.response)
    opposite = thumbs.get((said.prompt, OPPOSITE[said.rating]), [])
    against = next((response for response in reversed(opposite) if response != said.response), None)
    if said.rating == "up":
        return {**said.row, "responses": [said.response] if against is None else [said.response, against]}
    if against is None:
        return RowFault("no_preference", "a thumb down, and no thumb up on another answer to this prompt before it")
    return {**said.row, "responses": [against, said.response]}


def _read(fields: Fields | RowFault) -> _Said | RowFault:
    if isinstance(fields, RowFault):
        return fields
    rating = fields.get("rating")
    if rating not in RATINGS:
        shown = repr(rating).encode(errors="backslashreplace").decode()
        return RowFault("unknown_rating", f"rating is {shown}, expected one of {', '.join(RATINGS)}")
    other = fields.get("other")
    if rating in COMPARED and not isinstance(other, dict):
        return RowFault("missing_key", f"no key 'other', the answer that this one is compared with, at rating {rating}")
    compared = other if isinstance(other, dict) else {}
    answers = sorted(repr(answer) for answer in (fields.get("answer"), compared.get("answer")))
    return _Said(
        rating=rating,
        subject=repr([fields.get("annotator"), answers]),
        prompt=repr(fields.get("messages")),
        response=fields.get("response"),
        other=compared.get("response"),
        fields=fields,
    )
