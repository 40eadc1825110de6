"""The harness of every stage: values in; outs, metrics, curves and an MLflow run out.

    with stage("train_sft") as run:
        with run.out("models/sft") as folder:
            ...

Files DVC hashes never hold a run id or a time, those of `register` apart, so that equal work gives equal bytes. What is
measured goes to DVC (files) and to MLflow (a run) from one call, so that the two cannot differ.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.logging import RichHandler

from chatloom.config import Params, load_params
from chatloom.errors import EX_TEMPFAIL, InputError, Unavailable
from chatloom.files import atomic_dir, atomic_file, write_json
from chatloom.parallel.launch import is_first, report_failure, stop_with_dvc
from stages.recorded import hash_outs, measure_cost, require_writable
from stages.tracking import MlflowRun, Numbers, Untracked

if TYPE_CHECKING:
    from chatloom.parallel.ranks import Ranks
    from chatloom.resume import Checkpoints

log = logging.getLogger("stages.run")

REPRODUCTION, PRESET = "CHATLOOM_REPRODUCTION", "CHATLOOM_PRESET"
STATE = Path(".state")
"""Resumable states, a folder a stage: outside the outs, which DVC deletes before it runs a stage."""
WALL_CLOCK = "time"
"""The part of metrics that no two runs share: MLflow has them, files do not."""


class _Terminated(BaseException):
    """SIGTERM, as an exception: `with` blocks end as they do on Ctrl-C."""


@contextmanager
def stage(name: str, *, needs_mlflow: bool = False) -> Iterator[StageRun]:
    """Run the block as the stage `name`, in the folder that holds `params.yaml`.

    An `InputError` is one line on stderr and exit status 1, or 75 where another try may help (`Unavailable`); any other
    exception keeps its traceback. Metrics and curves are written when the block has ended well, all of them or none. Of
    several processes that run it together, the first one records and writes; the others are silent.

    Args:
        needs_mlflow: it cannot do its work without, whatever `tracking.on_outage` says.
    """
    with log_to_stderr(), _sigterm_raises():
        started = time.monotonic()
        stop_with_dvc()
        try:
            params = load_params()
            require_writable(name)
            with _alone(name):
                tracked = _track(name, params, needs_mlflow)
                try:
                    run = StageRun(name, params, tracked)
                    yield run
                    if is_first():
                        run._write()
                except BaseException as error:
                    tracked.end_badly("KILLED" if isinstance(error, KeyboardInterrupt | _Terminated) else "FAILED")
                    raise
                tracked.end("FINISHED")
                run._forget_state()
        except InputError as error:
            if not report_failure(f"{name}: {error}"):
                log.error("%s: %s", name, error)
            raise SystemExit(EX_TEMPFAIL if isinstance(error, Unavailable) else 1) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            text = f"{name}: {error}; make room and run again, which goes on from the last saved state"
            if not report_failure(text):
                log.error("%s", text)
            raise SystemExit(1) from None
        except (KeyboardInterrupt, _Terminated) as interrupt:
            log.error("%s: interrupted", name)
            raise SystemExit(143 if isinstance(interrupt, _Terminated) else 130) from None
        log.info("%s: done in %.1f s", name, time.monotonic() - started)


class StageRun:
    """What `stage` hands to its block."""

    def __init__(self, name: str, params: Params, tracked: MlflowRun | Untracked) -> None:
        self.name, self.params = name, params
        self._tracked = tracked
        self._curves: dict[str, dict[int, dict[str, float]]] = {}
        self._tables: dict[str, dict[str, list[Any]]] = {}
        self._metrics: dict[str, Any] | None = None
        self._totals: dict[str, float] = {}
        self._checkpoints: Checkpoints | None = None

    def out(self, path: str) -> AbstractContextManager[Path]:
        """A fresh folder that becomes the out `path` when the block ends well."""
        return atomic_dir(Path(path))

    def checkpoints(self, every: int, ranks: Ranks | None = None) -> Checkpoints | None:
        """Where a loop saves its state every so many steps, with the curves and tables so far; gone when all is done.

        None in a folder without a `dvc.yaml` that lists the stage: what its result depends on is unknown there, and a
        state that may be of other data or code is worse than none.
        """
        # With torch behind them, which stages without a loop need not wait for.
        from chatloom.parallel.ranks import ALONE
        from chatloom.resume import Checkpoints
        from stages.fingerprint import fingerprint

        ranks = ranks or ALONE
        # The first rank's counts: what it hashes are gigabytes, and the loops see to it that all have the same.
        depends_on = ranks.gather(fingerprint(self.name, self.params) if ranks.rank == 0 else None)[0]
        if depends_on is None:
            log.info("%s: no dvc.yaml here lists it: its state is not saved", self.name)
            return None
        self._checkpoints = Checkpoints(STATE / self.name, depends_on, every, self, ranks)
        return self._checkpoints

    def log(self, step: int, values: Numbers) -> None:
        """Values of one step, `{"train/loss": 1.2}`: column `loss` of `plots/<stage>/train.csv`, and MLflow.

        The part `time` goes to MLflow only. A loop that resumes logs from its next step on: what it logged up to its
        checkpoint comes back from there, so that files and the new MLflow run hold the whole curve.
        """
        for metric, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {float(value)} at step {step}")
            part, slash, column = metric.partition("/")
            if not slash or not part or not column:
                raise ValueError(f"metric {metric!r} has no part: name it like 'train/loss'")
            self._curves.setdefault(part, {}).setdefault(step, {})[column] = float(value)
        self._tracked.metrics(values, step)

    def metrics(self, values: Numbers) -> None:
        """The stage's results, `{"reward/accuracy": 0.7}`, once: nested in `metrics/<stage>.json`, and MLflow.

        The part `time` goes to MLflow only.
        """
        assert self._metrics is None, "a stage reports its metrics once"
        for metric, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {float(value)}")
        self._totals = dict(values)
        self._metrics = nested({name: value for name, value in values.items() if not name.startswith(f"{WALL_CLOCK}/")})
        self._tracked.metrics(values)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows to look at in MLflow, under `tables/<name>.json`; a second call appends."""
        rows = self._tables.setdefault(name, {})
        for column, cells in columns.items():
            rows.setdefault(column, []).extend(cells)
        self._tracked.table(name, columns)

    def rows(self, name: str) -> dict[str, list[Any]]:
        """All rows of the table `name` so far, those from before a resume too."""
        return self._tables.get(name, {})

    def report(self, name: str, value: Any) -> None:
        """`value` as `reports/<name>.json`, and as an artifact of the run."""
        path = Path("reports", f"{name}.json")
        write_json(path, value)
        self.artifact(path)

    def artifact(self, path: Path) -> None:
        """A file the stage wrote under `reports/`, as an artifact of the run too."""
        self._tracked.artifact(path, "reports")

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure as `reports/<name>.png`, and as an artifact of the run."""
        path = Path("reports", f"{name}.png")
        with atomic_file(path) as temporary:
            # Without the version of matplotlib in it: equal figures are equal files.
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        self.artifact(path)

    def dataset(self, path: str | Path, name: str) -> None:
        """Record what the stage read: a few rows of it, and its DVC hash as the digest."""
        self._tracked.dataset(Path(path), name)

    def state_dict(self) -> dict[str, Any]:
        """What was logged so far, to be saved with the loop's state."""
        return {"curves": self._curves, "tables": self._tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was logged until then: it is logged to this run too."""
        self._curves, self._tables = state["curves"], state["tables"]
        points = [
            (f"{part}/{column}", step, value)
            for part, rows in self._curves.items()
            for step, row in rows.items()
            for column, value in row.items()
        ]
        self._tracked.curves(points)
        for name, columns in self._tables.items():
            self._tracked.table(name, columns)

    def _write(self) -> None:
        if self._curves:
            with atomic_dir(Path("plots", self.name)) as folder:
                for part, rows in self._curves.items():
                    if part != WALL_CLOCK:
                        _write_curve(folder / f"{part}.csv", rows)
        if self._metrics is not None:
            write_json(Path("metrics", f"{self.name}.json"), self._metrics)
        self._tracked.outs(hash_outs(self.name))
        self._tracked.metrics(measure_cost(self._totals))

    def _forget_state(self) -> None:
        """Last of all: a stage that cannot say what it did is run again, and has to go on from it."""
        if self._checkpoints is not None and is_first():
            self._checkpoints.remove()


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`; a name that is both a value and a group is a ValueError."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split("/")
        inside = tree
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise ValueError(f"metric {name!r}: {group!r} is a value already")
        if leaf in inside:
            raise ValueError(f"metric {name!r} is given twice, or is also a group")
        inside[leaf] = value
    return tree


def _write_curve(path: Path, rows: dict[int, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **rows[step]} for step in sorted(rows))


def _track(name: str, params: Params, needs_mlflow: bool) -> MlflowRun | Untracked:
    if not is_first():
        return Untracked()
    preset = os.environ.get(PRESET) or "default"
    return MlflowRun.start(name, params, Path.cwd(), preset, _reproduction(), needs_mlflow)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Where DVC starts the stage: wait for one of this workspace whose DVC was killed, and which saves its state."""
    if "DVC_STAGE" not in os.environ or not is_first():
        yield
        return
    STATE.mkdir(exist_ok=True)
    with (STATE / f"{name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            log.warning("%s: process %s still runs it here, without DVC; waiting for its end", name, lock.read())
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _reproduction() -> str | None:
    """The reproduction this stage is part of, if it is."""
    reproduction = os.environ.get(REPRODUCTION)
    if reproduction and not re.fullmatch(r"[\w.:+-]+", reproduction):
        raise InputError(f"{REPRODUCTION}={reproduction!r}: use letters, digits and . _ : + - only")
    return reproduction or None


class _Stderr:
    """Today's `sys.stderr`: while a live bar is up, rich puts its own there, which writes lines above the bar."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Our own modules from INFO up, everybody else's from WARNING up."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    if sys.stderr.isatty():
        console = Console(file=cast("IO[str]", _Stderr()), force_terminal=True)
        handler = RichHandler(console=console, show_path=False, log_time_format="%X")
    ours = [logging.getLogger(name) for name in ("__main__", "stages", "chatloom")]
    levels = [logger.level for logger in ours]
    for logger in ours:
        logger.setLevel(logging.INFO if is_first() else logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
