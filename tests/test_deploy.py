"""`deploy/`, checked without containers: schemas of Compose and Kubernetes, and that its parts agree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from typer.main import get_command

from chatloom.cli import app
from chatloom.config import load_params, validate_params
from chatloom.parallel.launch import read_hosts
from deploy.make_buckets import make_buckets
from tests.conftest import ROOT
from tests.object_store import object_store

DEPLOY, KUBERNETES = ROOT / "deploy", ROOT / "deploy/kubernetes"
VERSIONS = ("1.30", "1.36")
"""Of Kubernetes, an old and a new one."""
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")


def environment(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolated(text: str, values: dict[str, str]) -> str:
    """As Compose does: `${NAME}`, `${NAME:-default}`, `${NAME:?what to do}`."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        assert name in values or default is not None, f"{name} has no value"
        return values.get(name) or default or ""

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}", value, text)


def compose(name: str = "compose.yaml", values: dict[str, str] | None = None) -> dict[str, Any]:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    known = environment(DEPLOY / "example.env") if values is None else values
    loaded: dict[str, Any] = yaml.safe_load(interpolated(text, known))
    return loaded


def documents() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document.get("spec", {}).get("template", {}).get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    loaded = compose(name)
    assert set(PyCompose.from_yaml(yaml.safe_dump(loaded)).service_names()) == set(loaded["services"])
    loaded["services"]["chat"]["prots"] = []
    with pytest.raises(ValueError, match="prots"):
        PyCompose.from_yaml(yaml.safe_dump(loaded))


def test_what_compose_services_refer_to_is_there() -> None:
    loaded = compose()
    for name, service in loaded["services"].items():
        assert set(service.get("depends_on", [])) <= set(loaded["services"]), name
        assert {one["source"] for one in service.get("configs", [])} <= set(loaded["configs"]), name
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert {volume for volume in volumes if not volume.startswith(".")} <= set(loaded["volumes"]), name


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_follow_kubernetes_schemas(version: str) -> None:
    kinds = []
    for document in documents():
        kubernetes_validate.validate(document, version, strict=True)
        kinds.append(document["kind"])
    assert kinds.count("Deployment") == 4
    assert kinds.count("StatefulSet") == 2
    assert kinds.count("Job") == 1
    document["spec"]["compeltions"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


def test_kustomizations_name_every_manifest_and_image() -> None:
    images = {container["image"] for document in documents() for container in containers(document)}
    named: set[str] = set()
    for folder in (KUBERNETES, KUBERNETES / "train"):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        assert {folder / name for name in kustomization["resources"]} == {
            path for path in MANIFESTS if path.parent == folder
        }
        named |= {image["name"] for image in kustomization["images"]}
    assert named == images


def test_no_image_is_of_a_named_registry() -> None:
    values = environment(DEPLOY / "example.env")
    images = [service["image"] for service in compose()["services"].values() if "image" in service]
    images += [values[name] for name in values if name.endswith("_IMAGE")]
    for image in images:
        assert not re.search(r"[.:][^/]*/", image), image


def test_compose_needs_its_secrets_and_nothing_else() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    assert needed == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert compose(values=dict.fromkeys(needed, "x"))["services"]["chat"]["image"] == "chatloom"
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == set(environment(DEPLOY / "example.env"))


def test_ports_are_opened_on_loopback_unless_somebody_says_otherwise() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_that_manifests_ask_for_are_in_the_example() -> None:
    asked = set(re.findall(r"secretKeyRef: {name: chatloom, key: (\w+)}", "".join(map(Path.read_text, MANIFESTS))))
    asked |= {"S3_ACCESS_KEY", "S3_SECRET_KEY"}  # of the object store's envFrom
    assert asked == set(environment(KUBERNETES / "example.env"))


def test_hosts_that_are_asked_for_are_services() -> None:
    services = set(compose()["services"])
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    hosts = set(re.findall(r"(?:://|@)([a-z][a-z-]+):\d+", text)) - {"localhost"}
    assert hosts == {"postgres", "object-store", "mlflow", "prefect"}
    assert hosts <= services
    on_cluster = {document["metadata"]["name"] for document in documents() if document["kind"] == "Service"}
    text = "".join(map(Path.read_text, [*MANIFESTS, KUBERNETES / "example.env"]))
    asked = set(re.findall(r"(?:://|@)([a-z][a-z-]+):\d+", text)) - {"localhost"}
    assert asked == hosts
    assert asked <= on_cluster


def test_mlflow_answers_to_the_names_by_which_stages_ask_for_it() -> None:
    allowed = compose()["services"]["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for service in ("worker", "chat"):
        assert compose()["services"][service]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://") in allowed
    environments = [container.get("env", []) for document in documents() for container in containers(document)]
    values = {one["name"]: one.get("value", "") for variables in environments for one in variables}
    assert values["MLFLOW_TRACKING_URI"].removeprefix("http://") in values["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_the_chat_server_is_started_with_options_that_it_has() -> None:
    of_compose = compose()["services"]["chat"]["command"]
    (of_cluster,) = [one["args"] for document in documents() for one in containers(document) if one["name"] == "chat"]
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for program, name, *options in (of_compose, of_cluster):
        assert (program, name) == ("chatloom", "serve")
        assert serve.make_context("serve", options).params["host"] == "0.0.0.0"


def test_the_training_job_has_a_pod_for_each_host_and_names_them_so() -> None:
    documents = list(yaml.safe_load_all((KUBERNETES / "train/job.yaml").read_text(encoding="utf-8")))
    service, job = documents
    name, spec = job["metadata"]["name"], job["spec"]
    params = load_params(ROOT / "params.yaml")
    text = (KUBERNETES / "train/job.yaml").read_text(encoding="utf-8")
    (section,) = re.findall(r"train_sft\.parallel: ({.*?})", text.split("apiVersion")[0].replace("\n# ", " "))
    values = params.model_dump(by_alias=True)
    values["train_sft"]["parallel"] = yaml.safe_load(section)
    parallel = validate_params(values, "job.yaml").train_sft.parallel
    assert parallel.strategy == "colossalai_zero2"
    assert parallel.hostfile is not None
    hosts = read_hosts(parallel.model_copy(update={"hostfile": str(ROOT / parallel.hostfile)}))
    assert hosts == [f"{name}-{index}.{service['metadata']['name']}" for index in range(spec["completions"])]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    gpus = int(spec["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert parallel.num_processes == gpus * len(hosts)


def test_a_job_that_is_stopped_tells_its_stage_and_not_its_own_shell() -> None:
    """The pattern, held against the command lines that are in the pod then."""
    (job,) = [document for document in documents() if document["kind"] == "Job"]
    hook = job["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    patterns = {word for word in shlex.split(hook[-1].replace(";", " ")) if "stages" in word}
    (pattern,) = patterns
    stage = "/opt/venv/bin/python -m stages.train_sft"
    others = [" ".join(hook), "dvc repro --single-item train_sft", "tini -- sh -c exec python -m stages.train_sft; fi"]
    assert re.search(pattern, stage)
    assert not any(re.search(pattern, other) for other in others)


def test_buckets_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with object_store() as address:
        for name, value in (told | {"AWS_ENDPOINT_URL_S3": address}).items():
            monkeypatch.setenv(name, value)
        for _ in range(2):
            make_buckets("mlflow", "dvc")
        assert sorted(bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]) == ["dvc", "mlflow"]
