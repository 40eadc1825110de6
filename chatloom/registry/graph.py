"""The lineage drawn: data at the top, the version at the bottom, as one SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from chatloom.registry.lineage import NONE, Facts, parents

INK, SOFT, LINE, PANEL = "#1f2933", "#52606d", "#cbd2d9", "#f8fafc"
LANES = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#b45309")
BOX, GAP, ROW_GAP, MARGIN, LANE = 345, 24, 38, 16, 13
LINE_HEIGHT, PADDING = 17, 11
SOURCES, VERSION = "sources", "version"
SHORT = 12
"""Characters of a hash that are shown."""


@dataclass(frozen=True)
class _Box:
    name: str
    lines: Sequence[str]
    x: float
    y: float

    @property
    def height(self) -> float:
        return 2 * PADDING + LINE_HEIGHT * (1 + len(self.lines))

    @property
    def right(self) -> float:
        return self.x + BOX


def draw_lineage(title: str, facts: Facts) -> str:
    """The stages below each other by depth; what a stage makes for a later row runs down a lane at the right."""
    edges = _edges(facts)
    texts = {SOURCES: _source_lines(facts), **{name: _stage_lines(facts, name) for name in facts["stages"]}}
    texts[VERSION] = [title, f"{facts['model']['path']} {facts['model']['md5'][:SHORT]}", _code_line(facts)]
    rows = _rows(edges, list(texts))
    boxes, height = _place(rows, texts)
    long = {name: [child for child in children if _is_long(rows, name, child)] for name, children in edges.items()}
    lanes = [name for name in texts if long.get(name)]
    right = max(box.right for box in boxes.values())
    width = right + LANE * (len(lanes) + 1) + MARGIN
    body = [_drop(boxes[name], boxes[child]) for name in edges for child in edges[name] if child not in long[name]]
    body += [
        _bus(
            boxes[name], [boxes[child] for child in long[name]], right + LANE * (number + 1), LANES[number % len(LANES)]
        )
        for number, name in enumerate(lanes)
    ]
    body += [_draw(box, last=box.name == VERSION) for box in boxes.values()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(f"Lineage of {title}")}" '
        f'font-family="system-ui, Noto Sans CJK SC, sans-serif" font-size="12">'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def page_of(title: str, svg: str) -> str:
    """The SVG on a page of its own."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><body style="margin:16px"><div style="overflow-x:auto">{svg}</div></body>'
        "</html>\n"
    )


def _edges(facts: Facts) -> dict[str, list[str]]:
    """Children of each box."""
    edges: dict[str, list[str]] = {SOURCES: [], **{name: [] for name in facts["stages"]}}
    for name in facts["stages"]:
        for parent in parents(facts["stages"], name):
            edges[parent].append(name)
    if "raw_data" in facts["stages"]:
        edges[SOURCES].append("raw_data")
    for name, stage in facts["stages"].items():
        if facts["model"]["path"] in stage["outs"] or not edges[name]:
            edges[name].append(VERSION)
    return edges


def _rows(edges: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, int]:
    """Row of each box: one below the lowest of its parents."""
    found: dict[str, int] = {}

    def row(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((row(parent) for parent, children in edges.items() if name in children), default=-1)
        return found[name]

    return {name: row(name) for name in names}


def _is_long(rows: Mapping[str, int], name: str, child: str) -> bool:
    return rows[child] - rows[name] > 1


def _place(rows: Mapping[str, int], texts: Mapping[str, Sequence[str]]) -> tuple[dict[str, _Box], float]:
    boxes: dict[str, _Box] = {}
    y = float(MARGIN)
    for row in range(max(rows.values()) + 1):
        here = [name for name in rows if rows[name] == row]
        for place, name in enumerate(here):
            boxes[name] = _Box(name, texts[name], MARGIN + place * (BOX + GAP), y)
        y += max(boxes[name].height for name in here) + ROW_GAP
    return boxes, y - ROW_GAP + MARGIN


def _draw(box: _Box, *, last: bool) -> str:
    lines = "".join(
        f'<text x="{box.x + PADDING:g}" y="{box.y + PADDING + LINE_HEIGHT * (1.75 + number):g}" fill="{SOFT}">'
        f"{escape(_cut(line))}</text>"
        for number, line in enumerate(box.lines)
    )
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{BOX}" height="{box.height:g}" rx="9" fill="{PANEL}" '
        f'stroke="{LANES[0] if last else LINE}"/>'
        f'<text x="{box.x + PADDING:g}" y="{box.y + PADDING + LINE_HEIGHT * 0.75:g}" fill="{INK}" font-weight="600" '
        f'font-size="13">{escape(box.name)}</text>{lines}'
    )


def _drop(parent: _Box, child: _Box) -> str:
    """From a box to one in the next row."""
    x1, y1, x2, y2 = parent.x + BOX / 2, parent.y + parent.height, child.x + BOX / 2, child.y
    middle = y2 - ROW_GAP / 2
    return f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" fill="none" stroke="{SOFT}"/>'


def _bus(parent: _Box, children: Sequence[_Box], x: float, color: str) -> str:
    """From a box down a lane to boxes further below; a dot where the lane is left."""
    start, ends = parent.y + parent.height - PADDING, [child.y + PADDING for child in children]
    path = f"M{parent.right:g} {start:g}H{x:g}V{max(ends):g}" + "".join(
        f"M{x:g} {end:g}H{child.right:g}" for child, end in zip(children, ends, strict=True)
    )
    dots = "".join(
        f'<circle cx="{child.right:g}" cy="{end:g}" r="3" fill="{color}"/>'
        for child, end in zip(children, ends, strict=True)
    )
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.3"/>{dots}'


def _source_lines(facts: Facts) -> list[str]:
    return [
        f"{source['name']}: {source['rows_out'] if source['rows_out'] is not None else '?'} rows, {source['license']}"
        for source in facts["sources"]
    ]


def _stage_lines(facts: Facts, name: str) -> list[str]:
    outs = {path: md5 for path, md5 in facts["stages"][name]["outs"].items() if path.startswith(("models/", "data/"))}
    run: Mapping[str, Any] | None = facts["runs"].get(name)
    return [
        *(f"{path} {md5[:SHORT]}" for path, md5 in outs.items()),
        f"run {run['id'][:SHORT]}, git {run['revision'][:SHORT]}" if run else "no run in MLflow made these bytes",
    ]


def _code_line(facts: Facts) -> str:
    code = facts["code"]
    state = {"true": ", changed since", NONE: ""}.get(code["dirty"], "")
    return f"git {code['revision'][:SHORT]}{state}, preset {facts['preset']}"


def _cut(line: str) -> str:
    return line if len(line) <= 50 else f"{line[:49]}…"
