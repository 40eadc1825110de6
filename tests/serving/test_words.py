from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from chatloom.errors import InputError
from chatloom.serving.words import WordList, WordScanner, read_words

WORDS = ["ass", "bad word", "坏话"]


def shown(words: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    scanner, parts = WordScanner(WordList(words)), []
    for piece in pieces:
        parts.append(scanner.push(piece))
        if scanner.found:
            return parts, True
    parts.append(scanner.flush())
    return parts, scanner.found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("you ass!", "you "),
        ("ASS", ""),
        ("a class of glass, assessed", None),
        ("so bad words", None),
        ("so Bad Word.", "so "),
        ("so bad wor", None),
        ("他说坏话了", "他说"),
        ("坏", None),
        ("as", None),
        ("pass", None),
        ("assume ass", "assume "),
        ("ass1 1ass ass_", "ass1 1ass "),
        ("", None),
    ],
)
def test_however_it_is_cut(text: str, left: str | None) -> None:
    """The same for every way to cut the text into up to three pieces, and letter by letter."""
    cuts = [list(text), *([text[:a], text[a:b], text[b:]] for a, b in itertools.combinations(range(len(text) + 1), 2))]
    for pieces in cuts:
        parts, found = shown(WORDS, pieces)
        assert found == (left is not None)
        assert "".join(parts) == (text if left is None else left)


def test_what_can_be_no_word_is_shown_at_once() -> None:
    assert shown(WORDS, ["hello ", "b", "ad", " day"]) == (["hello ", "", "", "bad day", ""], False)
    # Letters behind it say that it is none.
    assert shown(WORDS, ["as", "s", "ert"]) == (["", "", "assert", ""], False)


def test_read_words(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# mine\n\n Ass \n坏话\n", encoding="utf-8")
    words = read_words(file)
    assert words.find("kick ass") == 5
    assert words.find("classy") is None
    file.write_text("# none\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no words"):
        read_words(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_words(tmp_path / "nowhere")
