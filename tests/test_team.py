"""MLflow as a team runs it, by configuration alone: PostgreSQL for runs and registry, S3 for artifacts."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import mlflow
import psycopg
import pytest
import requests

from stages.run import stage
from tests.conftest import ROOT
from tests.loopback import free_port, poll
from tests.mlflow_server import MlflowServer
from tests.object_store import object_store
from tests.test_deploy import compose

pytestmark = pytest.mark.smoke

PASSWORD = "p@ss/word"
SECONDS_TO_START = 60


def postgres_program(name: str) -> str | None:
    """Where Debian's packages put what is not for everybody's PATH."""
    installed = sorted(str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (installed[-1] if installed else None)


@contextmanager
def postgres() -> Iterator[str]:
    """Where a PostgreSQL server on loopback has a database, after the scheme; it refuses root, so `nobody` runs it."""
    initdb, server = (postgres_program(name) for name in ("initdb", "postgres"))
    if initdb is None or server is None:
        pytest.skip("needs PostgreSQL's server (Debian: postgresql)")
    user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid} if os.geteuid() == 0 else {}
    # Not below pytest's own folder, which is nobody else's to enter.
    with tempfile.TemporaryDirectory() as folder:
        if user:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, user["group"])
        secret = Path(folder, "password")
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data = f"{folder}/data"
        made = [initdb, "--pgdata", data, "--username", "mlflow", "--pwfile", str(secret), "--auth", "scram-sha-256"]
        subprocess.run([*made, "--no-sync"], cwd=folder, check=True, capture_output=True, **user)
        port = free_port()
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen([server, "-D", data, "-p", str(port), *options], stderr=log, cwd=folder, **user)
        try:
            poll(lambda: takes_connections(port), SECONDS_TO_START)
            yield f"mlflow:{PASSWORD.replace('@', '%40').replace('/', '%2F')}@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait(60)


def takes_connections(port: int) -> bool:
    with (
        suppress(psycopg.OperationalError),
        psycopg.connect(host="127.0.0.1", port=port, user="mlflow", password=PASSWORD, dbname="postgres"),
    ):
        return True
    return False


def test_runs_are_in_postgresql_and_artifacts_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "CHATLOOM_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with object_store() as endpoint, postgres() as database:
        s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        s3.create_bucket(Bucket="mlflow")
        # The server alone knows database and keys. It is told what deploy/ tells it, but for the addresses of today.
        told = compose()["services"]["mlflow"]["environment"] | keys
        scheme = told["MLFLOW_BACKEND_STORE_URI"].partition("://")[0]
        server = MlflowServer(tmp_path)
        server.environment = told | {
            "MLFLOW_BACKEND_STORE_URI": f"{scheme}://{database}",
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"{told['MLFLOW_SERVER_ALLOWED_HOSTS']},127.0.0.1:{server.port}",
        }
        server.up()
        try:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            with stage("train_sft") as run:
                run.log(1, {"train/loss": 0.5})
                run.report("train_sft", {"text": "ä"})
                run.metrics({"loss": 0.5})
            search = f"{server.uri}/api/2.0/mlflow/experiments/search"
            for name, expected in (("mlflow:5000", 200), ("elsewhere:5000", 403)):
                assert requests.post(search, json={"max_results": 1}, headers={"Host": name}).status_code == expected
            client = mlflow.MlflowClient(server.uri)
            client.create_registered_model("chatloom")
            made = client.create_model_version("chatloom", "s3://mlflow/artifacts/model")
            client.set_registered_model_alias("chatloom", "champion", made.version)
            assert client.get_model_version_by_alias("chatloom", "champion").version == "1"

            with psycopg.connect(f"postgresql://{database}") as connection, connection.cursor() as rows:
                rows.execute("SELECT run_uuid, status FROM runs WHERE name = 'train_sft'")
                ((id, status),) = rows.fetchall()
                rows.execute("SELECT value FROM metrics WHERE key = 'train/loss' AND run_uuid = %s", (id,))
                assert rows.fetchall() == [(0.5,)]
            assert status == "FINISHED"
            stored = {item["Key"]: item for item in s3.list_objects_v2(Bucket="mlflow")["Contents"]}
            (report,) = [name for name in stored if name.endswith(f"{id}/artifacts/reports/train_sft.json")]
            assert json.loads(s3.get_object(Bucket="mlflow", Key=report)["Body"].read()) == {"text": "ä"}
            back = client.download_artifacts(id, "reports/train_sft.json", str(tmp_path))
            assert json.loads(Path(back).read_text()) == {"text": "ä"}
        finally:
            server.down()
            mlflow.set_tracking_uri(None)
