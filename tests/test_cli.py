from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chatloom.cli import app
from chatloom.models.sampling import Sampling
from chatloom.serving.engine import Engine
from chatloom.serving.prompts import Message

ROOT = Path(__file__).parents[1]
SAMPLING = Sampling(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint, device="cpu")


def chat(checkpoint: Path, typed: str | bytes, *options: str) -> Result:
    command = ["chat", "--model", str(checkpoint), "--temperature", "0", "--max-tokens", "8", "--device", "cpu"]
    return CliRunner().invoke(app, [*command, *options], input=typed)


def answers(engine: Engine, *questions: str, system: str | None = None) -> str:
    """What the terminal shows for a conversation: one answer a line."""
    messages = [] if system is None else [Message("system", system)]
    shown = ""
    for question in questions:
        messages.append(Message("user", question))
        text = engine.chat(messages, SAMPLING).text
        messages.append(Message("assistant", text))
        shown += f"{text}\n"
    return shown


def test_a_conversation(checkpoint: Path, engine: Engine) -> None:
    result = chat(checkpoint, "hello\n\n你好\n")
    assert result.exit_code == 0
    assert result.stdout == answers(engine, "hello", "你好")


def test_reset_and_exit(checkpoint: Path, engine: Engine) -> None:
    result = chat(checkpoint, "hello\n/reset\nhello\n/exit\nnot asked\n")
    assert result.stdout == answers(engine, "hello") * 2


def test_system_message_outlives_reset(checkpoint: Path, engine: Engine) -> None:
    result = chat(checkpoint, "a\n/reset\na", "--system", "Be brief.")
    assert result.stdout == answers(engine, "a", system="Be brief.") * 2


def test_too_long_a_message_does_not_end_the_conversation(checkpoint: Path, engine: Engine) -> None:
    result = chat(checkpoint, f"hello\n{'x ' * 1500}\n你好\n")
    assert result.exit_code == 0
    assert result.stdout == answers(engine, "hello", "你好")
    assert "the model's context is 2048" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["chat", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["serve", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["serve", "--model", "models:chatloom"], "write models:/name@alias"),
        (["chat", "--top-p", "0"], "--top-p 0 leaves no token"),
        (["lineage", "chatloom"], "chatloom: write models:/name@alias or models:/name/version"),
        (
            ["lineage", "models:/chatloom/1", "--graph", "graph.png"],
            "--graph graph.png: give a name that ends with .svg",
        ),
        (["verify", "/some/folder"], "/some/folder: write models:/name@alias"),
        (["promote", "models:/chatloom", "--reason", "x"], "models:/chatloom: write models:/name@alias"),
    ],
)
def test_an_input_error_is_one_line(command: list[str], words: str) -> None:
    result = CliRunner().invoke(app, command, input="x\n")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("chatloom: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "no checkpoint" in result.stderr


def test_no_store_and_none_is_made(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-m", "chatloom.cli", "chat"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input="x", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("chatloom: models:/chatloom@champion: set MLFLOW_TRACKING_URI, or run this where mlflow.db is")
    )
    assert not list(tmp_path.iterdir())


def test_text_that_is_not_utf8(checkpoint: Path) -> None:
    result = chat(checkpoint, b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "standard input is not utf-8" in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from chatloom.cli import app; "
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'mlflow', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
