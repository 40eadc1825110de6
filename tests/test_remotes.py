"""Sharing through remotes that are only configured: a folder, S3 (moto's server), SSH (asyncssh's); one that fails."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import boto3
import pytest

from tasks.workspace import DVC
from tests.conftest import ROOT
from tests.loopback import copy_bytes
from tests.object_store import object_store
from tests.tasks.toy_pipeline import GIT, chain, make_checkout

pytestmark = pytest.mark.smoke

BUCKET, KEY, SECRET = "chatloom", "key", "hush-4711"
FILES = 6


@pytest.fixture
def bucket() -> Iterator[str]:
    """Address of a server that speaks S3, with an empty bucket."""
    with object_store() as address:
        client(address).create_bucket(Bucket=BUCKET)
        yield address


def client(endpoint: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port of an SSH server on loopback that serves files, and the key that opens it."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "id_ed25519")
    (tmp_path / "id_ed25519").chmod(0o600)
    known = asyncssh.import_authorized_keys(key.export_public_key().decode())
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=known,
            sftp_factory=True,
        )
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.get_port(), tmp_path / "id_ed25519"
    loop.call_soon_threadsafe(server.close)
    asyncio.run_coroutine_threadsafe(server.wait_closed(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With a file and a folder of several files made, and nothing pushed."""
    folder = " && ".join(f"cat out/one.txt > out/two.txt/{n} && echo {n} >> out/two.txt/{n}" for n in range(FILES))
    commands = {"one": "mkdir -p out && cat input.txt > out/one.txt", "two": f"mkdir -p out/two.txt && {folder}"}
    root = make_checkout(tmp_path / "checkout", chain(**commands))
    dvc(root, "repro")
    return root


def dvc(folder: Path, *arguments: str, fails: bool = False, **more: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | more
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"AWS_MAX_ATTEMPTS": "1"}  # of each request; what is to be seen is a request that failed
    done = subprocess.run([*DVC, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def use_s3(checkout: Path, endpoint: str) -> None:
    """As docs/team.md says: what everybody may know for everybody, the keys for this clone alone."""
    dvc(checkout, "remote", "add", "--force", "--default", "store", f"s3://{BUCKET}/dvc")
    dvc(checkout, "remote", "modify", "store", "endpointurl", endpoint)
    dvc(checkout, "remote", "modify", "--local", "store", "access_key_id", KEY)
    dvc(checkout, "remote", "modify", "--local", "store", "secret_access_key", SECRET)


def cloned(checkout: Path, into: Path) -> Path:
    """Another person's clone, with the keys for the remotes."""
    for command in (["add", "--all"], ["commit", "--quiet", "--message", "made"]):
        subprocess.run([*GIT, *command], cwd=checkout, check=True)
    subprocess.run([*GIT, "clone", "--quiet", str(checkout), str(into)], check=True)
    if (local := checkout / ".dvc/config.local").is_file():
        (into / ".dvc/config.local").write_text(local.read_text())
    return into


def assert_shared(checkout: Path, clone: Path, **environment: str) -> None:
    """`dvc pull` brings every byte, and nothing is left to do."""
    dvc(clone, "pull", **environment)
    for n in range(FILES):
        assert (clone / f"out/two.txt/{n}").read_text() == f"input.txt\n{n}\n"
    assert dvc(clone, "status", "--json").strip() == "{}"
    assert dvc(checkout, "status", "--cloud", "--json", **environment).strip() == "{}"


def test_a_folder(checkout: Path, tmp_path: Path) -> None:
    dvc(checkout, "remote", "add", "--default", "store", str(tmp_path / "shared"))
    dvc(checkout, "push")
    assert_shared(checkout, cloned(checkout, tmp_path / "clone"))


def test_s3_by_the_environment(checkout: Path, bucket: str, tmp_path: Path) -> None:
    """As the worker of deploy/ is told: one address for everybody, and in no file what is one machine's."""
    own = {"AWS_ENDPOINT_URL_S3": bucket, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    dvc(checkout, "remote", "add", "--default", "store", f"s3://{BUCKET}/chatloom")
    dvc(checkout, "push", **own)
    assert {name.split("/")[0] for name in stored(bucket)} == {"chatloom"}
    assert_shared(checkout, cloned(checkout, tmp_path / "clone"), **own)


def test_s3_by_files(checkout: Path, bucket: str, tmp_path: Path) -> None:
    use_s3(checkout, bucket)
    dvc(checkout, "push")
    clone = cloned(checkout, tmp_path / "clone")
    assert subprocess.run([*GIT, "grep", "--quiet", SECRET], cwd=clone, check=False).returncode == 1, "not in git"
    assert_shared(checkout, clone)


def test_ssh(checkout: Path, ssh: tuple[int, Path], tmp_path: Path) -> None:
    port, key = ssh
    store = tmp_path / "shared over ssh"
    dvc(checkout, "remote", "add", "--default", "store", f"ssh://someone@127.0.0.1:{port}{store}")
    dvc(checkout, "remote", "modify", "--local", "store", "keyfile", str(key))
    dvc(checkout, "push")
    assert (store / "files/md5").is_dir()
    assert_shared(checkout, cloned(checkout, tmp_path / "clone"))


def test_a_remote_that_fails_half_way_is_whole_after_another_push(checkout: Path, bucket: str, tmp_path: Path) -> None:
    """No folder's list is there before all of its files are, so that nobody pulls a part of it for the whole."""
    with cutting_proxy(bucket, uploads=3) as (address, mend):
        own = {"AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        dvc(checkout, "remote", "add", "--default", "store", f"s3://{BUCKET}/dvc")
        said = dvc(checkout, "push", "--jobs", "1", fails=True, **own)
        assert "failed to push" in said
        names = stored(bucket)
        assert len(names) == 3
        assert not any(name.endswith(".dir") for name in names)
        clone = cloned(checkout, tmp_path / "clone")
        mend()
        dvc(clone, "pull", fails=True, **own)
        assert not (clone / "out/two.txt").exists()
        dvc(checkout, "push", **own)
        assert len(stored(bucket)) == FILES + 2
        assert_shared(checkout, clone, **own)


def stored(endpoint: str) -> list[str]:
    return [item["Key"] for item in client(endpoint).list_objects_v2(Bucket=BUCKET).get("Contents", [])]


@contextmanager
def cutting_proxy(endpoint: str, uploads: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A way to the server at `endpoint` that lets so many uploads through and cuts every later one in the middle."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    left = [uploads]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as server, suppress(OSError):
            head = client.recv(65536)
            if head.startswith(b"PUT "):
                left[0] -= 1
                if left[0] < 0:
                    return  # the connection ends without an answer
            # One request a connection: the server is told so, and the answer ends with it.
            name, rest = head.split(b"\r\n", 1)
            server.sendall(name + b"\r\nConnection: close\r\n" + rest)
            upward = threading.Thread(target=copy_bytes, args=(client, server), daemon=True)
            upward.start()
            copy_bytes(server, client)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()

    def mend() -> None:
        left[0] = sys.maxsize

    yield f"http://127.0.0.1:{listener.getsockname()[1]}", mend
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
