"""`POST /v1/feedback`: what people say of answers, as lines that `raw_data` reads (see `chatloom.data.feedback`)."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from chatloom.data.feedback import COMPARED, Rating
from chatloom.files import append_line
from chatloom.serving.errors import RequestError
from chatloom.serving.keys import Holder

log = logging.getLogger(__name__)

FILE = "feedback.jsonl"
"""What people said of any version: a line names its own."""


# A string with a limit must also be one that UTF-8 can hold; JSON can spell half of a character.
Words = Annotated[str, StringConstraints(max_length=200_000, pattern=r"\S")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Words


class OtherAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    answer: Label
    response: Words
    model: Label


class Feedback(BaseModel):
    """Body of POST /v1/feedback: one answer, or two to the same prompt, and what somebody says of them."""

    model_config = ConfigDict(extra="forbid")

    rating: Rating
    """A thumb `up` or `down`; `better` than `other`, or a `tie`; `none` takes back what was said."""
    answer: Label
    """The `id` that the server gave the answer."""
    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    """The conversation up to the answer, as it was sent."""
    response: Words
    model: Label
    """The `system_fingerprint` of the answer: name and version of the model that gave it."""
    other: OtherAnswer | None = None
    comment: Annotated[str, StringConstraints(max_length=4000, strip_whitespace=True)] = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("messages has to end with the user's turn that was answered")
        if self.rating in COMPARED and self.other is None:
            raise ValueError(f"rating {self.rating} needs the other answer")
        if self.rating in ("up", "down") and self.other is not None:
            raise ValueError(f"rating {self.rating} is of one answer: leave other out")
        if self.other is not None and self.other.answer == self.answer:
            raise ValueError("other is the same answer")
        return self


def add_feedback(app: FastAPI, folder: Path, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the route; what is said goes to `folder`.

    Args:
        responses: what the OpenAPI document says of refusals.
    """
    path = folder / FILE

    @app.post("/v1/feedback", status_code=201, responses=responses)
    def feedback(said: Feedback, request: Request) -> dict[str, str]:
        """Keep what somebody says of an answer, or of two."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {**said.model_dump(exclude_none=True), "annotator": _key_name(request), "at": at}
        try:
            append_line(path, line)
        except OSError as error:
            log.error("%s: what somebody said of an answer is lost: %s", path, error)
            reason = error.strerror or type(error).__name__
            raise RequestError(f"the feedback could not be kept: {reason}", status=503, code="not_kept") from error
        return {"object": "feedback", "answer": said.answer, "rating": said.rating, "at": at}


def _key_name(request: Request) -> str | None:
    """Of the API key that the request came with; None where the server asks for none."""
    holder: Holder | None = request.scope["state"].get("holder")
    return holder.key.name if holder is not None else None
