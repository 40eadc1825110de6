"""What a client may ask: OpenAI's chat completion request, as far as this server can honour it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from chatloom.errors import InputError
from chatloom.serving.engine import Message

# These describe the caller and change no answer.
LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Settings that this server lacks, with the value that asks for nothing.
NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


class RequestError(InputError):
    """A request that cannot be honoured, with the parameter at fault and OpenAI's code for it."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def _as_text(content: object) -> object:
    """Message content as one string: clients may send a list of text parts."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise ValueError('expected text or a list of {"type": "text", "text": ...}: this model reads text only')
    return "".join(texts)


class RequestMessage(BaseModel):
    # Clients send our own answers back with fields such as "refusal": null.
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


def _as_list(stop: object) -> object:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


StopStrings = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]], Field(max_length=4), BeforeValidator(_as_list)
]
Count = Annotated[int, Field(ge=1)]


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. The defaults are OpenAI's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    """The older name of `max_completion_tokens`."""
    max_completion_tokens: Count | None = None
    stop: StopStrings = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream = true")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def to_messages(self) -> list[Message]:
        return [Message(message.role, message.content) for message in self.messages]


def refuse_unsupported(request: ChatRequest) -> None:
    """A setting is honoured or refused, never silently ignored.

    Raises:
        RequestError: naming the parameter.
    """
    for name, value in (request.model_extra or {}).items():
        if name in LABELS or value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name == "n":
            raise RequestError(f"n = {value!r}: this server gives one answer a request; send the request again", "n")
        if name in NEUTRAL:
            raise RequestError(f"{name} is not supported by this server: leave it out", name)
        raise RequestError(f"unknown parameter {name!r}: leave it out", name)
    for index, message in enumerate(request.messages):
        for name, value in (message.model_extra or {}).items():
            if value not in (None, [], {}):
                param = f"messages[{index}].{name}"
                raise RequestError(f"{param} is not supported by this server: leave it out", param)
