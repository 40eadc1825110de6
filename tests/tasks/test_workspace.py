"""Workspaces of presets: copies of a real checkout on its DVC cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_pipeline import GIT

from chatloom.config import load_params
from chatloom.errors import InputError
from tasks.workspace import DVC, Reproduction, make_workspace, presets

REPO = Path(__file__).resolve().parents[2]


def reproduce(checkout: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tasks.reproduce", *options],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_default_is_the_checkout_itself(checkout: Path) -> None:
    assert presets(checkout) == ["default", "tiny"]
    assert make_workspace("default", checkout) == checkout
    assert not (checkout / "workspaces").exists()


def test_a_preset_has_the_code_of_the_checkout_and_its_own_params(checkout: Path) -> None:
    (checkout / "new.py").write_text("untracked\n")
    (checkout / "mlflow.db").write_text("ignored\n")
    (checkout / "dvc.lock").write_text("stages: {}\n")
    workspace = make_workspace("tiny", checkout)
    assert workspace == checkout / "workspaces" / "tiny"
    assert (workspace / "new.py").read_text() == "untracked\n"
    assert (workspace / "dvc.yaml").read_text() == (checkout / "dvc.yaml").read_text()
    assert not (workspace / "mlflow.db").exists()
    assert not (workspace / "dvc.lock").exists()
    assert not (workspace / "workspaces").exists()
    params = load_params(workspace / "params.yaml")
    assert (params.train_sft.seed, params.train_reward.seed) == (7, 42)
    assert "&" not in (workspace / "params.yaml").read_text()
    status = subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True, check=True)
    assert "workspaces" not in status.stdout


def test_a_second_time_touches_only_what_changed(checkout: Path) -> None:
    (checkout / "gone.py").write_text("1\n")
    workspace = make_workspace("tiny", checkout)
    (workspace / "dvc.lock").write_text("own lock\n")
    (workspace / "out").mkdir()
    (workspace / "out" / "one.txt").write_text("own out\n")
    os.utime(workspace / "dvc.yaml", (1, 1))
    os.utime(workspace / "params.yaml", (1, 1))
    (checkout / "gone.py").unlink()
    (checkout / "input.txt").write_text("changed\n")
    make_workspace("tiny", checkout)
    assert (workspace / "input.txt").read_text() == "changed\n"
    assert not (workspace / "gone.py").exists()
    assert (workspace / "dvc.yaml").stat().st_mtime == 1
    assert (workspace / "params.yaml").stat().st_mtime == 1
    assert (workspace / "dvc.lock").read_text() == "own lock\n"
    assert (workspace / "out" / "one.txt").read_text() == "own out\n"


def test_a_change_of_the_preset_reaches_its_workspace(checkout: Path) -> None:
    make_workspace("tiny", checkout)
    (checkout / "params" / "tiny.yaml").write_text("train_sft: {seed: 8}\n")
    assert load_params(make_workspace("tiny", checkout) / "params.yaml").train_sft.seed == 8


def test_overrides_run_in_a_workspace_of_their_own(checkout: Path) -> None:
    one = make_workspace("tiny", checkout, ["train_gold.seed=9", "train_sft.lora.layers=null"])
    assert one == make_workspace("tiny", checkout, ["train_sft.lora.layers=null", "train_gold.seed=9"])
    other = make_workspace("default", checkout, ["train_gold.seed=10"])
    assert len({one, other, checkout, checkout / "workspaces" / "tiny"}) == 4
    params = load_params(one / "params.yaml")
    assert (params.train_gold.seed, params.train_sft.seed, params.train_sft.lora.layers) == (9, 7, None)
    # They share an alias in params.yaml.
    assert params.train_ppo.lora.layers == load_params(checkout / "params.yaml").train_ppo.lora.layers
    assert load_params(other / "params.yaml").train_gold.seed == 10
    assert Reproduction.start("tiny", checkout, ["train_gold.seed=9"]).name.startswith("tiny-")


def test_a_wrong_override_is_named_before_anything_is_made(checkout: Path) -> None:
    with pytest.raises(InputError, match=r"override train_sft.sed=9: train_sft.sed: unknown key; did you mean 'seed'"):
        make_workspace("tiny", checkout, ["train_sft.sed=9"])
    done = reproduce(checkout, "--preset", "tiny", "--set", "train_sft.seed")
    assert done.returncode == 1
    assert done.stderr == "override 'train_sft.seed': write key=value, as train_sft.optimizer.lr=1.0e-4\n"
    assert not (checkout / "workspaces").exists()


@pytest.mark.parametrize("folder", ["own", "rankings"])
def test_what_people_put_there_is_there_without_a_copy(checkout: Path, folder: str) -> None:
    own = checkout / "data" / folder
    own.mkdir(parents=True)
    (own / "README.md").write_text("tracked\n")
    (own / "rows.jsonl").write_text("ignored\n")
    workspace = make_workspace("tiny", checkout)
    (own / "more.jsonl").write_text("later\n")
    (own / "README.md").unlink()
    make_workspace("tiny", checkout)
    assert (workspace / "data" / folder / "rows.jsonl").read_text() == "ignored\n"
    assert (workspace / "data" / folder / "more.jsonl").read_text() == "later\n"
    assert sorted(path.name for path in own.iterdir()) == ["more.jsonl", "rows.jsonl"]


def test_an_unknown_preset_lists_the_known_ones(checkout: Path) -> None:
    with pytest.raises(InputError, match=r"preset 'tinny' is none of default, tiny; did you mean 'tiny'\?"):
        make_workspace("tinny", checkout)


def test_a_preset_with_a_wrong_key_says_where(checkout: Path) -> None:
    (checkout / "params" / "tiny.yaml").write_text("train_sft: {sed: 8}\n")
    with pytest.raises(InputError, match=r"tiny.yaml: train_sft.sed: unknown key; did you mean 'seed'"):
        make_workspace("tiny", checkout)
    assert not (checkout / "workspaces").exists()


def test_a_preset_outside_git_says_so(checkout: Path) -> None:
    subprocess.run(["rm", "-rf", ".git"], cwd=checkout, check=True)
    with pytest.raises(InputError, match="needs git"):
        make_workspace("tiny", checkout)


def test_settings_of_dvc_come_along(checkout: Path) -> None:
    (checkout / ".dvc" / "config.local").write_text("['remote \"local\"']\n    url = /somewhere/else\n")
    workspace = make_workspace("tiny", checkout)
    config = (workspace / ".dvc" / "config").read_text()
    assert "no_scm = true" in config
    assert "dir = ../../../.dvc/cache" in config
    assert "url = /somewhere/else" in config
    assert "analytics = false" in config


def test_the_environment_is_the_checkouts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduction = Reproduction.start("tiny", checkout)
    environment = reproduction.environment()
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{checkout}/mlflow.db"
    assert environment["CHATLOOM_PRESET"] == "tiny"
    assert environment["CHATLOOM_REPRODUCTION"] == reproduction.id
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert reproduction.environment()["MLFLOW_TRACKING_URI"] == "http://server"
    assert Reproduction.start("tiny", checkout).id != reproduction.id


def test_nothing_is_computed_twice_and_going_back_runs_nothing(checkout: Path) -> None:
    first = reproduce(checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Running stage") == 3
    preset = reproduce(checkout, "--preset", "tiny")  # no stage of this toy reads params
    assert preset.returncode == 0, preset.stderr
    assert preset.stdout.count("is cached - skipping run") == 3
    assert "Running stage" not in preset.stdout
    for options in ([], ["--preset", "tiny"]):
        again = reproduce(checkout, *options)
        assert again.stdout.count("didn't change, skipping") == 3
        assert "Data and pipelines are up to date." in again.stdout
    assert (checkout / "workspaces" / "tiny" / "out" / "three.txt").read_text() == "input.txt\n"


def test_what_is_pushed_here_is_pulled_in_another_clone(checkout: Path, tmp_path: Path) -> None:
    """As the comment in .dvc/config says."""

    def run(folder: Path, *command: str) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    assert reproduce(checkout).returncode == 0
    run(checkout, *DVC, "push")
    run(checkout, *GIT, "add", "dvc.lock")
    run(checkout, *GIT, "commit", "--quiet", "--message", "lock")
    run(tmp_path, *GIT, "clone", "--quiet", str(checkout), "clone")
    clone = tmp_path / "clone"
    run(clone, *DVC, "remote", "modify", "--local", "local", "url", str(checkout / ".dvc" / "remote"))
    run(clone, *DVC, "pull")
    assert (clone / "out" / "three.txt").read_text() == "input.txt\n"
    again = reproduce(clone)
    assert "Data and pipelines are up to date." in again.stdout
    status = subprocess.run(["git", "status", "--short"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_a_run_is_told_its_preset_and_reproduction(checkout: Path) -> None:
    pipeline = yaml.safe_load((checkout / "dvc.yaml").read_text())
    said = "$CHATLOOM_PRESET $CHATLOOM_REPRODUCTION $MLFLOW_TRACKING_URI"
    pipeline["stages"]["one"]["cmd"] = f'mkdir -p out && echo "{said}" > out/one.txt'
    (checkout / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    done = reproduce(checkout, "--preset", "tiny", "--stage", "one", CHATLOOM_REPRODUCTION="r7")
    assert done.returncode == 0, done.stderr
    out = checkout / "workspaces" / "tiny" / "out"
    assert (out / "one.txt").read_text() == f"tiny r7 sqlite:///{checkout}/mlflow.db\n"
    assert not (out / "two.txt").exists()


def test_status_and_messages_are_passed_on(checkout: Path) -> None:
    assert reproduce(checkout, "--stage", "nowhere").returncode == 255
    wrong = reproduce(checkout, "--preset", "nope")
    assert wrong.returncode == 1
    assert "preset 'nope' is none of default, tiny" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_reproducing_imports_neither_mlflow_nor_prefect() -> None:
    script = "import sys, tasks.reproduce; sys.exit(bool({'mlflow', 'prefect', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO, check=False).returncode == 0
