from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chatloom.cli import app
from chatloom.errors import InputError
from chatloom.serving.keys import Bucket, Holder, Key, KeyRing, add_key, read_keys, remove_key


def test_the_file_has_no_key_in_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = add_key(file, "ann", None, None)
    other = add_key(file, "bob", 10, 1000)
    assert secret != other
    text = file.read_text()
    assert secret not in text
    assert secret.removeprefix("cl-") not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [(key.name, key.requests_per_minute, key.tokens_per_minute) for key in read_keys(file)] == [
        ("ann", None, None),
        ("bob", 10, 1000),
    ]


def test_keys_come_and_go_while_a_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = add_key(file, "ann", None, None)
    ring = KeyRing(file)
    assert ring.find("cl-guess") is None
    found = ring.find(secret)
    assert found is not None
    assert found.key.name == "ann"
    new = add_key(file, "bob", 1, None)
    holder = ring.find(new)
    assert holder is not None
    assert holder.admit() == 0
    assert ring.find(secret) is found  # with what is left of its rates
    remove_key(file, "ann")
    assert ring.find(secret) is None
    again = ring.find(new)
    assert again is not None
    assert again.admit() > 0
    file.write_text("[{}]")
    assert ring.find(new) is again  # a broken file changes nothing


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "ann", None, None)
    with pytest.raises(InputError, match="a key called 'ann' already"):
        add_key(file, "ann", None, None)
    with pytest.raises(InputError, match="no key called 'bob'; it has ann"):
        remove_key(file, "bob")
    with pytest.raises(InputError, match="cannot be read as API keys"):
        KeyRing(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least 1 character"):
        add_key(file, "", None, None)


def test_bucket() -> None:
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    bucket.take(59)
    assert bucket.wait(1) == 0
    bucket.take(1)
    assert bucket.wait(1) == 1  # 60 a minute are one a second
    now[0] = 0.5
    assert bucket.wait(1) == 0.5
    bucket.take(30)  # what an answer cost is known afterwards
    assert bucket.wait(1) == 30.5
    now[0] = 1000
    assert bucket.wait(60) == 0
    assert bucket.wait(61) == 1  # no more than a minute's is kept


def test_a_holder_waits_for_both_rates() -> None:
    holder = Holder(Key(name="a", sha256="x", requests_per_minute=2, tokens_per_minute=100, created="now"))
    assert [holder.admit(), holder.admit()] == [0, 0]
    assert 29 <= holder.admit() <= 30
    free = Holder(Key(name="b", sha256="y", tokens_per_minute=60, created="now"))
    assert free.admit() == 0
    free.spend(90)
    assert 30 <= free.admit() <= 31


def test_commands(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    made = CliRunner().invoke(app, ["keys", "add", file, "ann", "--requests-per-minute", "3"])
    assert made.exit_code == 0
    assert made.stdout.startswith("cl-")
    listed = CliRunner().invoke(app, ["keys", "list", file]).stdout
    assert listed.startswith("ann  3 requests a minute  since 20")
    assert made.stdout.strip() not in listed
    assert CliRunner().invoke(app, ["keys", "remove", file, "ann"]).exit_code == 0
    assert CliRunner().invoke(app, ["keys", "list", file]).stdout == ""
    again = CliRunner().invoke(app, ["keys", "remove", file, "ann"])
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("chatloom: ")
