"""Starting processes and ending them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from chatloom.config import Parallel
from chatloom.errors import InputError
from chatloom.parallel import launch
from tests.conftest import ROOT
from tests.loopback import free_port, is_over, poll

PATIENCE_S = 240

TWO = Parallel(strategy="ddp", num_processes=2, tensor_size=1, hostfile=None)


def test_the_first_failure_is_told_and_what_follows_from_it_is_not(tmp_path: Path) -> None:
    def word(rank: int, at: float, follows: bool, text: str) -> None:
        content = {"rank": rank, "at": at, "follows": follows, "text": text}
        (tmp_path / f"{rank}.json").write_text(json.dumps(content))

    assert launch.first_failure(tmp_path, {1: signal.SIGTERM}) == "a process ended without a word"
    word(0, 1.0, True, "Connection closed by peer")
    assert launch.first_failure(tmp_path, {}) == "rank 0: Connection closed by peer"
    killed = launch.first_failure(tmp_path, {1: signal.SIGKILL, 2: signal.SIGTERM})
    assert killed == "rank 1 was ended by SIGKILL (out of memory?); the other ranks were stopped"
    word(3, 3.0, False, "later")
    word(2, 2.0, False, "train_sft: the loss is nan")
    assert launch.first_failure(tmp_path, {1: signal.SIGKILL}) == "rank 2: train_sft: the loss is nan"


@pytest.mark.parametrize(
    ("content", "processes", "message"),
    [
        (None, 2, r"parallel\.hostfile = '.*hosts': no such file"),
        ("\n", 2, r"hosts: it names no host"),
        ("127.0.0.1\n127.0.0.1\n", 2, r"hosts, line 2: '127\.0\.0\.1' is there already"),
        ("127.0.0.1\n127.0.0.2\n", 3, r"num_processes = 3 cannot be shared by the 2 hosts"),
    ],
)
def test_a_bad_hostfile_is_named(content: str | None, processes: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        launch.read_hosts(Parallel(strategy="ddp", num_processes=processes, tensor_size=1, hostfile=str(file)))


def test_a_host_that_does_not_answer_is_named() -> None:
    launch.require_reachable("127.0.0.2", "hosts")
    with pytest.raises(InputError, match=r"hosts: 'no-such-host\.invalid' cannot be reached on port 22 .*correct"):
        launch.require_reachable("no-such-host.invalid", "hosts")


def test_hosts_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.2\n\n 127.0.0.1 \n")
    assert launch.read_hosts(TWO.model_copy(update={"hostfile": str(tmp_path / "hosts")})) == ["127.0.0.2", "127.0.0.1"]


def test_a_shell_gives_back_what_was_put_into_double_quotes() -> None:
    value = 'a "quoted" word, $HOME, `id`, a \\ and 你'
    (quoted,) = launch.in_double_quotes({"A_NAME": value, "BASH_FUNC_which%%": "() { :; }"}).values()
    script = f'export A_NAME="{quoted}" && printf %s "$A_NAME"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == value


def test_a_group_is_left_until_its_last_process_is_gone() -> None:
    group = subprocess.Popen(["bash", "-c", "sleep 300 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
    assert group.stdout is not None
    last = int(group.stdout.readline())
    group.wait()
    assert launch.is_left(group.pid)
    os.kill(last, signal.SIGKILL)
    poll(lambda: not launch.is_left(group.pid), PATIENCE_S)


def test_slurm_is_understood() -> None:
    environment = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    with pytest.raises(InputError, match="MASTER_ADDR is not set: export the name of the job's first node"):
        launch._adopt_slurm(environment)
    environment["MASTER_ADDR"] = "node0"
    launch._adopt_slurm(environment)
    found = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    alone = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    launch._adopt_slurm(alone)
    assert "RANK" not in alone


# --- processes, connected and waiting for each other ---


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts tests/parallel/waiting.py: a launcher of its processes, or one of them if the environment says so."""
    started: list[subprocess.Popen[str]] = []

    def start(hostfile: str = "", **environment: str) -> subprocess.Popen[str]:
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "NODE_RANK")}
        inherited |= {"WAITING_FOLDER": str(tmp_path), "WAITING_HOSTS": hostfile, "PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, "-m", "tests.parallel.waiting"]
        started.append(subprocess.Popen(command, cwd=ROOT, env=inherited, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # the test has failed
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            process.communicate()


def workers_in(folder: Path) -> list[int]:
    """The ids of both processes by rank, once they are connected."""
    poll(lambda: len(list(folder.glob("*.pid"))) == 2, PATIENCE_S)
    return [int(file.read_text()) for file in sorted(folder.glob("*.pid"))]


@pytest.mark.smoke
def test_a_rank_that_is_killed_takes_all_down_and_is_named(start: Start, tmp_path: Path) -> None:
    launcher = start()
    workers = workers_in(tmp_path)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "rank 1 was ended by SIGKILL" in errors
    assert all(map(is_over, workers))


@pytest.mark.smoke
def test_processes_die_with_a_launcher_that_is_killed(start: Start, tmp_path: Path) -> None:
    launcher = start()
    workers = workers_in(tmp_path)
    launcher.kill()
    launcher.communicate(timeout=60)
    poll(lambda: all(map(is_over, workers)), PATIENCE_S)


@pytest.mark.smoke
def test_two_nodes_of_a_hostfile_meet_and_fail_together(start: Start, tmp_path: Path) -> None:
    """Two launchers on loopback, each with a process of its own."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\n127.0.0.2\n")
    port = str(free_port())
    nodes = [start(str(hosts), NODE_RANK=str(node), MASTER_PORT=port) for node in (0, 1)]
    errors = sum_and_fail(nodes, tmp_path)
    assert "rank 1: Traceback (most recent call last)" in errors[1]
    assert "ZeroDivisionError: in the middle of rank 1" in errors[1]


def sum_and_fail(started: list[subprocess.Popen[str]], folder: Path) -> list[str]:
    """Both ranks add up their numbers, then the second one fails, and all that was started ends; what each said."""
    workers = workers_in(folder)
    os.kill(workers[1], signal.SIGUSR2)
    poll((folder / "sum").is_file, PATIENCE_S)
    assert float((folder / "sum").read_text()) == 1 + 2
    os.kill(workers[1], signal.SIGUSR1)
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1] * len(started)
    assert all(map(is_over, workers))
    return errors


@pytest.mark.smoke
def test_one_command_starts_the_nodes_of_a_hostfile_by_colossalai_run(start: Start, tmp_path: Path) -> None:
    """Both names are this machine, which `colossalai run` reaches without ssh."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\nlocalhost\n")
    (errors,) = sum_and_fail([start(str(hosts), MASTER_PORT=str(free_port()))], tmp_path)
    assert "ZeroDivisionError: in the middle of rank 1" in errors


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("by", "environment"),
    [
        ("Kubernetes", {"RANK": "{rank}", "WORLD_SIZE": "2"}),
        ("SLURM", {"SLURM_PROCID": "{rank}", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}),
    ],
)
def test_ranks_that_others_start_find_each_other(
    by: str, environment: dict[str, str], start: Start, tmp_path: Path
) -> None:
    """By what a PyTorchJob or `srun` puts into the environment of each."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{name: text.format(rank=rank) for name, text in environment.items()} for rank in (0, 1)]
    errors = sum_and_fail([start(**rank, **meeting) for rank in ranks], tmp_path)
    assert "ZeroDivisionError: in the middle of rank 1" in errors[1]
