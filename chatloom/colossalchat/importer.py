"""ColossalChat's data and settings as files of this project: rows that `raw_data` reads, a chat template, a preset."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from chatloom.colossalchat.lora import read_lora
from chatloom.colossalchat.rows import conversation
from chatloom.colossalchat.template import Template, load_tokenizer, read_template
from chatloom.data.drops import Drops, RowFault
from chatloom.data.schemas import Conversation, convert
from chatloom.data.sources import Item, SourceFile, local_files
from chatloom.errors import InputError
from chatloom.files import atomic_dir

OWN = Path("data/own")
"""Where a workspace of a preset finds the checkout's files under the same name."""
KINDS = {"instructions": "ranked", "preferences": "ranked", "prompts": "prompt"}
"""Files that are written, with the format that `raw_data` reads them by."""


@dataclass
class Report:
    preset: Path
    """Overrides of `params.yaml`, to be copied into `params/`."""
    rows: dict[str, int] = field(default_factory=dict)
    """By kind: instructions, preferences, prompts."""
    drops: Drops = field(default_factory=Drops)
    notes: list[str] = field(default_factory=list)
    """What has no counterpart here, or was chosen for the user."""


def import_colossalchat(
    data: Sequence[Path],
    out: Path,
    *,
    template: Path | None = None,
    base_model: Path | None = None,
    lora: Path | None = None,
    license: str = "unknown",
) -> Report:
    """Write what is given to the new folder `out`: `<kind>.jsonl`, `chat_template.jinja`, `params.yaml`.

    Args:
        data: files, or folders of files or of saved datasets (`jsonl/` and `arrow/` of `prepare_dataset.py`).
        template: a conversation template's JSON file; needs `base_model`, whose tokenizer knows its stop tokens.
        lora: a LoRA config's JSON file.

    Raises:
        InputError: naming the file and the row or key, where something cannot be used at all.
    """
    if not data and template is None and lora is None:
        raise InputError("nothing to import: name data files or folders, --template or --lora")
    if (template is None) != (base_model is None):
        raise InputError("--template and --base-model go together: stop_ids are numbers, the tokenizer knows the names")
    if out.exists():
        raise InputError(f"{out}: exists already; name a new folder with --out, or remove it")
    report = Report(out / "params.yaml")
    preset: dict[str, Any] = {}
    with atomic_dir(out) as folder:
        read = None
        if template is not None and base_model is not None:
            read = read_template(template, load_tokenizer(base_model))
            preset["base_model"] = _base_model(read, base_model, folder, out, report)
        if data:
            _write_rows(data, read, folder, report)
            preset["raw_data"] = {"sources": _sources(report.rows, out, license)}
        if lora is not None:
            stage = read_lora(lora, report.notes)
            # Copies, or YAML would write them as anchors.
            preset |= {name: copy.deepcopy(stage) for name in ("train_sft", "train_reward", "train_gold", "train_ppo")}
        (folder / "params.yaml").write_text(_yaml(preset, report.notes), encoding="utf-8")
    return report


def _base_model(template: Template, base_model: Path, folder: Path, out: Path, report: Report) -> dict[str, Any]:
    (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
    if template.unused:
        report.notes.append(f"{template.path}: keys without a place here: {', '.join(template.unused)}")
    report.notes.append("base_model.pad_token = null: padding gets a token of its own, not the EOS as in ColossalChat")
    return {
        "source": {"kind": "path", "path": str(base_model.resolve())},
        "pad_token": None,
        "stop_tokens": template.stop_tokens,
        "chat_template": _named(out / "chat_template.jinja"),
    }


def _sources(rows: dict[str, int], out: Path, license: str) -> list[dict[str, Any]]:
    """A source of `raw_data` for each kind; instructions also serve for preferences and prompts that are not there."""
    splits = {"preferences": ["reward"], "prompts": ["ppo"]}
    missing = [split for kind, [split] in splits.items() if kind not in rows]
    splits["instructions"] = ["sft", *missing, "ptx", "eval"]
    return [
        {
            "name": f"colossalchat-{kind}",
            "path": _named(out / f"{kind}.jsonl"),
            "format": KINDS[kind],
            "lang": None,
            "license": license,
            "splits": splits[kind],
            "group": None,
            "max_rows": None,
            "weight": 1,
        }
        for kind in KINDS
        if kind in rows
    ]


def _named(path: Path) -> str:
    """A path that means the same in the checkout and in a preset's workspace."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(OWN.resolve()) else path)


def _yaml(preset: dict[str, Any], notes: list[str]) -> str:
    lines = ["Written by `chatloom import-colossalchat`. A preset: put it into params/.", *notes]
    body: str = yaml.safe_dump(preset, sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"# {line}\n" for line in lines) + body


# --- rows -----------------------------------------------------------------------------------------------------------


def _write_rows(data: Sequence[Path], template: Template | None, folder: Path, report: Report) -> None:
    with ExitStack() as stack:
        files: dict[str, IO[str]] = {}
        for source in (source for path in data for source in _files(path)):
            for fields, row in _converted(source, template, report.drops):
                kind = ("prompts", "instructions")[len(row.responses)] if len(row.responses) < 2 else "preferences"
                if kind not in files:
                    files[kind] = stack.enter_context((folder / f"{kind}.jsonl").open("w", encoding="utf-8"))
                files[kind].write(json.dumps(_row(fields, row), ensure_ascii=False) + "\n")
                report.rows[kind] = report.rows.get(kind, 0) + 1


def _converted(
    source: SourceFile, template: Template | None, drops: Drops
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """Rows of one file with their own fields; those that cannot be used are counted.

    Raises:
        InputError: where the file has none that can.
    """
    own = Drops()
    rows = 0
    for number, fields in source.read():
        rows += 1
        try:
            if isinstance(fields, RowFault):
                raise fields
            yield dict(fields), convert(fields, "text") if source.is_text else conversation(fields, template)
        except RowFault as fault:
            own.add(fault.reason, f"{source.name}:{number}: {fault}")
    if not rows:
        raise InputError(f"{source.name}: no rows")
    if own.total == rows:
        raise InputError(f"{own.first()}\nnone of the {rows} rows of {source.name} can be used")
    drops.merge(own)


def _row(fields: dict[str, Any], row: Conversation) -> dict[str, Any]:
    own = {key: fields[key] for key in ("id", "lang") if fields.get(key) is not None}
    return {**own, "messages": row.messages} | ({"responses": row.responses} if row.responses else {})


def _files(path: Path) -> list[SourceFile]:
    """A file, the files of a folder, or the datasets that `save_to_disk` put there."""
    saved = [path] if _is_saved(path) else sorted(folder for folder in path.glob("*") if _is_saved(folder))
    if saved:
        return [SourceFile(str(folder), None, partial(_read_saved, folder)) for folder in saved]
    return local_files(str(path), str(path))[0]


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _read_saved(folder: Path) -> Iterator[Item]:
    # Seconds to import, and only this kind of file needs it.
    import datasets
    import pyarrow as pa

    try:
        yield from enumerate(datasets.load_from_disk(str(folder)), start=1)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{folder}: `datasets` cannot load it: {error}") from error
