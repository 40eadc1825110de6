"""From a model's address to its folder: `models:/name@alias`, `models:/name/3` or a plain path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatloom.errors import InputError, Unavailable

ARTIFACT = "model"
"""Name of the checkpoint folder among the artifacts of a registered model."""

ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Resolved:
    path: Path
    """The checkpoint folder."""
    name: str
    version: str | None
    """None for a plain folder."""
    tags: Mapping[str, str]
    """Lineage, as `register` recorded it."""


def resolve(uri: str, into: Path | None = None) -> Resolved:
    """The model behind `uri`, downloaded where the registry is on another machine.

    A plain path needs no MLflow. The registry is that of `MLFLOW_TRACKING_URI`, else `mlflow.db` in the current folder.

    Args:
        into: folder that gets a copy of a registered version, in any case; None leaves a download in a temporary one.

    Raises:
        InputError: for a path that is no folder, a malformed address, or a model that the registry does not have.
    """
    if not uri.startswith("models:"):
        return _folder(uri)
    address = ADDRESS.fullmatch(uri)
    if address is None:
        raise InputError(f"{uri}: write models:/name@alias, models:/name/version, or the path of a folder")
    use_tracking_store(uri)
    return _registered(uri, address["name"], address["alias"], address["version"], into)


def current_version(uri: str) -> str:
    """The version that `uri` means now; `models:/name@alias` means another one after a promotion or a rollback.

    Raises:
        InputError: where the registry is down, or does not have it.
    """
    address = parse_address(uri)
    import mlflow

    with registry_errors(uri):
        return version_number(uri, mlflow.MlflowClient(), address["name"], address["alias"], address["version"])


def parse_address(uri: str) -> re.Match[str]:
    """The parts `name`, `alias` and `version` of a version's address; MLflow's store is set for it.

    Raises:
        InputError: where it is malformed, or there is no store.
    """
    address = ADDRESS.fullmatch(uri)
    if address is None:
        raise InputError(f"{uri}: write models:/name@alias or models:/name/version")
    use_tracking_store(uri)
    return address


def use_tracking_store(purpose: str) -> None:
    """Set MLflow's tracking store to `mlflow.db` here, unless one is set; MLflow itself would make an empty one.

    Raises:
        InputError: where there is neither.
    """
    import mlflow

    if mlflow.is_tracking_uri_set():
        return
    store = Path.cwd() / "mlflow.db"
    if not store.is_file():
        raise InputError(f"{purpose}: set MLFLOW_TRACKING_URI, or run this where mlflow.db is; {store} does not exist")
    mlflow.set_tracking_uri(f"sqlite:///{store}")


@contextmanager
def registry_errors(purpose: str) -> Iterator[None]:
    """A registry that refuses is an input error, one that is down is `Unavailable`, within seconds."""
    from mlflow import get_tracking_uri
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with few_retries():
            yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise (Unavailable if may_pass(error) else InputError)(
            f"{purpose}: the registry at {get_tracking_uri()} did not do it: {first_line(error)}; if it is down, "
            "start it (make ui), or set MLFLOW_TRACKING_URI to one that runs"
        ) from error


def first_line(error: BaseException) -> str:
    """What it says, without a server's whole answer; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def may_pass(error: BaseException) -> bool:
    """Whether a store that answered with `error` may do it later: it is down or busy, and does not refuse."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return bool(error.get_http_status_code() >= 500)
    if isinstance(error, HTTPError):  # from where artifacts go
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, RequestException | OperationalError | ConnectionError | TimeoutError)


@contextmanager
def few_retries(retries: int = 2, seconds: int = 20) -> Iterator[None]:
    """MLflow says within seconds that its server is down; left to itself it tries for minutes. What is set stays so."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    short = {MLFLOW_HTTP_REQUEST_MAX_RETRIES: retries, MLFLOW_HTTP_REQUEST_TIMEOUT: seconds}
    changed = {variable: value for variable, value in short.items() if variable.get() == variable.default}
    for variable, value in changed.items():
        variable.set(value)
    try:
        yield
    finally:
        # Never unset: a thread that reads the whole environment meanwhile, as each request over HTTP does, would fail.
        for variable in changed:
            variable.set(variable.default)


def _folder(uri: str) -> Resolved:
    path = Path(uri).expanduser().resolve()
    if not path.is_dir():
        raise InputError(f"{uri}: no such folder; give a checkpoint's folder or models:/name@alias")
    return Resolved(path, path.name, None, {})


def _registered(uri: str, name: str, alias: str | None, version: str | None, into: Path | None) -> Resolved:
    import mlflow
    from mlflow.exceptions import MlflowException

    with registry_errors(uri):
        client = mlflow.MlflowClient()
        number = version_number(uri, client, name, alias, version)
    try:
        found = client.get_model_version(name, number)
        place = str(into) if into is not None else None
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{number}", dst_path=place))
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: version {number} of {name!r} cannot be had: {error}") from error
    return Resolved(_checkpoint(uri, folder), name, number, dict(found.tags))


def version_number(uri: str, client: Any, name: str, alias: str | None, version: str | None) -> str:
    """The version that an address means."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise InputError(f"{uri}: the registry at {mlflow.get_tracking_uri()} does not have it: {error}") from error
    number = model.aliases.get(alias) if version is None else version
    if number is None:
        known = ", ".join(f"@{known}" for known in sorted(model.aliases)) or "none"
        raise InputError(f"{uri}: no version of {name!r} is @{alias}; known aliases: {known}")
    return str(number)


def _checkpoint(uri: str, folder: Path) -> Path:
    """The checkpoint inside a logged model, as its MLmodel file says."""
    from mlflow.models import Model

    flavor: dict[str, Any] = Model.load(str(folder)).flavors.get("python_function", {})
    artifact: dict[str, str] | None = flavor.get("artifacts", {}).get(ARTIFACT)
    if artifact is None:
        raise InputError(f"{uri}: was not registered by chatloom: it has no artifact called {ARTIFACT!r}")
    return folder / artifact["path"]
