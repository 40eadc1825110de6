"""Starting the processes of one stage, and ending them: all or none.

The stage's own command starts `num_processes` copies of itself with torch.distributed's elastic agent, waits, and
says what went wrong first. Where somebody else has started them (torchrun, `colossalai run`, SLURM, a Kubernetes
PyTorchJob), it finds that in the environment and is one of them.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from chatloom.config import Parallel
from chatloom.errors import InputError

log = logging.getLogger(__name__)

FAILURES = "CHATLOOM_FAILURES"
"""Folder in which each process that a launcher of ours started leaves why it failed."""
GRACE_S = 24 * 3600
"""Seconds that processes have, once a stop was asked for, to finish their step and save their state: whoever asked may
be less patient, and kill the launcher, with whom they all die."""
PORT = int(os.environ.get("MASTER_PORT", "29500"))
"""Where the processes of several nodes meet."""
SSH_PORT, REACH_S = 22, 5
_SET_PARENT_DEATH_SIGNAL = 1


def is_worker() -> bool:
    """Whether somebody started this process as one of several.

    Raises:
        InputError: where SLURM did, and does not say who the first node is.
    """
    _adopt_slurm(os.environ)
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return os.environ.get("RANK", "0") == "0"


def stop_with_dvc() -> None:
    """Where DVC runs this process as a stage, be told to stop (SIGTERM) if DVC dies: nobody would record what we make.

    It is no ending: a training loop saves its state. Who was told already is not told again, which would end it at
    once: a stop is often meant for DVC and for us.
    """
    if "DVC_STAGE" not in os.environ or "RANK" in os.environ:  # ranks have their launcher
        return
    dvc = os.pidfd_open(_dvc().pid)
    told, tells = os.pipe2(os.O_NONBLOCK)  # never closed: Python writes the number of each signal into it
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    main = threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        while True:
            ready, _, _ = select.select([dvc, told], [], [])
            if told in ready and {signal.SIGTERM, signal.SIGINT} & set(os.read(told, 4096)):
                return
            if dvc in ready:
                signal.pthread_kill(main, signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True, name="stop_with_dvc").start()


def _dvc() -> psutil.Process:
    """The process that runs us as a stage: our parent, or above the shell of the stage's command."""
    above = psutil.Process().parents()
    for process in above:
        with suppress(psutil.AccessDenied):
            if process.environ().get("DVC_STAGE") == os.environ["DVC_STAGE"]:
                continue
        return process
    return above[-1]


def report_failure(text: str, *, follows: bool = False) -> bool:
    """Leave `text` to the launcher to show; False where no launcher of ours started this process.

    Args:
        follows: it is about the connection to another rank, which is what failed.
    """
    folder = os.environ.get(FAILURES)
    if folder is None or "RANK" not in os.environ:
        return False
    word = {"rank": int(os.environ["RANK"]), "at": time.time(), "follows": follows, "text": text}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(word), encoding="utf-8")
    return True


def start_workers(module: str, parallel: Parallel) -> int:
    """Start this module in the processes that `parallel` asks for and wait for them; their exit status.

    With a hostfile, `NODE_RANK` in the environment says which of its nodes this one is: each starts its own processes.
    Without `NODE_RANK` this is the first node, and `colossalai run` starts them everywhere, over ssh.

    Raises:
        InputError: naming what is wrong with the hostfile, or which host cannot be reached.
    """
    hosts = read_hosts(parallel) if parallel.hostfile is not None else ["localhost"]
    processes = parallel.num_processes // len(hosts)
    if len(hosts) > 1 and "NODE_RANK" not in os.environ:
        return _start_everywhere(module, hosts, processes, str(parallel.hostfile))
    return _start_here(module, hosts, processes)


def read_hosts(parallel: Parallel) -> list[str]:
    """The nodes that `parallel.hostfile` names.

    Raises:
        InputError: naming the file, the line and the remedy.
    """
    path = Path(str(parallel.hostfile))
    if not path.is_file():
        raise InputError(f"parallel.hostfile = {str(path)!r}: no such file; write the nodes' names into it, one a line")
    hosts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        host = line.strip()
        if host in hosts:
            raise InputError(f"{path}, line {number}: {host!r} is there already; name each node once")
        if host:
            hosts.append(host)
    if not hosts:
        raise InputError(f"{path}: it names no host; write the nodes' names into it, one a line")
    if parallel.num_processes % len(hosts):
        raise InputError(
            f"parallel.num_processes = {parallel.num_processes} cannot be shared by the {len(hosts)} hosts of {path}: "
            "each runs as many as the others"
        )
    return hosts


def require_reachable(host: str, hostfile: str) -> None:
    """Its name is known, and it is this machine or answers on ssh's port.

    Raises:
        InputError: where it is not so.
    """
    try:
        if _is_here(socket.gethostbyname(host)):
            return
        socket.create_connection((host, SSH_PORT), timeout=REACH_S).close()
    except OSError as error:
        raise InputError(
            f"{hostfile}: {host!r} cannot be reached on port {SSH_PORT} ({error}); correct its name, or start it"
        ) from error


def _is_here(address: str) -> bool:
    own = {known.address for addresses in psutil.net_if_addrs().values() for known in addresses}
    return address.startswith("127.") or address in own


def _start_everywhere(module: str, hosts: list[str], processes: int, hostfile: str) -> int:
    for host in hosts:
        require_reachable(host, hostfile)
    command = [str(Path(sys.executable).with_name("colossalai")), "run", "--hostfile", hostfile]
    command += ["--nproc_per_node", str(processes), "--master_addr", hosts[0], "--master_port", str(PORT), "-m", module]
    log.info("%s", " ".join(command))
    # It starts `torchrun` by that name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = in_double_quotes({**os.environ, "PATH": path})
    runner = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.killpg(runner.pid, number)  # all that it started here, which it would leave behind

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = runner.wait()
        while is_left(runner.pid):  # it ends at once where it is told to; what it started saves its state first
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def is_left(group: int) -> bool:
    """Whether a process of this group is running."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def in_double_quotes(environment: Mapping[str, str]) -> dict[str, str]:
    """Values that mean themselves where `colossalai run` puts them: between double quotes, into a shell's `export`.

    Names that a shell does not take are left out: those of bash's own functions.
    """
    return {name: re.sub(r'([\\"$`])', r"\\\1", value) for name, value in environment.items() if name.isidentifier()}


def _start_here(module: str, hosts: list[str], processes: int) -> int:
    """The processes of this node, under torch.distributed's elastic agent."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from chatloom.parallel.ranks import MEETING

    patience = int(MEETING.total_seconds())
    # Its own account of failures repeats ours at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if len(hosts) == 1:
        meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # a free port
    else:
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{hosts[0]}:{PORT}",
            "rdzv_configs": {"rank": int(os.environ["NODE_RANK"]), "timeout": patience},
        }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with tempfile.TemporaryDirectory() as failures:
        os.environ[FAILURES] = failures
        config = LaunchConfig(
            min_nodes=len(hosts),
            max_nodes=len(hosts),
            nproc_per_node=processes,
            run_id=module,
            max_restarts=0,
            shutdown_timeout=GRACE_S,
            **meeting,
        )
        try:
            elastic_launch(config, sys.executable)("-m", module)
        except ChildFailedError as error:
            killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
            log.error("%s", first_failure(Path(failures), killed))
            return 1
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except DistError as error:
            raise InputError(
                f"parallel.hostfile: {hosts[0]}:{PORT}, where the nodes meet, was not reached in {patience} s; start "
                "the command there too, with NODE_RANK=0, or correct the file's first line"
            ) from error
        finally:
            for number, handler in handlers.items():  # the agent's own would stay
                signal.signal(number, handler)
    return 0


def first_failure(folder: Path, killed: Mapping[int, int]) -> str:
    """Why the processes ended, in the words of the one that failed first.

    Args:
        folder: where they left their words.
        killed: by rank, the signal that ended a process which could leave none.
    """
    words = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    words.sort(key=lambda word: (word["follows"], word["at"]))
    if words and not words[0]["follows"]:
        return f"rank {words[0]['rank']}: {words[0]['text']}"
    for rank, number in killed.items():
        if number not in (signal.SIGTERM, signal.SIGINT):
            hint = " (out of memory?)" if number == signal.SIGKILL else ""
            return f"rank {rank} was ended by {signal.Signals(number).name}{hint}; the other ranks were stopped"
    return f"rank {words[0]['rank']}: {words[0]['text']}" if words else "a process ended without a word"


def run_worker(main: Callable[[], None]) -> NoReturn:
    """Run `main` as one of several processes, with their launcher or not at all, and end this one."""
    if FAILURES in os.environ:
        # Die with the launcher, however it dies.
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    try:
        main()
    except Exception as error:
        # Gloo's and NCCL's errors are plain RuntimeErrors that say whose connection it was.
        follows = isinstance(error, RuntimeError) and "peer" in str(error)
        if not report_failure(traceback.format_exc(), follows=follows):
            raise
        raise SystemExit(1) from None
    # Its work is done. Threads of the libraries' C++ parts that are still about when the interpreter ends abort it now
    # and then, and a rank that aborts takes the others down.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Under `srun`, say what torch.distributed wants to hear in its own words.

    Raises:
        InputError: where SLURM does not say who the first node is.
    """
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in environment:
        return
    if "MASTER_ADDR" not in environment:
        raise InputError("MASTER_ADDR is not set: export the name of the job's first node before srun")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment.get("SLURM_NTASKS_PER_NODE", "1")
    environment.setdefault("MASTER_PORT", "29500")
