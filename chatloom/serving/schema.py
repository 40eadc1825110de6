"""What a client may ask: OpenAI's requests, as far as this server can honour them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from chatloom.serving.errors import RequestError
from chatloom.serving.logits import Penalties
from chatloom.serving.prompts import DEFAULT_MAX_NEW_TOKENS, Message, Prompts

# These describe the caller and change no answer.
LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Settings that this server lacks, with the value that asks for nothing.
NEUTRAL: Mapping[str, Any] = {
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "best_of": 1,
    "echo": False,
    "suffix": "",
}
MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_ALTERNATIVES = 20


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
    content: Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | list[dict[str, str]])]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


def _as_list(stop: object) -> object:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


StopStrings = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]],
    Field(max_length=4),
    BeforeValidator(_as_list),
]
Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=10)]
"""Smaller ones take logits out of float32."""


class Settings(BaseModel):
    """What both kinds of requests have. The defaults are OpenAI's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Count | None = None
    """Not OpenAI's, like `repetition_penalty`; clients send them as `extra_body`."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    stop: StopStrings = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream = true")
        return self

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.repetition_penalty or 1.0, self.presence_penalty or 0.0, self.frequency_penalty or 0.0)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Settings):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    """The older name of `max_completion_tokens`."""
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    default_tokens: ClassVar[int] = DEFAULT_MAX_NEW_TOKENS
    subject: ClassVar[str] = "messages"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs = true")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def texts(self) -> Sequence[str]:
        return [message.content for message in self.messages]

    def to_messages(self) -> list[Message]:
        return [Message(message.role, message.content) for message in self.messages]

    def encode(self, prompts: Prompts, *, drop_oldest: bool) -> list[list[int]]:
        messages = self.to_messages()
        return [prompts.encode_latest(messages, self.asked_tokens) if drop_oldest else prompts.encode(messages)]


def _as_prompts(prompt: object) -> object:
    """One text, or the token ids of one, as a list of one."""
    match prompt:
        case str() | [int(), *_]:
            return [prompt]
        case _:
            return prompt


Text = Annotated[str, StringConstraints(min_length=1), Tag("text")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), Tag("ids")]
Prompt = Annotated[Text | TokenIds, Discriminator(lambda prompt: "ids" if isinstance(prompt, list) else "text")]


class CompletionRequest(Settings):
    """Body of POST /v1/completions: texts that the model goes on from, without its chat template."""

    prompt: Annotated[
        list[Prompt],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    default_tokens: ClassVar[int] = 16
    subject: ClassVar[str] = "prompt"
    """The parameter at fault where the text is."""

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def texts(self) -> Sequence[str]:
        return [prompt for prompt in self.prompt if isinstance(prompt, str)]

    def encode(self, prompts: Prompts, *, drop_oldest: bool) -> list[list[int]]:
        """A text has no turns that could be left out: `drop_oldest` is for conversations."""
        return [
            prompts.encode_text(prompt) if isinstance(prompt, str) else prompts.check_ids(prompt)
            for prompt in self.prompt
        ]


def refuse_unsupported(request: Settings) -> None:
    """A setting is honoured or refused, never silently ignored.

    Raises:
        RequestError: naming the parameter.
    """
    for name, value in (request.model_extra or {}).items():
        if name in LABELS or value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise RequestError(f"{name} is not supported by this server: leave it out", name)
        raise RequestError(f"unknown parameter {name!r}: leave it out", name)
    for index, message in enumerate(request.messages if isinstance(request, ChatRequest) else []):
        for name, value in (message.model_extra or {}).items():
            if value not in (None, [], {}):
                param = f"messages[{index}].{name}"
                raise RequestError(f"{param} is not supported by this server: leave it out", param)
