from __future__ import annotations

from collections.abc import Sequence

import pytest

from chatloom.models.tiny import byte_level_tokenizer
from chatloom.serving.text import StopScanner, TextDecoder

REPLACEMENT = "\ufffd"


def utf8(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def deltas(data: bytes) -> list[str]:
    decoder = TextDecoder(utf8)
    return [*map(decoder.push, data), decoder.flush()]


def test_a_character_appears_with_its_last_byte() -> None:
    assert deltas("a你😀".encode()) == ["a", "", "", "你", "", "", "", "😀", ""]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"ab", "ab"),
        ("好".encode()[:2], ""),  # cut by the length limit
        (b"a" + "好".encode()[:2] + b"b", "ab"),
        (b"\xff\xff\xffok\xff", "ok"),
        ("好".encode()[1:] + "好".encode(), "好"),
    ],
)
def test_bytes_that_are_no_character_are_left_out(data: bytes, text: str) -> None:
    assert "".join(deltas(data)) == text


def test_deltas_of_a_real_tokenizer_add_up_to_the_text() -> None:
    tokenizer = byte_level_tokenizer(300)
    text = "Tea, 你好，世界！ 👩‍👩‍👧  two  spaces\n\tend"
    ids = tokenizer(text)["input_ids"]
    decoder = TextDecoder(lambda part: tokenizer.decode(part, skip_special_tokens=True))
    parts = [*map(decoder.push, ids), decoder.flush()]
    assert "".join(parts) == text
    assert not any(REPLACEMENT in part for part in parts)


def test_a_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    # Its decoder drops the space before the first word, and so must look at the words before.
    words = ["▁tea", "▁and", "▁milk"]
    decoder = TextDecoder(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [decoder.push(i) for i in range(3)] == ["tea", " and", " milk"]


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        ((), ["a", "b"], ["a", "b", ""]),
        (("END",), ["one E", "ND two"], ["one ", ""]),
        (("END",), ["one E", "at"], ["one ", "Eat", ""]),
        (("aab",), ["a", "a", "a", "b", "c"], ["", "", "a", ""]),
        (("x", "ab"), ["ab", "x"], [""]),  # the first in the text, not the first in the list
        (("three", "two"), ["one two three"], ["one "]),
        (("END",), ["EN"], ["", "EN"]),  # the answer ends before the stop string does
        (("\n\n",), ["a\n", "\nb"], ["a", ""]),
    ],
)
def test_stop_strings_across_deltas(stop: tuple[str, ...], pieces: list[str], shown: list[str]) -> None:
    scanner = StopScanner(stop)
    result = []
    for piece in pieces:
        result.append(scanner.push(piece))
        if scanner.found:
            break
    else:
        result.append(scanner.flush())
    assert result == shown
