"""Every place and kind of file rows are read from, and what is said where that fails."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatloom.data import sources
from chatloom.data.drops import RowFault
from chatloom.data.sources import download, locate
from chatloom.errors import InputError
from tests.data.factories import source, write_jsonl

KEY = "raw_data.sources[0]"


def read(path: Path) -> list[tuple[int, Any]]:
    """Items of the one file, a fault as `reason: detail`."""
    [file], _ = locate(source(path=str(path)), KEY, path.parent)
    items = file.read()
    return [(line, f"{got.reason}: {got}" if isinstance(got, RowFault) else got) for line, got in items]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    return str(caught.value)


def save(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    compress = {".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True)}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


# --- kinds of file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
class TestKinds:
    def test_jsonl(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"a.jsonl{suffix}", '\ufeff{"a": 1}\n\n{"a": "二"}\r\n{"a": 3}')
        assert read(path) == [(1, {"a": 1}), (3, {"a": "二"}), (4, {"a": 3})]

    def test_json_list(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"a.json{suffix}", '\ufeff[\n  {"a": 1},\n  {\n    "a": 2\n  }, {"a": 3},\n  4\n]\n')
        assert read(path) == [
            (2, {"a": 1}),
            (3, {"a": 2}),
            (5, {"a": 3}),
            (6, "not_an_object: expected a JSON object"),
        ]

    def test_csv(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"a.csv{suffix}", '\ufeffid, prompt\n1,"two\nlines"\n2,"a, b"\n\n3\n4,四\n')
        assert read(path) == [
            (2, {"id": "1", "prompt": "two\nlines"}),
            (4, {"id": "2", "prompt": "a, b"}),
            (6, "wrong_columns: 1 cells, expected 2"),
            (7, {"id": "4", "prompt": "四"}),
        ]

    def test_text(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"a.txt{suffix}", "one\r\n\n  two\n")
        assert read(path) == [(1, {"text": "one"}), (3, {"text": "  two"})]

    def test_parquet(self, tmp_path: Path, suffix: str) -> None:
        plain = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([{"a": [{"role": "user"}]}, {"a": None}]), plain)
        path = plain if not suffix else save(tmp_path / f"b.parquet{suffix}", plain.read_bytes())
        assert read(path) == [(1, {"a": [{"role": "user"}]}), (2, {"a": None})]


def test_json_with_one_object_a_line_is_read_as_jsonl(tmp_path: Path) -> None:
    assert read(save(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_bare_list_of_messages_is_a_row(tmp_path: Path) -> None:
    turns = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert read(save(tmp_path / "a.jsonl", f"{turns}\n{turns}\n")) == [(1, row), (2, row)]
    assert read(save(tmp_path / "a.json", f"[{turns},\n{turns}]")) == [(1, row), (2, row)]


def test_empty_json_list_has_no_rows(tmp_path: Path) -> None:
    assert read(save(tmp_path / "a.json", "[ ]")) == []


# --- broken files ---------------------------------------------------------------------------------------------------


def test_broken_line_of_jsonl_is_a_fault_in_its_place(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    assert read(path) == [
        (1, {"a": 1}),
        (2, "broken_json: not valid JSON: Expecting value at column 7"),
        (3, "not_an_object: expected a JSON object"),
        (4, {"a": 2}),
    ]


def test_what_json_would_swallow_is_a_fault(tmp_path: Path) -> None:
    digits = "1" * 5000
    lines = ['{"a": 1, "a": 2}', '{"x": {"b": 1, "b": 1}}', "[" * 100_000, f'{{"a": {digits}}}', '{"a": 1}']
    faults = [
        (1, "repeated_key: the key 'a' stands in one object twice"),
        (2, "repeated_key: the key 'b' stands in one object twice"),
        (3, "broken_json: not valid JSON: Nested too deeply at column 1"),
        (
            4,
            "broken_json: not valid JSON: Exceeds the limit (4300 digits) for integer string conversion: "
            "value has 5000 digits at column 1",
        ),
        (5, {"a": 1}),
    ]
    assert read(save(tmp_path / "a.jsonl", "\n".join(lines))) == faults
    rows = [lines[0], '{"a": 1}']
    assert read(save(tmp_path / "a.json", f"[{','.join(rows)}]")) == [faults[0], (1, {"a": 1})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "{path}:3: not valid JSON: Expecting ':' delimiter at column 6"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "{path}:2: not valid JSON: expected a comma or the end of the list"),
        ("a.json", '[{"a": 1},', "{path}:1: not valid JSON: Expecting value at column 11"),
        ("a.json", "\n3", "{path}:2: expected a JSON list of objects"),
        ("a.json", b'[\n"\xff"]', "{path}:2: not valid UTF-8: invalid start byte; save the file as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n"\xff"\n', "{path}:2: not valid UTF-8: invalid start byte; save the file as UTF-8"),
        (
            "a.csv",
            b"prompt\n\xe4\xbd\n",
            "{path}:2: not valid UTF-8: invalid continuation byte; save the file as UTF-8",
        ),
        ("a.csv", "", "{path}: empty; expected a line of column names"),
        ("a.csv", 'prompt\n"a" b\n', "{path}:2: not valid CSV: ',' expected after '\"'"),
        ("a.csv", 'prompt\n"a\nb\n', "{path}:3: not valid CSV: unexpected end of data"),
        ("a.csv", "prompt,id,prompt\na,1,b\n", "{path}:1: two columns are called 'prompt': give each its own name"),
        ("a.json", "[" * 100_000, "{path}:1: not valid JSON: Nested too deeply at column 2"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "{path}:1: not valid UTF-8: invalid start byte; save the file as"),
        ("a.parquet", "x", "{path}: not a valid Parquet file: "),
        (
            "a.xlsx",
            "x",
            "{path}: unknown kind of file; accepted: .json, .jsonl, .csv, .parquet, .txt (each also with .gz or .zst)",
        ),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = save(tmp_path / name, content)
    assert refusal(path).startswith(message.replace("{path}", str(path)))


def test_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    assert refusal(path) == f"{path}: not a valid gzip file: Not a gzipped file (b'{{\"')"


@pytest.mark.parametrize(("suffix", "kind"), [(".gz", "gzip"), (".zst", "Zstandard")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_cut_file_is_named(tmp_path: Path, name: str, suffix: str, kind: str) -> None:
    path = save(tmp_path / f"{name}{suffix}", "".join(f'{{"a": {number}}}\n' for number in range(1000)))
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith(f"{path}: not a valid {kind} file: ")


def test_zstandard_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt.zst", "one\n")
    path.write_bytes(path.read_bytes() + pa.compress(b"two\n", codec="zstd", asbytes=True))
    assert read(path) == [(1, {"text": "one"}), (2, {"text": "two"})]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").endswith("two columns are called 'prompt': give each its own name")


def test_text_that_is_no_utf8_in_parquet_is_named(tmp_path: Path) -> None:
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "a.parquet")
    assert "a.parquet: not valid UTF-8 after row 0: " in refusal(tmp_path / "a.parquet")


# --- paths ----------------------------------------------------------------------------------------------------------


def names(path: Path | str) -> tuple[list[str], list[str]]:
    files, skipped = locate(source(path=str(path)), KEY, Path("unused"))
    return [Path(file.name).name for file in files], skipped


def test_folder_gives_its_data_files_and_names_the_others(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv.gz", "README.md"):
        save(tmp_path / name, "")
    (tmp_path / "more.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert names(tmp_path) == (["a.csv.gz", "b.jsonl"], ["README.md", "loop.jsonl", "more.jsonl/"])


def test_glob_gives_matches_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        save(tmp_path / name, "")
    assert names(tmp_path / "*.jsonl") == (["a.jsonl", "b.jsonl"], [])


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none.jsonl", "no such file or folder"),
        ("*.none", "no file matches"),
        ("loop", "no such file or folder"),
        (".", "the folder has no file that ends"),
    ],
)
def test_nothing_there_names_the_params_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=re.escape(f"raw_data.sources[0].path = '{path}': {problem}")):
        names(path)


# --- downloads ------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    requests = 0
    breaks = 0
    """Answers to /breaks that end after five bytes."""
    ranges: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


CONTENT = gzip.compress(b'{"prompt": "Hi"}\n')
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            made.requests += 1
            if self.path in ("/breaks", "/no-ranges"):
                made.ranges.append(asked := self.headers["Range"])
                first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and "breaks" in self.path else 0
                if first >= len(CONTENT):
                    self.send_error(416)
                    return
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(CONTENT) - first))
                self.end_headers()
                breaks = len(made.ranges) <= made.breaks
                self.wfile.write(CONTENT[first : first + 5] if breaks else CONTENT[first:])
            elif self.path == "/moved.jsonl.gz":
                self.send_response(302)
                self.send_header("Location", "/data.jsonl.gz?x=1")
                self.end_headers()
            elif self.path.startswith("/data.jsonl.gz"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(CONTENT)))
                self.end_headers()
                self.wfile.write(CONTENT)
            else:
                self.send_error(404)

    made = Server(("127.0.0.1", 0), Handler)
    made.ranges = []
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_url_is_downloaded_once_and_read(server: Server, tmp_path: Path) -> None:
    described = source(url=f"{server.url}/data.jsonl.gz?token=1", sha256=CHECKSUM)
    for _ in range(2):
        [file], _ = locate(described, KEY, tmp_path)
        assert list(file.read()) == [(1, {"prompt": "Hi"})]
        assert file.name == described.url
    assert server.requests == 1


def test_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    path = download(f"{server.url}/moved.jsonl.gz", CHECKSUM, tmp_path, KEY)
    assert path.read_bytes() == CONTENT


def test_damaged_download_is_fetched_again(server: Server, tmp_path: Path) -> None:
    path = download(f"{server.url}/data.jsonl.gz", CHECKSUM, tmp_path, KEY)
    path.write_bytes(b"damaged")
    assert download(f"{server.url}/data.jsonl.gz", CHECKSUM, tmp_path, KEY).read_bytes() == CONTENT


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RETRY_DELAY", 0.0)


@pytest.mark.usefixtures("hasty")
def test_broken_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    assert download(f"{server.url}/breaks", CHECKSUM, tmp_path, KEY).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5-", "bytes=10-", "bytes=15-"]


@pytest.mark.usefixtures("hasty")
def test_download_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.breaks = 1 + sources.RETRIES
    with pytest.raises(InputError, match="cannot be downloaded"):
        download(f"{server.url}/breaks", CHECKSUM, tmp_path, KEY)
    assert download(f"{server.url}/breaks", CHECKSUM, tmp_path, KEY).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=25-"


@pytest.mark.usefixtures("hasty")
def test_server_without_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.breaks = 1
    assert download(f"{server.url}/no-ranges", CHECKSUM, tmp_path, KEY).read_bytes() == CONTENT


def test_begun_download_of_another_version_is_begun_anew(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / CHECKSUM[:16]
    folder.mkdir()
    (folder / "breaks.part").write_bytes(b"old")
    assert download(f"{server.url}/breaks", CHECKSUM, tmp_path, KEY).read_bytes() == CONTENT
    assert server.ranges == ["bytes=3-", None]


def test_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/data.jsonl.gz"
    with pytest.raises(InputError) as caught:
        locate(source(url=url, sha256="0" * 64), KEY, tmp_path)
    assert str(caught.value).startswith(
        f"raw_data.sources[0].url = '{url}': the download has sha256 {CHECKSUM}, params.yaml says {'0' * 64}; "
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_missing_download_names_the_answer(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sources\[0\]\.url = '.*/none\.csv': the server answered 404"):
        locate(source(url=f"{server.url}/none.csv", sha256=CHECKSUM), KEY, tmp_path)


def test_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RETRY_DELAY", 0.0)
    with pytest.raises(InputError, match=r"sources\[0\]\.url = 'http://127\.0\.0\.1:9/a\.csv': cannot be downloaded: "):
        locate(source(url="http://127.0.0.1:9/a.csv", sha256=CHECKSUM), KEY, tmp_path)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_hf_reads_a_local_folder(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    [file], _ = locate(source(hf=f"{tmp_path}:train"), KEY, tmp_path)
    assert list(file.read()) == [(1, rows[0]), (2, rows[1])]
    assert file.name == f"{tmp_path}:train"


def test_hf_without_split_is_refused(tmp_path: Path) -> None:
    message = "raw_data.sources[0].hf = 'owner/name': name the split after a colon, for example owner/name:train"
    with pytest.raises(InputError, match=re.escape(message)):
        locate(source(hf="owner/name"), KEY, tmp_path)


@pytest.mark.parametrize("dataset", ["{folder}:none", "{folder}/none:train"])
def test_hf_that_is_not_there_is_named(tmp_path: Path, dataset: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"a": 1}])
    [file], _ = locate(source(hf=dataset.format(folder=tmp_path)), KEY, tmp_path)
    with pytest.raises(InputError, match=r"raw_data\.sources\[0\]\.hf = .*: `datasets` cannot load it: "):
        list(file.read())


def test_lines_are_numbered_where_json_spans_many(tmp_path: Path) -> None:
    rows = [{"n": number, "text": "x\ny"} for number in range(50)]
    path = save(tmp_path / "a.json", json.dumps(rows, indent=2))
    # Four lines an object, the first on line 2.
    assert [line for line, _ in read(path)] == [2 + 4 * number for number in range(50)]
