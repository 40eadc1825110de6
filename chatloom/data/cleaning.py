"""What is wrong with a row's text: mended, dropped or only reported, as `prepare_data.cleaning` says for each step.

Each step is a function of its own below; `clean` runs them in an order in which none hides what a later one looks for.
What is checked of an answer is checked of the best one: a bad one that is ranked low is what a preference is made of.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from chatloom.config import Check, CleaningParams, Mend
from chatloom.data.drops import RowFault
from chatloom.data.prepared import Message

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")
"""C0 and C1 controls but tab and line ends, byte order marks, annotation marks."""
LOST = "\ufffd"
TAG = re.compile(
    r"</?(?:a|b|blockquote|body|br|button|center|div|em|font|form|h[1-6]|head|hr|html|i|iframe|img|input|li|meta|ol|p|"
    r"script|span|strong|style|sub|sup|table|tbody|td|th|tr|u|ul)(?:\s[^<>]{0,200})?/?>|&(?:nbsp|amp|lt|gt|quot|#\d{2,5});",
    re.IGNORECASE,
)
CODE_ASKED = re.compile(
    r"html|xml|svg|css|jsx|\btags?\b|web ?(?:page|site)|\bcode\b|\bscript|markup|template|regex|"
    r"网页|网站|代码|标签|脚本|模板",
    re.IGNORECASE,
)
LANGUAGE_CHARACTERS = 100
"""Of the question and of the answer that are looked at to tell a language: more costs more and says little more."""
LANGUAGE_LETTERS = 20
"""Fewer letters say too little."""
LANGUAGE_PROBABILITY = 0.95
NO_LANGUAGE = "zxx"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
KANA = re.compile("[\u3040-\u30ff]")
PII: dict[str, re.Pattern[str]] = {
    # Bounded, or a text of one long word would take the square of its length.
    "email": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"),
    "phone": re.compile(
        r"(?<![\d.])(?:\+\d{1,3}[ -]?(?:\d[ -]?){7,11}\d|1[3-9]\d{9}|(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4})"
        r"(?!\d|\.\d)"
    ),
    "chinese_id": re.compile(
        r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"
    ),
    "card": re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?!\d|[.-]\d)"),
    "ip": re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d|\.\d)"),
}
MAY_BE_PII = re.compile(r"@|\d{3}|\d\.\d+\.")


@dataclass
class Cleaned:
    messages: list[Message]
    responses: list[str]
    mended: list[tuple[str, str]] = field(default_factory=list)
    """(step, detail) of what was put right."""
    noticed: list[tuple[str, str]] = field(default_factory=list)
    """(step, detail) of what was only to be reported."""

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]

    @property
    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.messages), *self.responses]


def normalised(text: str) -> str:
    """Text without what does not make it another question: case, runs of space, compatibility forms of characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def clean(messages: list[Message], responses: list[str], lang: str, params: CleaningParams) -> Cleaned:
    """The row with its text mended.

    Raises:
        RowFault: where a step whose action is `drop` finds something, or nothing is left of a text.
    """
    row = Cleaned(messages, responses)
    size = sum(map(len, row.texts))
    if size > params.max_characters:
        raise RowFault("too_many_characters", f"{size} characters, cleaning.max_characters is {params.max_characters}")
    _mend(row, "mojibake", params.mojibake, _without_mojibake)
    _mend(row, "control_characters", params.control_characters, _without_controls)
    _check(row, "lost_characters", params.lost_characters, _lost_characters)
    _placeholder_input(row, params)
    _check(row, "placeholder_answer", params.placeholder_answer, lambda row: _placeholder_answer(row, params))
    _check(row, "one_character_answer", params.one_character_answer, _one_character_answer)
    _check(row, "repeats_question", params.repeats_question, _repeats_question)
    _check(row, "html_answer", params.html_answer, _html_answer)
    _check(row, "language_mismatch", params.language_mismatch, lambda row: _language_mismatch(row, lang))
    if params.pii != "off" and MAY_BE_PII.search(together := "\n".join(row.texts)):
        for kind, pattern in PII.items():
            _check(row, f"pii_{kind}", params.pii, partial(_pii, text=together, kind=kind, pattern=pattern))
    return row


def _check(row: Cleaned, step: str, action: Check, find: Callable[[Cleaned], str | None]) -> None:
    """Drop or report the row where `find` says what is wrong with it."""
    if action == "off" or (detail := find(row)) is None:
        return
    if action == "drop":
        raise RowFault(step, detail)
    row.noticed.append((step, detail))


def _mend(row: Cleaned, step: str, action: Mend, mend: Callable[[str], str]) -> None:
    """Mend every text of the row that `mend` changes, or drop or report the row."""
    if action == "off":
        return
    texts = row.texts
    mended = [mend(text) for text in texts]
    changed = next((number for number, text in enumerate(texts) if text != mended[number]), None)
    if changed is None:
        return
    detail = f"{_short(texts[changed])!r}, mended {_short(mended[changed])!r}"
    if action != "fix":
        _check(row, step, action, lambda _: detail)
        return
    if not all(text.strip() for text in mended):
        raise RowFault(step, f"nothing but such characters in {_short(texts[changed])!r}")
    split = len(row.messages)
    row.messages = [{**message, "content": text} for message, text in zip(row.messages, mended[:split], strict=True)]
    row.responses = mended[split:]
    if len({response.strip() for response in row.responses}) < len(row.responses):
        raise RowFault("repeated_response", f"two ranked responses differ in {step.replace('_', ' ')} only")
    row.mended.append((step, detail))


def _without_mojibake(text: str) -> str:
    """UTF-8 that was read as another encoding, read right."""
    if text.isascii():
        return text
    import ftfy

    return ftfy.fix_encoding(text)


def _without_controls(text: str) -> str:
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _lost_characters(row: Cleaned) -> str | None:
    lost = next((text for text in row.texts if LOST in text), None)
    return None if lost is None else f"a character was lost before this file was written: {_around(lost, LOST)!r}"


def _placeholder_input(row: Cleaned, params: CleaningParams) -> None:
    """A last paragraph of the question that says that there is no input."""
    before, separator, last = row.question.rpartition("\n\n")
    if params.placeholder_input == "off" or not separator or not _is_placeholder(last, params):
        return
    if params.placeholder_input != "fix":
        _check(row, "placeholder_input", params.placeholder_input, lambda _: f"the question ends with {last.strip()!r}")
        return
    row.messages = [*row.messages[:-1], {**row.messages[-1], "content": before}]
    row.mended.append(("placeholder_input", f"{last.strip()!r} removed from the question's end"))


def _placeholder_answer(row: Cleaned, params: CleaningParams) -> str | None:
    if row.responses and _is_placeholder(row.responses[0], params):
        return f"the answer is {row.responses[0].strip()!r}"
    return None


def _is_placeholder(text: str, params: CleaningParams) -> bool:
    return len(text) < 60 and normalised(text).strip(" <>[](){}.。:：-_'\"") in params.placeholders


def _one_character_answer(row: Cleaned) -> str | None:
    if row.responses and len(answer := row.responses[0].strip()) == 1:
        return f"the answer is {answer!r}"
    return None


def _repeats_question(row: Cleaned) -> str | None:
    if not row.responses or not 0.5 <= len(row.responses[0]) / len(row.question) <= 2:
        return None  # most rows, without the cost of normalising them
    if normalised(row.responses[0]) == normalised(row.question):
        return f"the answer is the question: {_short(row.question)!r}"
    return None


def _html_answer(row: Cleaned) -> str | None:
    """Marks of a web page in an answer to a question that asks for no code."""
    found = TAG.search(row.responses[0]) if row.responses else None
    if found is None or CODE_ASKED.search(row.question) or "```" in row.responses[0]:
        return None
    return f"the answer holds {found.group()!r}: {_around(row.responses[0], found.group())!r}"


def _language_mismatch(row: Cleaned, lang: str) -> str | None:
    """Where question and answer together surely read like another language than the row's."""
    language = re.split("[-_]", lang.lower())[0]
    text = " ".join(text[:LANGUAGE_CHARACTERS] for text in (row.question, *row.responses[:1]))
    letters = sum(map(str.isalpha, text))
    if letters < LANGUAGE_LETTERS:
        return None
    # Han characters without kana are Chinese, and need no model: it would take most of the time, and tell Wu from Yue.
    if 2 * len(HAN.findall(text)) > letters and not KANA.search(text):
        found, probability = "zh", 1.0
    else:
        identifier = _identifier()
        if language not in identifier.nb_classes:
            return None
        found, probability = identifier.classify(text)
    if found in (language, NO_LANGUAGE) or probability < LANGUAGE_PROBABILITY:
        return None
    return f"lang is {lang}, the text reads like {found} ({probability:.2f}): {_short(row.question)!r}"


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _pii(_: Cleaned, *, text: str, kind: str, pattern: re.Pattern[str]) -> str | None:
    """What looks like a person's data, masked: a report is read by more people than the data."""
    for found in pattern.finditer(text):
        if kind != "card" or _luhn(found.group()):
            return f"{found.group()[:2]}{'*' * (len(found.group()) - 2)}"
    return None


def _luhn(number: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812)."""
    digits = [int(character) for character in number if character.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _around(text: str, part: str) -> str:
    """`part` with what stands beside it."""
    start = text.index(part)
    return text[max(start - 20, 0) : start + len(part) + 20]
