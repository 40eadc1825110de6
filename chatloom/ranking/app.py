"""The page on which people rank answers: a few routes over `chatloom.data.rankings`, and one static page."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from chatloom.data.rankings import (
    Candidate,
    Ranking,
    agreement,
    append_ranking,
    dense,
    file_stem,
    parse_rankings,
    read_rankings,
)
from chatloom.errors import InputError

PAGE = Path(__file__).with_name("page.html")
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60)]


class Said(BaseModel):
    """What the page sends: ranks in the order in which the page showed the answers."""

    model_config = ConfigDict(extra="forbid")
    annotator: Name
    id: str
    order: list[int]
    """Numbers of the answers, in the order shown."""
    ranks: list[Annotated[int, Field(ge=0)]] | None
    """Of each answer shown, 0 the best; None where all are bad."""
    comment: Annotated[str, StringConstraints(max_length=2000)] = ""


class Desk:
    """Who ranks what next. Everything said is on the disk; what is only held in memory is who looks at what now."""

    def __init__(self, candidates: Sequence[Candidate], folder: Path, overlap: float) -> None:
        self.candidates = {candidate.id: candidate for candidate in candidates}
        self.folder, self._overlap = folder, overlap
        self._lock = threading.Lock()
        self._looking: dict[str, str] = {}
        self._said = {(ranking.annotator, ranking.id): ranking for ranking in read_rankings(folder)}

    @property
    def rankings(self) -> list[Ranking]:
        return list(self._said.values())

    def next(self, annotator: str) -> Candidate | None:
        """A prompt that the annotator has not ranked: a shared one, or one that nobody else has or looks at."""
        with self._lock:
            ranked = {id for _, id in self._said}
            for id, candidate in self.candidates.items():
                if (annotator, id) in self._said:
                    continue
                if not self.shared(id) and (id in ranked or self._looking.get(id, annotator) != annotator):
                    continue
                self._looking[id] = annotator
                return candidate
        return None

    def shared(self, id: str) -> bool:
        """Whether every annotator is to rank the prompt: a share of the prompts, by hash."""
        digest = hashlib.sha256(f"overlap {id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._overlap * 2**64

    def add(self, ranking: Ranking) -> None:
        with self._lock:
            append_ranking(self.folder, ranking)
            self._said[ranking.annotator, ranking.id] = ranking

    def status(self, annotator: str) -> dict[str, Any]:
        with self._lock:
            done = sum(name == annotator for name, _ in self._said)
            others = {id for name, id in self._said if name != annotator}
            left = [id for id in self.candidates if (annotator, id) not in self._said]
            return {
                "done": done,
                "left": sum(self.shared(id) or id not in others for id in left),
                "annotators": sorted({name for name, _ in self._said}),
                "agreement": agreement(list(self._said.values())),
            }


def shown_order(annotator: str, candidate: Candidate) -> list[int]:
    """An order of the answers that tells nothing of them, the same whenever this annotator sees them."""

    def place(number: int) -> bytes:
        return hashlib.sha256(f"{annotator}\0{candidate.id}\0{candidate.responses[number]}".encode()).digest()

    return sorted(range(len(candidate.responses)), key=place)


def create_app(candidates: Sequence[Candidate], folder: Path, *, overlap: float) -> FastAPI:
    """The page and its routes.

    Args:
        folder: where rankings are kept, a file an annotator.
        overlap: share of the prompts that every annotator ranks, so that their agreement can be told.
    """
    desk = Desk(candidates, folder, overlap)
    app = FastAPI(title="Chatloom ranking")

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/api/next")
    def following(annotator: Name) -> dict[str, Any]:
        _same_file(desk, annotator)
        candidate = desk.next(annotator)
        if candidate is None:
            return {"candidate": None, "status": desk.status(annotator)}
        order = shown_order(annotator, candidate)
        shown = {
            "id": candidate.id,
            "lang": candidate.lang,
            "messages": candidate.messages,
            "order": order,
            "responses": [candidate.responses[number] for number in order],
        }
        return {"candidate": shown, "status": desk.status(annotator)}

    @app.post("/api/rankings")
    def say(said: Said) -> dict[str, Any]:
        _same_file(desk, said.annotator)
        candidate = desk.candidates.get(said.id)
        if candidate is None:
            raise HTTPException(404, f"no prompt {said.id!r}: the page is of another set, load it again")
        count = len(candidate.responses)
        if sorted(said.order) != list(range(count)) or (said.ranks is not None and len(said.ranks) != count):
            raise HTTPException(422, f"order and ranks have to name each of the {count} answers once")
        ranks: list[int] = []
        if said.ranks is not None:
            by_answer = dict(zip(said.order, dense(said.ranks), strict=True))
            ranks = [int(by_answer[number]) for number in range(count)]
        desk.add(
            Ranking(
                id=candidate.id,
                lang=candidate.lang,
                messages=candidate.messages,
                responses=candidate.responses,
                sft=candidate.sft,
                ranks=ranks,
                annotator=said.annotator,
                at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                comment=said.comment.strip(),
            )
        )
        return desk.status(said.annotator)

    @app.get("/api/export", response_class=PlainTextResponse)
    def export() -> PlainTextResponse:
        lines = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jsonl"))]
        name = {"Content-Disposition": "attachment; filename=rankings.jsonl"}
        return PlainTextResponse("".join(lines), media_type="application/x-ndjson", headers=name)

    @app.post("/api/import")
    async def take_in(request: Request) -> dict[str, int]:
        try:
            found = parse_rankings((await request.body()).decode("utf-8"), "import")
        except (InputError, UnicodeDecodeError) as error:
            raise HTTPException(422, str(error)) from error
        known = desk.rankings
        new = [ranking for ranking in found if ranking not in known]
        for ranking in new:
            _same_file(desk, ranking.annotator)
            desk.add(ranking)
        return {"imported": len(new), "already_there": len(found) - len(new)}

    return app


def _same_file(desk: Desk, annotator: str) -> None:
    """Two names that would share a file are refused: one would seem to have done the other's work."""
    for other in {ranking.annotator for ranking in desk.rankings} - {annotator}:
        if file_stem(other) == file_stem(annotator):
            raise HTTPException(409, f"{annotator!r} is too like {other!r}, who ranks here too: choose another name")
