"""`chatloom verify`: everything behind a version hashed again, wherever its bytes can still be had."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatloom.errors import InputError
from chatloom.git import run_git
from chatloom.registry.hashes import DIRECTORY, dvc_dir_md5, dvc_md5
from chatloom.registry.lineage import INPUTS_TAG, NONE, OUT_TAG, Facts, read_stages
from chatloom.registry.resolve import registry_errors, resolve
from chatloom.registry.versions import read_version

State = Literal["same", "elsewhere", "changed", "missing", "unrepeatable", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What became of one thing behind a version."""

    kind: Literal["weights", "out", "dep", "file", "source", "stage", "code"]
    name: str
    state: State
    """`elsewhere`: not in the workspace as it was, but the right bytes are in DVC's cache or in git."""
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.state in ("changed", "missing", "unrepeatable", "unknown")


def check_version(uri: str, workspace: Path | None = None) -> list[Finding]:
    """Everything that stands behind the version `uri`, checked against its lineage.

    Args:
        workspace: where the stages ran; None for the current folder, or that of the version's preset below it.

    Raises:
        InputError: where the registry is down, or has no such version.
    """
    version = read_version(uri)
    facts = version.facts
    if workspace is None:
        own = Path("workspaces", facts["preset"])
        workspace = own if own.is_dir() else Path()
    weights = dvc_md5(resolve(f"models:/{version.name}/{version.number}").path)
    same = weights == facts["model"]["md5"]
    return [
        Finding(
            "weights",
            f"models:/{version.name}/{version.number}",
            "same" if same else "unknown" if facts["model"]["md5"] == NONE else "changed",
            "" if same else f"its files have the hash {weights}, {facts['model']['path']} had {facts['model']['md5']}",
        ),
        *_check_code(facts, workspace),
        *_check_recorded(facts, workspace),
        *_check_sources(facts, workspace),
        *check_repeats(facts),
    ]


def summarize(findings: Sequence[Finding]) -> str:
    """As text: what is not as it was, then how much is."""
    bad = [finding for finding in findings if finding.bad]
    elsewhere = [finding for finding in findings if finding.state == "elsewhere"]
    lines = [f"{f.state}: {f.kind} {f.name}{f': {f.detail}' if f.detail else ''}" for f in (*bad, *elsewhere)]
    same = sum(finding.state == "same" for finding in findings)
    lines.append(f"{same} the same, {len(elsewhere)} the same elsewhere, {len(bad)} not as they were")
    return "\n".join(lines)


def _check_code(facts: Facts, workspace: Path) -> Iterator[Finding]:
    revision = facts["code"]["revision"]
    if revision == NONE:
        yield Finding("code", "git", "unknown", "the version was made outside git: its code is known by hashes only")
    elif run_git(workspace, "cat-file", "-e", f"{revision}^{{commit}}") is None:
        yield Finding("code", revision, "missing", "this repository has no such commit; fetch it")
    elif facts["code"]["dirty"] == "true":
        yield Finding("code", revision, "same", "with uncommitted changes on top, known by hashes only")
    else:
        yield Finding("code", revision, "same")


def _check_recorded(facts: Facts, workspace: Path) -> Iterator[Finding]:
    """Deps, outs and files, each hash once."""
    outs = {path: md5 for stage in facts["stages"].values() for path, md5 in stage["outs"].items()}
    deps = {path: md5 for stage in facts["stages"].values() for path, md5 in stage["deps"].items()}
    lock = workspace / "dvc.lock"
    now = read_stages(lock) if lock.is_file() else {}
    claimed = {(path, md5) for stage in now.values() for path, md5 in stage["outs"].items()}
    kinds: tuple[tuple[Literal["out", "dep", "file"], Mapping[str, str]], ...] = (
        ("out", outs),
        ("dep", {path: md5 for path, md5 in deps.items() if path not in outs}),
        ("file", facts["files"]),
    )
    for kind, hashes in kinds:
        for path, md5 in hashes.items():
            if md5 != NONE:
                yield _look(kind, path, md5, workspace, facts["code"]["revision"], claimed=(path, md5) in claimed)


def _look(
    kind: Literal["out", "dep", "file"], path: str, md5: str, workspace: Path, revision: str, *, claimed: bool
) -> Finding:
    """The state of one path: as it was in the workspace, or else in DVC's cache or git.

    Args:
        claimed: whether the workspace's own `dvc.lock` names these bytes: others there were put behind DVC's back.
    """
    here = dvc_md5(workspace / path)
    if here == md5:
        return Finding(kind, path, "same")
    state: State = "missing" if here is None else "changed"
    cached = _cached_md5(_cache(workspace), md5) == md5
    if claimed and here is not None:
        remedy = f"dvc checkout --force {path}" if cached else "DVC's cache does not have the right bytes (dvc pull)"
        return Finding(kind, path, "changed", f"dvc.lock says {md5}, it is {here}; {remedy}")
    what = f"{state} in the workspace, the right bytes are in"
    if cached:
        return Finding(kind, path, "elsewhere", f"{what} DVC's cache")
    if revision != NONE and _git_md5(workspace, revision, path) == md5:
        return Finding(kind, path, "elsewhere", f"{what} git {revision[:12]}")
    if path == "params.yaml":
        return Finding(kind, path, "elsewhere", f"{state} in the workspace, its values are in the lineage")
    found = "nothing there" if here is None else f"now {here}"
    return Finding(
        kind, path, state, f"was {md5}, {found}, and neither DVC's cache nor git has it (dvc pull, git fetch)"
    )


def _check_sources(facts: Facts, workspace: Path) -> Iterator[Finding]:
    """The files that rows were read from, where they are files; what was downloaded is known by `data/raw`."""
    for source in facts["sources"]:
        if source["from"] is None or not source["files"]:
            yield Finding("source", source["name"], "unknown", "its rows were not recorded")
            continue
        for file in source["files"]:
            if file["sha256"] is None or "://" in file["file"]:
                continue
            path = workspace / os.path.expandvars(file["file"])
            name = f"{source['name']}: {file['file']}"
            if not path.is_file():
                yield Finding("source", name, "missing", f"no such file; its sha256 was {file['sha256']}")
                continue
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if sha256 == file["sha256"]:
                yield Finding("source", name, "same")
            else:
                yield Finding("source", name, "changed", f"its sha256 was {file['sha256']}, now it is {sha256}")


def check_repeats(facts: Facts) -> list[Finding]:
    """Stages of which two finished runs had equal inputs and made different bytes, whichever of them the version has.

    Runs on machines of different kinds may round differently; they are named, so that people can tell.
    """
    import mlflow

    findings = []
    for name, run in facts["runs"].items():
        with registry_errors(f"runs of {name}"):
            own = mlflow.MlflowClient().get_run(run["id"])
            inputs = own.data.tags.get(INPUTS_TAG)
            runs = mlflow.search_runs(
                search_all_experiments=True,
                filter_string=f"attributes.status = 'FINISHED' and tags.`chatloom.stage` = '{name}' "
                f"and tags.`{INPUTS_TAG}` = '{inputs}'",
                order_by=["attributes.start_time DESC"],
                output_format="list",
            )
        if inputs is not None:
            findings.append(_repeat(name, {run.info.run_id: run.data.tags for run in runs}))
    return findings


def _repeat(stage: str, runs: Mapping[str, Mapping[str, str]]) -> Finding:
    """One stage's runs of equal inputs: the outs that not all of them made alike."""
    made: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, tags in runs.items():
        for tag, md5 in tags.items():
            if tag.startswith(OUT_TAG):
                made[tag.removeprefix(OUT_TAG)][md5].append(run)
    differ = {path: hashes for path, hashes in made.items() if len(hashes) > 1}
    if not differ:
        return Finding("stage", stage, "same", f"{len(runs)} run{'s' if len(runs) > 1 else ''} of these inputs")
    what = "; ".join(
        f"{path}: " + ", ".join(f"{md5} (run {names[0]})" for md5, names in hashes.items())
        for path, hashes in differ.items()
    )
    machines = {json.dumps(_hardware(tags)) for tags in runs.values()}
    where = "on machines of different kinds" if len(machines) > 1 else "on one kind of machine"
    return Finding(
        "stage", stage, "unrepeatable", f"{len(runs)} runs of equal inputs, {where}, made different bytes: {what}"
    )


def _hardware(tags: Mapping[str, str]) -> list[Any]:
    machine = json.loads(tags.get("machine", "{}"))
    return [machine.get(key) for key in ("cpu", "cores", "gpus")]


def _cache(workspace: Path) -> Path:
    """The files of DVC's cache, as `.dvc/config` and `.dvc/config.local` place it."""
    folder = workspace / ".dvc"
    parser = configparser.ConfigParser()
    try:
        parser.read([folder / "config", folder / "config.local"], encoding="utf-8")
    except configparser.Error as error:
        raise InputError(f"{folder}/config: DVC's settings cannot be read: {error}") from error
    return folder / parser.get("cache", "dir", fallback="cache") / "files" / "md5"


def _cached_md5(cache: Path, md5: str) -> str | None:
    """The hash of what the cache holds under the name `md5`, every file of a folder hashed again."""
    entry = cache / md5[:2] / md5[2:]
    if not md5.endswith(DIRECTORY):
        return dvc_md5(entry)
    if not entry.is_file():
        return None
    files = {}
    for item in json.loads(entry.read_text(encoding="utf-8")):
        found = dvc_md5(cache / item["md5"][:2] / item["md5"][2:])
        if found is None:
            return None
        files[item["relpath"]] = found
    return dvc_dir_md5(files)


def _git_md5(workspace: Path, revision: str, path: str) -> str | None:
    """The hash of a file or folder as git has it at `revision`."""
    # Paths are those of the checkout, also where the workspace is a preset's, inside it.
    names = run_git(workspace, "ls-tree", "-r", "-z", "--full-tree", "--name-only", revision, "--", path)
    if not names:
        return None
    found = {}
    for name in names.decode().rstrip("\0").split("\0"):
        blob = run_git(workspace, "cat-file", "blob", f"{revision}:{name}")
        if blob is None:
            return None
        found[name] = hashlib.md5(blob, usedforsecurity=False).hexdigest()
    if list(found) == [path]:
        return found[path]
    return dvc_dir_md5({name.removeprefix(f"{path}/"): md5 for name, md5 in found.items()})
