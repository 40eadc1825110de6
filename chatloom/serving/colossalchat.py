"""ColossalChat's requests, `POST /generate` and `POST /generate/stream`, for the clients that it left behind.

As its server had them (applications/Chat/inference/server.py of ColossalAI): a history of instructions and responses
in, the last one open; the response as a JSON string, or as events `generate` and, at the end, `end`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from chatloom.serving.calls import Call
from chatloom.serving.scheduler import EngineFailure, Stopped
from chatloom.serving.schema import ChatRequest, Count, RepetitionPenalty, RequestMessage, Temperature, TopP


class Dialogue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instruction: Annotated[str, StringConstraints(min_length=1)]
    response: str = ""


class GenerationRequest(BaseModel):
    """Body of both. A history that is too long loses its oldest turns, as it did there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_new_tokens: Count
    history: Annotated[list[Dialogue], Field(min_length=1)]
    top_k: Count | None = None
    top_p: TopP | None = None
    temperature: Temperature | None = None
    repetition_penalty: RepetitionPenalty | None = None

    @model_validator(mode="after")
    def _open_end(self) -> Self:
        if self.history[-1].response:
            raise ValueError("the last response of history has to be empty: it is what is asked for")
        return self

    def as_chat(self, model: str) -> ChatRequest:
        messages: list[RequestMessage] = []
        for dialogue in self.history:
            messages.append(RequestMessage(role="user", content=dialogue.instruction))
            if dialogue.response:
                messages.append(RequestMessage(role="assistant", content=dialogue.response))
        return ChatRequest(
            model=model,
            messages=messages,
            max_tokens=self.max_new_tokens,
            top_k=self.top_k,
            top_p=self.top_p,
            temperature=self.temperature,
            repetition_penalty=self.repetition_penalty,
        )


async def generate_events(call: Call) -> AsyncGenerator[str, None]:
    begun = False
    try:
        async with aclosing(call.deltas()) as deltas:
            async for delta in deltas:
                text = delta.text if begun else delta.text.lstrip()
                if text:
                    begun = True
                    yield _event("generate", text)
    except (EngineFailure, Stopped) as failure:
        yield _event("error", str(failure))
        return
    yield _event("end", "")


def _event(name: str, data: str) -> str:
    """A line break in the data begins another line of it."""
    return f"event: {name}\n" + "".join(f"data: {line}\n" for line in data.split("\n")) + "\n"
