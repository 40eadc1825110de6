"""`chatloom data`: what a file's owner is told before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chatloom.cli import app
from tests.data.factories import ROOT, templated_rows, write_jsonl


def data(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments, "--params", str(ROOT / "params.yaml")])


def test_every_fault_is_named_by_its_line(tmp_path: Path) -> None:
    rows = [*templated_rows(2), {"instruction": "a", "output": ""}, {"instruction": "b", "output": "<nooutput>"}]
    file = write_jsonl(
        tmp_path / "rows.jsonl", [*rows, rows[0], {"instruction": "Mail?", "output": "To a@example.org"}]
    )
    with file.open("a", encoding="utf-8") as lines:
        lines.write("{broken\n")
    result = data("validate", str(file))
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{file}:3: empty_answer: output is empty",
        f"{file}:4: placeholder_answer: the answer is '<nooutput>'",
        f"{file}:5: duplicate: same prompt and responses as {file}:1",
        f"{file}:6: warning: pii_email: a@***********",
        f"{file}:7: broken_json: not valid JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    assert "3 rows can be used, 4 faults" in result.stderr


def test_good_file_is_silence_and_status_0(tmp_path: Path) -> None:
    result = data("validate", str(write_jsonl(tmp_path / "rows.jsonl", templated_rows(3))))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "3 rows can be used, 0 faults" in result.stderr


def test_starter_set_is_valid() -> None:
    result = data("validate", str(ROOT / "data/starter"))
    assert (result.exit_code, [line for line in result.stdout.splitlines() if "warning" not in line]) == (0, [])


def test_faults_of_whole_files_do_not_hide_each_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    (tmp_path / "b.json").write_text("[1,")
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "notes.md").write_text("x")
    write_jsonl(tmp_path / "d.jsonl", templated_rows(2))
    result = data("validate", str(tmp_path))
    assert result.exit_code == 1
    assert "notes.md: warning: not read" in result.stdout
    for message in ("a.jsonl: unknown schema", "b.json:1: not valid JSON", "c.jsonl: no rows"):
        assert message in result.stdout
    assert "2 rows can be used" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "no such file or folder"),
        (["none.jsonl", "--format", "excel"], "--format excel: unknown; one of"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    for command in ("validate", "inspect"):
        result = data(command, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr


def test_inspect_shows_what_a_run_would_make(tmp_path: Path, checkpoint: Path) -> None:
    rows = [*templated_rows(30), {"instruction": "你好吗？", "output": "我很好。"}, {"instruction": "a", "output": ""}]
    file = write_jsonl(tmp_path / "rows.jsonl", [{**row, "topic": "x"} for row in rows])
    page = tmp_path / "page.html"
    result = data("inspect", str(file), "--model", str(checkpoint), "--html", str(page))
    assert result.exit_code == 0, result.stderr
    for shown in ("alpaca (detected), 32 rows; keys not read: topic", "32 rows in, 31 out", "empty_answer", "zh 1"):
        assert shown in result.stdout
    assert "<title>Chatloom data report</title>" in page.read_text(encoding="utf-8")


def test_inspect_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", templated_rows(1))
    result = data("inspect", str(file), "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "`dvc repro base_model` makes models/base" in result.stderr


def test_page_escapes_what_rows_say(tmp_path: Path, checkpoint: Path) -> None:
    rows = [*templated_rows(3), {"id": "<script>alert(1)</script>", "instruction": "a", "output": "<nooutput>"}]
    page = tmp_path / "page.html"
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert data("inspect", file, "--model", str(checkpoint), "--html", str(page)).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "http://" not in text
