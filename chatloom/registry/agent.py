"""The registered model as MLflow runs it: it executes this file and takes what `set_model` was given."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import ResponsesAgent
from mlflow.types.responses import ResponsesAgentRequest, ResponsesAgentResponse, ResponsesAgentStreamEvent

from chatloom.errors import InputError
from chatloom.models.sampling import Sampling
from chatloom.registry.resolve import ARTIFACT
from chatloom.serving.engine import Engine, Generation
from chatloom.serving.prompts import Message


class ChatAgent(ResponsesAgent):  # type: ignore[misc]  # MLflow has no types
    """Answers in the shape of OpenAI's Responses API.

    `max_output_tokens`, `temperature` and `top_p` are fields of the request; `seed` and `stop` go into `custom_inputs`.
    """

    engine: Engine

    def load_context(self, context: Any) -> None:
        self.engine = Engine(Path(context.artifacts[ARTIFACT]))

    def predict(self, request: ResponsesAgentRequest) -> ResponsesAgentResponse:
        generation = self._start(request)
        text = "".join(generation)
        cut = generation.finish_reason == "length"
        return ResponsesAgentResponse(
            output=[self.create_text_output_item(text, id=_item_id())],
            status="incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": generation.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": generation.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": generation.prompt_tokens + generation.completion_tokens,
            },
        )

    def predict_stream(self, request: ResponsesAgentRequest) -> Iterator[ResponsesAgentStreamEvent]:
        item_id, text = _item_id(), ""
        for delta in self._start(request):
            text += delta
            yield ResponsesAgentStreamEvent(**self.create_text_delta(delta, item_id))
        item = self.create_text_output_item(text, id=item_id)
        yield ResponsesAgentStreamEvent(type="response.output_item.done", item=item)

    def _start(self, request: ResponsesAgentRequest) -> Generation:
        custom = dict(request.custom_inputs or {})
        seed, stop = custom.pop("seed", None), custom.pop("stop", ())
        if custom:
            raise InputError(f"custom_inputs has {sorted(custom)}: it may have seed and stop")
        if request.tools:
            raise InputError("tools are not supported by this model: leave them out")
        prompt_ids = self.engine.prompts.encode(to_messages([item.model_dump() for item in request.input]))
        sampling = Sampling(
            max_new_tokens=self.engine.prompts.room(prompt_ids, request.max_output_tokens),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
        )
        return self.engine.generate(prompt_ids, sampling, seed=seed, stop=[stop] if isinstance(stop, str) else stop)


def to_messages(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Input items of the Responses API, earlier answers among them, as a conversation.

    Raises:
        InputError: for an item or a part that is not text.
    """
    messages = []
    for index, item in enumerate(items):
        if item["type"] != "message":
            raise InputError(f"input[{index}].type = {item['type']!r}: this model reads messages only")
        content = item["content"]
        parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] not in ("input_text", "output_text"):
                raise InputError(
                    f"input[{index}].content has a part of type {part['type']!r}: this model reads text only"
                )
        messages.append(Message(item["role"], "".join(part["text"] for part in parts)))
    return messages


def _item_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


set_model(ChatAgent())
