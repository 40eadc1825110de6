"""From results to ratios, tables and pictures. Nothing here is typed in: all of it is computed from the JSON files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bench.pages import table
from bench.parts import OURS, PARTS, Comparison, Measure, Part
from bench.results import Measurement, Result
from chatloom.errors import InputError

GIB = 2**30
Measured = list[tuple[Part, Measurement]]


@dataclass(frozen=True)
class Line:
    """A comparison as it was measured."""

    what: str
    measure: Measure
    unit: str
    ours: float
    """Median over the rounds, as `other`."""
    other: float
    ratios: tuple[float, ...]
    """Of each round: its two sides ran one after the other."""
    target: float | None
    holds: bool | None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def less_is_better(self) -> bool:
        return self.measure == "memory"


@dataclass(frozen=True)
class Point:
    """A side of a scaling part: medians over the rounds."""

    axis: str
    value: float
    unit: str
    per_second: float
    peak_bytes: float


def lines_of(part: Part, measurement: Measurement) -> list[Line]:
    return [_line(comparison, measurement.rounds()) for comparison in part.comparisons]


def points_of(part: Part, measurement: Measurement) -> list[Point]:
    rounds = measurement.rounds()
    points = []
    for side in part.sides:
        results = [results[side.name] for results in rounds]
        if side.axis:
            points.append(
                Point(
                    side.axis,
                    side.value or float(results[0].details[side.axis]),
                    results[0].unit,
                    statistics.median(result.per_second for result in results),
                    statistics.median(result.peak_bytes for result in results),
                )
            )
    return points


def all_lines(measured: Measured) -> list[Line]:
    return [line for part, measurement in measured for line in lines_of(part, measurement)]


def all_points(measured: Measured) -> list[Point]:
    return [point for part, measurement in measured for point in points_of(part, measurement)]


def _line(comparison: Comparison, rounds: Sequence[Mapping[str, Result]]) -> Line:
    pairs = [_pair(comparison, results) for results in rounds]
    ratios = tuple(ours / other for ours, other in pairs)
    return Line(
        what=comparison.what,
        measure=comparison.measure,
        unit={"memory": "GiB", "arithmetic": "GFLOP/s", "speed": f"{rounds[0][OURS].unit}/s"}[comparison.measure],
        ours=statistics.median(ours for ours, _ in pairs),
        other=statistics.median(other for _, other in pairs),
        ratios=ratios,
        target=comparison.target,
        holds=comparison.holds(statistics.median(ratios)),
    )


def _pair(comparison: Comparison, results: Mapping[str, Result]) -> tuple[float, float]:
    """Ours and the best of the others, in the unit that is shown."""
    ours = results[OURS]
    if comparison.measure == "arithmetic":
        flops, rate = float(ours.details["flops"]), float(ours.details["matmul_flops_per_s"])
        return flops / ours.seconds / 1e9, rate / 1e9
    others = [results[name] for name in comparison.against]
    if comparison.measure == "memory":
        return ours.peak_bytes / GIB, min(other.peak_bytes for other in others) / GIB
    return ours.per_second, max(other.per_second for other in others)


def measured_parts(measurements: Mapping[str, Measurement]) -> Measured:
    """In the order of `PARTS`.

    Raises:
        InputError: where a part was measured with other sides than it has now.
    """
    measured = [(part, measurements[part.name]) for part in PARTS if part.name in measurements]
    for part, measurement in measured:
        if {run.side for run in measurement.runs} != {side.name for side in part.sides}:
            raise InputError(f"{part.name}.json: the part has other sides by now; measure it again, or delete the file")
    return measured


def number(value: float) -> str:
    """Three figures, and none lost before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(line: Line) -> tuple[str, ...]:
    """What, ours, the other's, ratio with its spread, target, whether it holds."""
    sign = "≤" if line.less_is_better else "≥"
    spread = f"{line.ratio:.2f}x ({min(line.ratios):.2f} to {max(line.ratios):.2f})"
    return (
        line.what,
        f"{number(line.ours)} {line.unit}",
        f"{number(line.other)} {line.unit}",
        spread,
        "" if line.target is None else f"{sign} {line.target:g}x",
        {None: "", True: "yes", False: "no"}[line.holds],
    )


HEAD = ("what", "ours", "theirs", "ratio (lowest to highest)", "target", "met")
SCALING_HEAD = ("what grows", "", "speed", "peak memory")
SIDES_HEAD = ("part", "side", "speed", "peak memory", "loss", "first KL", "response tokens")
CHECKS = ("loss", "first_kl", "response_tokens")
"""Details that two sides doing the same work have in common, in the order of the head."""


def point_cells(point: Point) -> tuple[str, ...]:
    speed = f"{number(point.per_second)} {point.unit}/s"
    return point.axis, f"{point.value:,.0f}", speed, f"{point.peak_bytes / GIB:.2f} GiB"


def side_cells(part: Part, measurement: Measurement) -> list[tuple[str, ...]]:
    """Each side by itself: medians over the rounds."""
    rows = []
    for side in part.sides:
        results = [results[side.name] for results in measurement.rounds()]
        speed = statistics.median(result.per_second for result in results)
        memory = statistics.median(result.peak_bytes for result in results) / GIB
        found = [[float(result.details[name]) for result in results if name in result.details] for name in CHECKS]
        checks = [f"{statistics.median(values):.4g}" if values else "" for values in found]
        rows.append((part.name, side.name, f"{number(speed)} {results[0].unit}/s", f"{memory:.2f} GiB", *checks))
    return rows


def terminal_tables(measured: Measured) -> list[Table]:
    return [_rich(head, rows) for head, rows in _tables(measured)]


def _tables(measured: Measured) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
    """Head and rows of comparisons and of scaling, where there are any."""
    lines = [cells(line) for line in all_lines(measured)]
    points = [point_cells(point) for point in all_points(measured)]
    return [(head, rows) for head, rows in ((HEAD, lines), (SCALING_HEAD, points)) if rows]


def _rich(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head)
    for row in rows:
        style = {"yes": "green", "no": "red"}.get(row[-1])
        table.add_row(*row, style=style)
    return table


def markdown(measured: Measured, pictures: Sequence[str]) -> str:
    """The results section of the page.

    Raises:
        InputError: where a result is of a smoke run.
    """
    for part, measurement in measured:
        if measurement.smoke:
            raise InputError(f"{part.name}: a smoke run's figures mean nothing; measure it, or name other --results")
    machines = dict.fromkeys(measurement.machine.line for _, measurement in measured)
    blocks = ["\n".join(f"- {line}" for line in (*machines, *_versions(measured)))]
    blocks += [table(head, rows) for head, rows in _tables(measured)]
    if sides := [row for part, measurement in measured if part.comparisons for row in side_cells(part, measurement)]:
        blocks.append(table(SIDES_HEAD, sides))
    blocks.append(table(("part", "rounds", "finished", "load before a run"), [_when(m) for _, m in measured]))
    blocks += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    return "\n\n".join(blocks)


def _versions(measured: Measured) -> list[str]:
    """One line for each set of packages and threads that was measured, with the sides that had it."""
    found: dict[str, dict[str, None]] = {}
    for _, measurement in measured:
        for run in measurement.runs:
            packages = ", ".join(f"{name} {version}" for name, version in run.result.versions.items())
            found.setdefault(f"{packages}; {run.result.threads} threads", {})[_family(run.side)] = None
    return [f"{', '.join(sides)}: {line}" for line, sides in found.items()]


def _family(side: str) -> str:
    """A side of a scaling part is ours too."""
    return next((OURS for part in PARTS for known in part.sides if known.name == side and known.axis), side)


def _when(measurement: Measurement) -> tuple[str, ...]:
    loads = [run.load_before for run in measurement.runs]
    return (
        measurement.part,
        str(len(measurement.rounds())),
        measurement.finished,
        f"{min(loads):.1f} to {max(loads):.1f}",
    )
