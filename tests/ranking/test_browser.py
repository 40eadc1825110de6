"""The ranking page in a real browser: two people rank, reload, go on and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatloom.data.rankings import read_rankings
from chatloom.ranking.app import create_app
from tests.chromium import open_browser
from tests.loopback import running
from tests.ranking.test_app import CANDIDATES

pytestmark = pytest.mark.smoke


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of the page; rankings go to the test's folder."""
    with running(create_app(CANDIDATES[:3], tmp_path / "said", overlap=1.0)) as url:
        yield f"{url}/"


@pytest.fixture
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def test_two_people_rank_and_export(address: str, browser: Any, tmp_path: Path) -> None:
    problems: list[str] = []
    context = browser.new_context(locale="en-GB", accept_downloads=True)
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.get_by_placeholder("Your name").fill("Ann")
    page.get_by_role("button", name="Begin").click()

    # By keyboard: a tie for the second place.
    page.get_by_text("Question 0?").wait_for()
    shown = page.locator(".answer p").all_text_contents()
    assert sorted(shown) == ["alpha", "beta", "gamma"]
    for key in ("2", "1", "2"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.get_by_text("Question 1?").wait_for()
    expected = dict(zip(shown, [1, 0, 1], strict=True))
    [said] = read_rankings(tmp_path / "said")
    assert dict(zip(said.responses, said.ranks, strict=True)) == expected

    # A reload keeps the name and the place.
    page.reload()
    page.get_by_text("Question 1?").wait_for()
    assert "1 done, 2 left" in page.locator("#status").inner_text()

    # By dragging the last answer above the first.
    shown = page.locator(".answer p").all_text_contents()
    page.locator(".answer").nth(2).drag_to(page.locator(".answer").nth(0))
    page.get_by_placeholder("Comment (optional)").fill("dragged")
    page.get_by_role("button", name="Save and go on").click()
    page.get_by_text("Question 2?").wait_for()
    said = next(one for one in read_rankings(tmp_path / "said") if one.id == "p1")
    assert dict(zip(said.responses, said.ranks, strict=True)) == {shown[2]: 0, shown[0]: 1, shown[1]: 2}
    assert said.comment == "dragged"

    # A second person, in Chinese, on a phone.
    phone = browser.new_context(locale="zh-CN", viewport={"width": 390, "height": 800}, has_touch=True)
    other = phone.new_page()
    other.on("pageerror", lambda error: problems.append(str(error)))
    other.goto(address)
    other.get_by_placeholder("你的名字").fill("李雷")
    other.get_by_role("button", name="开始").click()
    other.get_by_text("Question 0?").wait_for()
    for card, place in enumerate(("1", "2", "3")):
        other.locator(".answer").nth(card).get_by_role("button", name=place, exact=True).tap()
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    other.get_by_role("button", name="保存并继续").tap()
    other.get_by_text("Question 1?").wait_for()
    other.get_by_role("button", name="都不好").tap()
    other.get_by_text("Question 2?").wait_for()
    assert "一致性" in other.locator("#status").inner_text()

    page.keyboard.press("b")
    page.get_by_text("Nothing is left to rank").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Export").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert [(line["annotator"], line["id"], line["ranks"] == []) for line in map(json.loads, lines)] == [
        ("Ann", "p0", False),
        ("Ann", "p1", False),
        ("Ann", "p2", True),
        ("李雷", "p0", False),
        ("李雷", "p1", True),
    ]
    assert problems == []
