"""Faults of machines and of people, with real processes on the smallest DAGs: nothing is lost, DVC and MLflow agree."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from stages.run import stage
from tasks.cache import is_whole, objects
from tasks.processes import end_tree
from tasks.workspace import DVC
from tests.conftest import ROOT
from tests.loopback import is_over, poll
from tests.tasks.toy_pipeline import chain, make_checkout

pytestmark = pytest.mark.smoke

# Three steps, of which the second ends when somebody opens the gate, where there is one.
TRAINS = """
from pathlib import Path
from stages.run import stage

with stage("train_sft") as run:
    checkpoints = run.checkpoints(1)
    done, state = checkpoints.load() or (0, {"total": 0})
    with checkpoints:
        for step in range(done + 1, 4):
            Path(f"step {step}").touch()
            if step == 2 and Path("gate").exists():
                Path("gate").read_text()
            state["total"] += step
            run.log(step, {"train/total": state["total"]})
            if checkpoints.due(step):
                checkpoints.save(step, state)
    with run.out("models/sft") as folder:
        (folder / "weights").write_bytes(bytes([state["total"]]) * 5_000_000)
    run.metrics({"total": state["total"]})
"""
# It says that it was told to stop, as often as it was; it ends by itself where nobody tells it.
IS_TOLD = """
import signal
from pathlib import Path
from chatloom.parallel.launch import stop_with_dvc

def told(*_):
    with open("told", "a") as file:
        file.write("once")

signal.alarm(60)
signal.signal(signal.SIGTERM, told)
stop_with_dvc()
Path("ready").touch()
signal.pause()
"""
SAVES_LONG = 'Path("gate").read_text()'


@pytest.fixture
def trains(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout whose only stage is the loop above."""
    listed = {"cmd": f"{sys.executable} trains.py", "deps": ["trains.py"], "params": ["train_sft"]}
    listed |= {"outs": ["models/sft", "plots/train_sft"], "metrics": ["metrics/train_sft.json"]}
    root = make_checkout(tmp_path / "checkout", {"stages": {"train_sft": listed}})
    (root / "trains.py").write_text(TRAINS)
    shutil.copy(empty_store, root)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    yield root
    mlflow.set_tracking_uri(None)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    write = "mkdir -p out && cat {} > out/{}.txt"
    commands = {"one": write.format("input.txt", "one"), "two": write.format("out/one.txt", "two")}
    return make_checkout(tmp_path / "checkout", chain(**commands))


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def reproduce(folder: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    return run(folder, *prefix, *DVC, "repro")


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    def holds() -> bool:
        assert process.poll() is None
        return condition()

    poll(holds, seconds=300)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing of it is left when the block ends badly."""
    try:
        yield process
    finally:
        if process.poll() is None:
            end_tree(process.pid, 0.0)
        process.wait()


def statuses(folder: Path) -> list[str]:
    """Of the runs in MLflow, by their start."""
    return [one.info.status for one in _runs(folder)]


def _runs(folder: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("chatloom")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def assert_made(folder: Path) -> None:
    """The stage made what it makes, nothing else is left, and MLflow has the whole curve."""
    assert (folder / "models/sft/weights").read_bytes() == bytes([6]) * 5_000_000
    assert (folder / "plots/train_sft/train.csv").read_text() == "step,total\n1,1.0\n2,3.0\n3,6.0\n"
    assert not (folder / ".state/train_sft").exists()
    assert not list((folder / "models").glob(".*"))
    last = _runs(folder)[-1]
    assert last.info.status == "FINISHED"
    history = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").get_metric_history(last.info.run_id, "train/total")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 3.0), (3, 6.0)]


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])  # of which one makes way for the command
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_is_told_once_when_its_dvc_ends(number: signal.Signals, shell: str, tmp_path: Path) -> None:
    listed = {"cmd": f"{sys.executable} is_told.py", "deps": ["is_told.py"]}
    root = make_checkout(tmp_path / "checkout", {"stages": {"train_sft": listed}})
    (root / "is_told.py").write_text(IS_TOLD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHELL": shell}
    with ended(subprocess.Popen([*DVC, "repro"], cwd=root, env=environment)) as dvc:
        wait_until((root / "ready").exists, dvc)
        trainer = trainer_of(dvc, "is_told.py")
        dvc.send_signal(number)
        assert dvc.wait(30) == -number
        poll(lambda: is_over(trainer.pid))
    assert (root / "told").read_text() == "once"


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])
def test_a_stage_that_was_told_together_with_its_dvc_is_not_told_again(shell: str, tmp_path: Path) -> None:
    """It saves its state for longer than DVC takes to end; a second word would end it at once."""
    listed = {"cmd": f"{sys.executable} is_told.py", "deps": ["is_told.py"]}
    root = make_checkout(tmp_path / "checkout", {"stages": {"train_sft": listed}})
    (root / "is_told.py").write_text(f"{IS_TOLD}\n{SAVES_LONG}")
    os.mkfifo(root / "gate")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHELL": shell}
    with ended(subprocess.Popen([*DVC, "repro"], cwd=root, env=environment)) as dvc:
        wait_until((root / "ready").exists, dvc)
        trainer = trainer_of(dvc, "is_told.py")
        trainer.terminate()
        poll((root / "told").exists)
        dvc.kill()
        dvc.wait(30)
        (root / "gate").write_text("saved")
        poll(lambda: is_over(trainer.pid))
    assert (root / "told").read_text() == "once"


def trainer_of(dvc: subprocess.Popen[bytes], script: str) -> psutil.Process:
    """The shell between them, if it stays, has the script in its command line too, but as a part of one word."""
    (found,) = [one for one in psutil.Process(dvc.pid).children(recursive=True) if script in one.cmdline()]
    return found


def test_dvc_alone_is_killed_the_trainer_saves_and_the_next_run_goes_on(trains: Path) -> None:
    """A trainer without its DVC would go on for nobody, and train beside the next one."""
    gate, log = trains / "gate", trains / "second.log"
    os.mkfifo(gate)
    with ended(subprocess.Popen([*DVC, "repro"], cwd=trains)) as first:
        wait_until((trains / "step 2").exists, first)
        trainer = trainer_of(first, "trains.py")
        first.kill()
        first.wait(30)
    with (
        log.open("w") as said,
        ended(subprocess.Popen([*DVC, "repro"], cwd=trains, stdout=said, stderr=said)) as second,
    ):
        wait_until(lambda: f"process {trainer.pid} still runs it here" in log.read_text(), second)
        os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))  # an error where nobody waits before it
        assert second.wait(300) == 0, log.read_text()
    assert is_over(trainer.pid)
    assert "resumes after step 2" in log.read_text()
    assert_made(trains)
    assert run(trains, *DVC, "status", "--json").stdout.strip() == "{}"
    assert statuses(trains) == ["KILLED", "FINISHED"]


def test_the_disk_is_full_when_the_model_is_written(
    trains: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of 2 MB where models go; the state lies elsewhere, and so the work is not lost."""
    (trains / "models").mkdir()
    small = 'mount -t tmpfs -o size=2m none models && exec "$@"'
    if run(trains, "unshare", "--mount", "sh", "-c", small, "sh", "true").returncode:
        pytest.skip("needs the right to mount a file system")
    full = reproduce(trains, "unshare", "--mount", "sh", "-c", small, "sh")
    assert full.returncode != 0
    assert "No space left on device; make room and run again, which goes on from the last saved state" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((trains / "models").iterdir())
    assert not (trains / "metrics").exists()
    assert not (trains / "dvc.lock").exists()
    monkeypatch.chdir(trains)
    runpy.run_path("trains.py")  # by hand: in this process, which has imported everything
    assert "resumes after step 3" in capsys.readouterr().err
    assert_made(trains)
    assert statuses(trains) == ["FAILED", "FINISHED"]


def test_an_outs_folder_that_cannot_be_written_is_said_before_the_work(trains: Path) -> None:
    (trains / "models").mkdir()
    (trains / "models").chmod(0o555)
    # Without the superuser's right to write where nobody may.
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    refused = reproduce(trains, *plain)
    assert refused.returncode != 0
    assert f"{trains}/models: cannot be written, and models/sft goes there" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (trains / "step 1").exists()


def test_a_spoiled_object_of_the_cache_is_found_and_made_again(checkout: Path) -> None:
    assert reproduce(checkout).returncode == 0
    cache = checkout / ".dvc/cache/files/md5"
    (spoiled,) = [path for path in objects(cache) if path.read_text() == "input.txt\n"]
    spoiled.chmod(0o644)
    spoiled.write_text("inpux.txt\n")
    spoiled.chmod(0o444)
    shutil.rmtree(checkout / "out")
    assert run(checkout, *DVC, "checkout").returncode == 0
    assert (checkout / "out/two.txt").read_text() == "inpux.txt\n", "DVC does not notice"

    checked = run(checkout, sys.executable, "-m", "tasks.cache")
    assert checked.returncode == 1
    assert f"{spoiled}: its bytes are not what its name says: removed" in checked.stdout
    assert "0 objects are whole, 1 were removed" in checked.stdout
    again = reproduce(checkout)
    assert again.returncode == 0, again.stderr
    assert "Running stage 'one'" in again.stdout
    assert (checkout / "out/one.txt").read_text() == (checkout / "out/two.txt").read_text() == "input.txt\n"
    assert [is_whole(path) for path in objects(cache)] == [True]


def test_what_is_whole_in_a_cache(tmp_path: Path) -> None:
    """MD5 of "hello", of "x", and of a folder's list."""
    listed = b'[{"md5": "5d41402abc4b2a76b9719d911017c592", "relpath": "a"}]'
    names = {
        "5d/41402abc4b2a76b9719d911017c592": b"hello",
        "9d/d4e461268c8034f5c8564e155c67a6": b"y",
        f"{hashlib.md5(listed).hexdigest()[:2]}/{hashlib.md5(listed).hexdigest()[2:]}.dir": listed,
    }
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "5d/half.tmp").write_text("of a copy that was killed")
    assert {str(path.relative_to(tmp_path)): is_whole(path) for path in objects(tmp_path)} == dict(
        zip(sorted(names), [name != "9d/d4e461268c8034f5c8564e155c67a6" for name in sorted(names)], strict=True)
    )


def test_a_lock_of_a_process_that_is_gone_stops_nobody(checkout: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    locks = checkout / ".dvc/tmp"
    locks.mkdir(exist_ok=True)
    owner = {"pid": gone.pid, "cmd": "dvc repro"}
    held = {str(checkout / "out/one.txt"): owner}
    (locks / "rwlock").write_text(json.dumps({"write": held, "read": {str(checkout / "input.txt"): [owner]}}))
    (locks / "lock").write_text(f"{gone.pid}\n")
    done = reproduce(checkout)
    assert done.returncode == 0, done.stderr
    assert f"(Pid {gone.pid}), in RWLock-file" in done.stderr
    assert not json.loads((locks / "rwlock").read_text()).get("write")


def test_the_clock_jumps_while_a_stage_runs(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back and a day on: costs are counted by a clock that nobody sets, and the newest state has most steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "CHATLOOM_REPRODUCTION"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path)
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train_sft": {"params": ["train_sft"], "deps": ["x"]}}}))
    Path("x").write_text("")
    real = time.time
    with stage("train_sft") as one:
        checkpoints = one.checkpoints(1)
        assert checkpoints is not None
        for step, hours in ((1, 24), (2, -24), (3, 48)):
            monkeypatch.setattr(time, "time", lambda hours=hours: real() + hours * 3600)
            one.log(step, {"train/loss": 1 / step})
            checkpoints.save(step, {"step": step})
        assert checkpoints.load() == (3, {"step": 3})
        assert [path.name[:13] for path in sorted(checkpoints.folder.glob("step-*"))] == [
            "step-00000002",
            "step-00000003",
        ]
    mlflow.set_tracking_uri(None)
    (found,) = _runs(tmp_path)
    assert found.info.status == "FINISHED"
    assert 0 < found.data.metrics["cost/wall_s"] < 2 * 3600
    assert Path("plots/train_sft/train.csv").read_text().splitlines() == ["step,loss", "1,1.0", "2,0.5", f"3,{1 / 3}"]


def test_dvc_sees_an_edit_that_seems_older_than_its_last_run(checkout: Path) -> None:
    assert reproduce(checkout).returncode == 0
    (checkout / "input.txt").write_text("INPUT.txt\n")  # of equal length
    os.utime(checkout / "input.txt", (0, 0))
    assert reproduce(checkout).stdout.count("Running stage") == 2
    assert (checkout / "out/two.txt").read_text() == "INPUT.txt\n"
