"""The routes of the ranking page: who gets what, what is kept, and that a new server knows it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from chatloom.data.rankings import Candidate, read_rankings
from chatloom.ranking.app import create_app

CANDIDATES = [
    Candidate(f"p{n}", "en", [{"role": "user", "content": f"Question {n}?"}], ["alpha", "beta", "gamma"], "1" * 64)
    for n in range(6)
]


def client(folder: Path, overlap: float = 1.0) -> TestClient:
    return TestClient(create_app(CANDIDATES, folder, overlap=overlap))


def following(page: TestClient, annotator: str) -> dict[str, Any]:
    answer = page.get("/api/next", params={"annotator": annotator})
    assert answer.status_code == 200, answer.text
    return answer.json()


def say(page: TestClient, annotator: str, ranks: list[int] | None, comment: str = "") -> str:
    """Rank what comes next, with ranks of alpha, beta and gamma; its id."""
    shown = following(page, annotator)["candidate"]
    by_answer = None if ranks is None else [ranks[number] for number in shown["order"]]
    body = {"annotator": annotator, "id": shown["id"], "order": shown["order"], "ranks": by_answer, "comment": comment}
    answer = page.post("/api/rankings", json=body)
    assert answer.status_code == 200, answer.text
    return str(shown["id"])


def test_ranks_are_kept_in_the_order_of_the_answers(tmp_path: Path) -> None:
    page = client(tmp_path)
    say(page, "Ann", [2, 0, 5], "close")
    say(page, "Ann", None)
    first, second = read_rankings(tmp_path)
    assert (first.id, first.ranks, first.annotator, first.comment, first.sft) == (
        "p0",
        [1, 0, 2],
        "Ann",
        "close",
        "1" * 64,
    )
    assert first.responses == ["alpha", "beta", "gamma"]
    assert (second.id, second.all_bad) == ("p1", True)


def test_answers_are_shown_blind_and_in_an_order_of_each_ones_own(tmp_path: Path) -> None:
    page = client(tmp_path)
    shown = following(page, "Ann")["candidate"]
    assert shown == following(page, "Ann")["candidate"]
    assert set(shown) == {"id", "lang", "messages", "order", "responses"}
    assert shown["responses"] == [CANDIDATES[0].responses[number] for number in shown["order"]]
    orders = {tuple(following(page, f"annotator {n}")["candidate"]["order"]) for n in range(40)}
    assert len(orders) == 6


def test_new_server_goes_on_where_the_old_one_stopped(tmp_path: Path) -> None:
    say(client(tmp_path), "Ann", [0, 1, 2])
    found = following(client(tmp_path), "Ann")
    assert found["candidate"]["id"] == "p1"
    assert found["status"]["done"] == 1
    assert found["status"]["left"] == 5


def test_shared_prompts_go_to_all_and_others_to_one(tmp_path: Path) -> None:
    page = client(tmp_path, overlap=0.0)
    # Both have the page open: neither gets what the other looks at.
    assert following(page, "Ann")["candidate"]["id"] != following(page, "Bob")["candidate"]["id"]
    ranked = [say(page, name, [0, 1, 2]) for name in ("Ann", "Bob", "Ann", "Ann", "Bob", "Bob")]
    assert sorted(ranked) == [f"p{n}" for n in range(6)]
    assert following(page, "Ann")["candidate"] is None

    page = client(tmp_path / "all", overlap=1.0)
    assert [say(page, "Ann", [0, 1, 2]) for _ in range(6)] == [say(page, "Bob", [0, 1, 2]) for _ in range(6)]
    assert following(page, "Ann")["status"]["agreement"] == pytest.approx(1.0)


def test_export_is_what_import_takes(tmp_path: Path) -> None:
    page = client(tmp_path / "here")
    say(page, "Ann", [0, 1, 2])
    say(page, "李雷", [2, 1, 0], "不错")
    exported = page.get("/api/export")
    assert [json.loads(line)["annotator"] for line in exported.text.splitlines()] == ["Ann", "李雷"]
    there = client(tmp_path / "there")
    assert there.post("/api/import", content=exported.content).json() == {"imported": 2, "already_there": 0}
    assert there.post("/api/import", content=exported.content).json() == {"imported": 0, "already_there": 2}
    assert read_rankings(tmp_path / "there") == read_rankings(tmp_path / "here")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"id": "none"}, 404),
        ({"order": [0, 1]}, 422),
        ({"order": [0, 1, 1]}, 422),
        ({"ranks": [0, 1]}, 422),
        ({"ranks": [0, 1, -1]}, 422),
        ({"annotator": "  "}, 422),
        ({"more": 1}, 422),
    ],
)
def test_nonsense_is_refused_and_not_kept(tmp_path: Path, change: dict[str, Any], status: int) -> None:
    body = {"annotator": "Ann", "id": "p0", "order": [0, 1, 2], "ranks": [0, 1, 2], **change}
    assert client(tmp_path).post("/api/rankings", json=body).status_code == status
    assert read_rankings(tmp_path) == []


def test_import_names_the_line(tmp_path: Path) -> None:
    answer = client(tmp_path).post("/api/import", content=b'{"id": 1}\n')
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("import:1: ")


def test_names_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    page = client(tmp_path)
    say(page, "Ann B", [0, 1, 2])
    answer = page.get("/api/next", params={"annotator": "Ann.B"})
    assert (answer.status_code, "choose another name" in answer.text) == (409, True)


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = client(tmp_path).get("/").text
    assert "Rank the answers" in text
    assert "给回答排序" in text
    assert "http://" not in text
    assert "https://" not in text
