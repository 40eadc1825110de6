"""The chat page in a real browser, on a tiny model that answers over loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatloom.data.raw import ingest, read_raw
from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options
from tests.chromium import open_browser
from tests.conftest import ROOT
from tests.data.factories import raw_params, source
from tests.loopback import running

pytestmark = pytest.mark.smoke

REVISION = "bd5c3e7f0c1d4e5a9b8c7d6e5f4a3b2c1d0e9f8a"
GATE = {"metric": "reward/accuracy", "value": 0.8125, "bound": ">= 0.5", "verdict": "pass", "blocks": True, "note": ""}
LINEAGE = {
    "git.revision": REVISION,
    "git.dirty": "true",
    "dvc.model": "3f2a9c1d4b5e6f708192a3b4c5d6e7f8.dir",
    "status": "accepted",
    "params": json.dumps({"quantize": {"bits": 4, "group_size": 64, "languages": ["en", "zh"]}}),
    "data.sources": json.dumps([{"name": "starter", "from": "data/starter/*.jsonl", "license": "Apache-2.0"}]),
    "gates": json.dumps([GATE]),
}
GREEDY = """try { localStorage["chatloom/settings"] ??= '{"temperature": 0}'; } catch { /* no page yet */ }"""
COUNTED = "one two three four five six"
Open = Callable[..., Any]


@contextmanager
def serving(engine: Engine, feedback: Path) -> Iterator[str]:
    """Address of a server of the page."""
    app = create_app(engine, "tiny", LINEAGE, version="3", options=Options(feedback=feedback))
    with running(app) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of the module keeps feedback."""
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def address(parrot: Engine, folder: Path) -> Iterator[str]:
    with serving(parrot, folder) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def open_page(address: str, browser: Any) -> Iterator[Open]:
    """A page in a browser profile of its own; the test fails where it logs an error that is no refused request."""
    problems: list[str] = []
    contexts = []

    def run(url: str = address, *, go: bool = True, **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(20_000)
        context.add_init_script(GREEDY)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        if go:
            page.goto(url)
            page.locator("#model.ready").wait_for()
        return page

    yield run
    for context in contexts:
        context.close()
    expected = ("Failed to load resource", "requires 'TrustedHTML'")
    assert [problem for problem in problems if not any(part in problem for part in expected)] == []


def ask(page: Any, text: str) -> Any:
    """Send a message and wait for the end of its answer; the answer."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    page.locator(".turn.user").last.get_by_text(text).wait_for()
    page.locator("#stop").wait_for(state="hidden")
    return page.locator(".turn.assistant").last


def events(text: str, *, fingerprint: str = "tiny/3", end: str = "data: [DONE]\n\n") -> str:
    """A stream whose answer is `text`."""
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "model": "tiny", "system_fingerprint": fingerprint}
    chunk = {**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return f"data: {json.dumps(chunk)}\n\n{end}"


def answers(page: Any, *bodies: str | dict[str, Any]) -> list[dict[str, Any]]:
    """Let the page get these instead of the server's answers, one after the other; the requests that it makes."""
    waiting, requests = list(bodies), []

    def handle(route: Any) -> None:
        requests.append({"headers": route.request.headers, **route.request.post_data_json})
        body = waiting.pop(0)
        if isinstance(body, str):
            route.fulfill(body=body, content_type="text/event-stream")
        elif "abort" in body:
            route.abort()
        else:
            route.fulfill(**body)

    page.route("**/v1/chat/completions", handle)
    return requests


def error(status: int, message: str, code: str | None = None, **headers: str) -> dict[str, Any]:
    return {"status": status, "headers": headers, "json": {"error": {"message": message, "type": "x", "code": code}}}


def test_conversations_stream_and_stay(open_page: Open, address: str) -> None:
    page = open_page(go=False)
    # On a busy machine the parrot's whole answer may come at one stroke, of which the page tells no speed.
    page.add_init_script("let now = 0; performance.now = () => (now += 20);")
    page.goto(address)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    answer = ask(page, "count")
    assert answer.locator(".body").inner_text() == COUNTED
    figures = answer.locator(".figures").inner_text()
    assert re.search(r"\d tokens/s", figures)
    assert re.search(r"first after \d+\.\d\d s", figures)
    assert re.search(r"\d+ tokens\D*tiny/3$", figures.replace("\n", " "))
    assert page.locator("#announcement").inner_text() == f"Answer: {COUNTED}"

    # A second one, beside the first.
    page.get_by_role("button", name="New conversation").first.click()
    page.locator("#welcome").get_by_text("You are talking to tiny version 3").wait_for()
    assert ask(page, "你好").locator(".body").inner_text() == "你好，世界！龘😀 end"
    titles = page.locator("#conversations .entry")
    assert titles.all_text_contents() == ["你好", "count"]

    page.reload()
    page.locator(".turn.assistant").get_by_text("龘😀").wait_for()
    page.locator("#conversations .entry", has_text="count").click()
    assert page.locator(".turn .body").all_text_contents() == [COUNTED]

    page.locator("#conversations li", has_text="你好").hover()
    page.locator("#conversations li", has_text="你好").get_by_role("button", name="Delete").click()
    assert titles.all_text_contents() == ["count"]
    page.get_by_role("button", name="Undo").click()
    assert sorted(titles.all_text_contents()) == ["count", "你好"]
    assert {httpx.URL(url).netloc for url in requests} == {httpx.URL(page.url).netloc}


def test_turns_are_sent_and_an_edited_one_replaces_what_followed(open_page: Open) -> None:
    page = open_page()
    requests = answers(page, *(events(f"Answer {number}.") for number in range(4)))
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Longest answer, in tokens").fill("99")
    page.get_by_label("Seed").fill("7")
    page.locator("#set-temperature").fill("0.3")
    page.keyboard.press("Escape")

    page.locator("#prompt").press_sequentially("one")
    page.locator("#prompt").press("Shift+Enter")
    page.locator("#prompt").press_sequentially("more")
    # The Enter by which an input method takes its characters sends nothing.
    page.locator("#prompt").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    page.locator("#prompt").press("Enter")
    page.locator("#thread").get_by_text("Answer 0.").wait_for()
    ask(page, "two")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\nmore"}
    assert requests[1]["messages"] == [
        system,
        user,
        {"role": "assistant", "content": "Answer 0."},
        {"role": "user", "content": "two"},
    ]
    sent = {key: requests[0][key] for key in ("model", "temperature", "top_p", "max_tokens", "seed", "stream")}
    assert sent == {"model": "tiny", "temperature": 0.3, "top_p": 1, "max_tokens": 99, "seed": 7, "stream": True}

    page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("three")
    page.get_by_role("button", name="Send again").click()
    page.locator("#thread").get_by_text("Answer 2.").wait_for()
    assert page.locator(".bubble").all_text_contents() == ["three"]
    assert requests[2]["messages"] == [system, {"role": "user", "content": "three"}]

    page.get_by_role("button", name="Another answer").click()
    page.locator("#thread").get_by_text("Answer 3.").wait_for()
    assert (requests[3]["messages"], requests[3]["seed"]) == (requests[2]["messages"], 8)


def test_stop_frees_the_server(babbler: Engine, open_page: Open, tmp_path: Path) -> None:
    with serving(babbler, tmp_path) as url:
        page = open_page(url)
        page.get_by_role("button", name="Settings").first.click()
        page.get_by_label("Longest answer, in tokens").fill("90000")
        page.locator("#set-temperature").fill("1")
        page.keyboard.press("Escape")
        page.locator("#prompt").fill("count")
        page.get_by_role("button", name="Send").click()
        page.locator(".turn.streaming").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".turn.stopped .figures", has_text="stopped").wait_for()
        # Half an answer is not rated, and the server has gone on.
        assert page.get_by_role("button", name="Good answer").count() == 0
        assert page.get_by_role("button", name="Another answer").is_enabled()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert httpx.post(f"{url}v1/chat/completions", json=body, timeout=20).status_code == 200


def test_thumbs_and_comparisons_are_rows_for_raw_data(open_page: Open, folder: Path, tmp_path: Path) -> None:
    page = open_page()
    good = page.get_by_role("button", name="Good answer")
    bad = page.get_by_role("button", name="Bad answer")

    # A thumb up with a comment, on an answer of its own.
    ask(page, "你好")
    good.click()
    page.get_by_placeholder("What was good about it? (optional)").fill("friendly")
    page.locator(".comment").get_by_role("button", name="Send").click()
    page.get_by_text("Thank you, it is kept").wait_for()
    assert good.get_attribute("aria-pressed") == "true"

    # Down and then up, another answer, and which was better.
    page.get_by_role("button", name="New conversation").first.click()
    ask(page, "count")
    bad.click()
    page.locator(".comment").wait_for()
    good.click()
    page.get_by_placeholder("What was good about it? (optional)").wait_for()
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_label("Longest answer, in tokens").fill("7")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Another answer").click()
    page.get_by_text("cut at the token limit").wait_for()
    assert page.locator(".variant").inner_text() == "2 / 2"
    page.get_by_role("button", name="Answer 1").click()
    page.locator(".which").wait_for(state="detached")
    assert page.locator(".variant").inner_text() == "1 / 2"
    page.get_by_role("button", name="Next answer").click()
    short = page.locator(".turn .body").inner_text()
    with page.expect_response("**/v1/feedback"):
        bad.click()

    written = (folder / "feedback.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in written]
    assert [line["rating"] for line in lines] == ["up", "up", "down", "up", "better", "down"]
    assert {line["model"] for line in lines} == {"tiny/3"}
    assert lines[1]["comment"] == "friendly"

    report = ingest(raw_params(source("page", path=str(folder), format="feedback")), tmp_path)
    assert short != COUNTED
    assert COUNTED.startswith(short)
    assert [(row.messages[-1]["content"], row.responses, row.line) for row in read_raw(tmp_path)] == [
        ("你好", ["你好，世界！龘😀 end"], 2),
        ("count", [COUNTED], 4),
        ("count", [COUNTED, short], 5),
        ("count", [COUNTED, short], 6),
    ]
    assert {reason: found["rows"] for reason, found in report["dropped"].items()} == {"replaced": 2}


def test_feedback_that_is_not_kept_is_said(open_page: Open) -> None:
    page = open_page()
    page.route("**/v1/feedback", lambda route: route.fulfill(**error(503, "disk full", "not_kept")))
    ask(page, "count")
    page.get_by_role("button", name="Good answer").click()
    page.get_by_text("It could not be kept").wait_for()
    assert page.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "false"


HOSTILE = """<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>

[a](javascript:window.hacked=3) [b](JaVaScRiPt:hacked) [c](data:text/html,<script>) [d](https://example.org/)
![pixel](https://example.org/pixel.png) <https://example.org/e> https://example.org/f?x=<b>

`<svg onload="hacked=4">`

```html
<iframe src="javascript:window.hacked=5"></iframe>
```

| <b>x</b> | y |
|---|---|
| <img src=x onerror=hacked=6> | `|` |
"""


def test_text_of_the_model_and_of_the_user_stays_text(open_page: Open, address: str) -> None:
    page = open_page()
    answers(page, events(HOSTILE))
    own = '<img src=x onerror="window.hacked=7"> **not bold**'
    body = ask(page, own).locator(".body")
    assert page.locator(".bubble").inner_text() == own
    assert page.locator("#conversations .entry").inner_text() == own
    assert page.evaluate("window.hacked") is None
    assert page.locator("#thread :is(img, script, iframe, b, object, embed, style)").count() == 0
    assert '<img src=x onerror="window.hacked = 1">' in body.inner_text()
    assert body.locator("pre").inner_text() == '<iframe src="javascript:window.hacked=5"></iframe>'
    links = body.locator("a").evaluate_all("links => links.map((link) => link.href)")
    kept = [
        "https://example.org/",
        "https://example.org/pixel.png",
        "https://example.org/e",
        "https://example.org/f?x=",
    ]
    assert links == kept
    assert body.locator("a[rel='noopener noreferrer nofollow'][target=_blank]").count() == 4

    # And where a mistake would make markup of it, the browser would refuse.
    assert "require-trusted-types-for 'script'" in httpx.get(address).headers["content-security-policy"]
    refused = "() => { try { document.body.innerHTML = '<b>'; return false; } catch { return true; } }"
    assert page.evaluate(refused)


MARKDOWN = """## Tea & *coffee*

First line
second line with **bold _and_ both**, **a*b*c**, ~~gone~~, `code **x**`, 2 * 3 * 4, snake_case_name,
**你好**吗 and \\*stars\\*.

1. one
   - deep `a`
     1. deeper
2. two

   still two

> quoted
> - item

| a | b |
|:-:|--:|
| 1 | x \\| y |

---
```python
def f(x):  # why
    return "s" + 1
"""


def test_markdown(open_page: Open) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    answers(page, events(MARKDOWN))
    body = ask(page, "Show all").locator(".body")
    shape = """element => { const walk = (node) => node.nodeType === 3 ? node.data :
      node.localName + "(" + [...node.childNodes].map(walk).join("") + ")"; return [...element.children].map(walk); }"""
    *blocks, code = body.evaluate(shape)
    assert blocks == [
        "h3(Tea & em(coffee))",
        "p(First linebr()second line with strong(bold em(and) both), strong(aem(b)c), del(gone), code(code **x**), "
        "2 * 3 * 4, snake_case_name,br()strong(你好)吗 and *stars*.)",
        "ol(li(p(one)ul(li(deep code(a)ol(li(deeper)))))li(p(two)p(still two)))",
        "blockquote(p(quoted)ul(li(item)))",
        "div(table(thead(tr(th(a)th(b)))tbody(tr(td(1)td(x | y)))))",
        "hr()",
    ]
    # Not closed yet, as while it streams.
    assert "span(def)" in code
    assert "span(# why)" in code
    page.get_by_role("button", name="Copy").nth(1).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):  # why\n    return "s" + 1\n'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("*" * 6000, id="stars"),
        pytest.param("_a" * 5000, id="underscores"),
        pytest.param("[" * 6000, id="brackets"),
        pytest.param("`" * 3000 + "a", id="ticks"),
        pytest.param("> " * 3000 + "x", id="quotes"),
        pytest.param("- " * 3000 + "x", id="lists"),
        pytest.param("|" * 3000 + "\n" + "|-" * 3000, id="table"),
    ],
)
def test_hostile_markdown_is_shown_in_no_time(open_page: Open, text: str) -> None:
    page = open_page()
    answers(page, events(text))
    began = page.evaluate("performance.now()")
    ask(page, "x")
    assert page.evaluate("performance.now()") - began < 5000


def test_languages_and_themes(open_page: Open) -> None:
    page = open_page(locale="zh-CN", color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.get_by_text("想聊点什么？").wait_for()
    assert ask(page, "你好").get_by_role("button", name="换一个回答").is_visible()
    page.get_by_role("button", name="Switch to English").click()
    page.get_by_role("button", name="Another answer").wait_for()
    assert page.locator("html").get_attribute("lang") == "en"
    page.get_by_role("button", name="Theme: like the system").click()
    light = page.evaluate(paper)
    assert dark != light
    page.reload()
    page.get_by_role("button", name="Theme: light").wait_for()
    assert page.evaluate(paper) == light
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(paper) == dark


CONTRAST = """(pairs) => {
  const probe = document.body.appendChild(document.createElement("p"));
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (name) => {
    probe.style.color = `var(--${name})`;
    brush.fillStyle = getComputedStyle(probe).color;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (pair) => {
    const [a, b] = pair.split("/").map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  return pairs.map((pair) => [pair, ratio(pair)]).filter(([, value]) => value < 4.5);
}"""
INKS = {
    "paper": ["ink", "soft", "accent", "good", "warn", "bad"],
    "side": ["ink", "soft"],
    "raised": ["ink", "soft", "accent"],
    "sunken": ["soft", "code-word", "code-string", "code-number", "code-call"],
    "tint": ["ink", "accent", "good"],
    "bad-tint": ["ink", "soft", "bad"],
    "accent": ["on-accent"],
}
"""What is written on what."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_buttons_have_names(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    pairs = [f"{ink}/{paper}" for paper, inks in INKS.items() for ink in inks]
    assert page.evaluate(CONTRAST, pairs) == []
    ask(page, "count")
    unnamed = "buttons => buttons.filter((b) => !(b.ariaLabel || b.textContent.trim())).map((b) => b.outerHTML)"
    assert page.locator("button").evaluate_all(unnamed) == []


def test_reduced_motion_moves_nothing(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    page.get_by_role("button", name="Settings").first.click()
    assert page.evaluate("document.getAnimations().length") == 0


def test_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.type("count")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant.done").wait_for()
    page.get_by_role("button", name="Good answer").focus()
    page.keyboard.press("Enter")
    page.locator(".comment").wait_for()
    focused = "document.activeElement.dataset.act"
    assert page.evaluate(focused) == "up"
    page.locator("#model").focus()
    page.keyboard.press("Enter")
    page.locator("#lineage[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#lineage[open]").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "model"


def test_lineage(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="What stands behind this model").click()
    drawer = page.locator("#lineage-content")
    text = drawer.inner_text()
    for shown in ("tiny", "version 3", "accepted", REVISION[:12], "with uncommitted changes", "3f2a9c1d4b5e"):
        assert shown in text
    assert drawer.locator(".stages li").all_inner_texts() == ["Quantization\nquantize\n4 bit · group 64 · en, zh"]
    assert drawer.locator(".sources li").all_inner_texts() == ["starter\nApache-2.0\ndata/starter/*.jsonl"]
    assert drawer.locator(".gates li.good").inner_text().split("\n") == ["reward/accuracy", "0.8125", ">= 0.5"]
    drawer.get_by_text("Everything recorded").click()
    assert drawer.get_by_text(REVISION, exact=True).is_visible()


def test_another_version_answers_from_here_on(open_page: Open) -> None:
    page = open_page()
    answers(page, events("Old."), events("New.", fingerprint="tiny/4"))
    ask(page, "one")
    newer = {"id": "tiny", "version": "4", "lineage": {}}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [newer]}))
    ask(page, "two")
    page.get_by_text("From here on tiny/4 answers").wait_for()
    page.locator("#model-version", has_text="version 4").wait_for()


def test_phone(open_page: Open) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = open_page(**phone)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    answers(page, events(MARKDOWN + "x" * 300))
    assert page.evaluate(fits)
    page.locator("#prompt").tap()
    page.keyboard.type("line")
    page.keyboard.press("Enter")  # a new line: the button sends
    assert page.locator("#prompt").input_value() == "line\n"
    page.get_by_role("button", name="Send").tap()
    page.locator(".turn.done figure").wait_for()
    assert page.evaluate(fits)
    assert not page.locator("#sidebar").is_visible()
    page.get_by_role("button", name="Open conversations").tap()
    page.locator("#conversations .entry").wait_for()
    assert page.evaluate("document.activeElement.id") == "close-sidebar"
    page.locator("#sidebar").get_by_role("button", name="Settings").tap()
    page.locator("#settings[open]").wait_for()
    assert page.evaluate(fits)
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.locator("#sidebar").wait_for(state="hidden")


def test_busy_server_says_how_long(open_page: Open) -> None:
    page = open_page()
    answers(page, error(429, "16 requests wait already", "server_busy", **{"Retry-After": "2"}), events("Now."))
    answer = ask(page, "one")
    answer.get_by_text("The server is busy with other conversations").wait_for()
    answer.get_by_text("16 requests wait already").wait_for()
    assert answer.get_by_role("button", name="Try again in").is_disabled()
    answer.get_by_role("button", name="Try again", exact=True).click()
    page.locator("#thread").get_by_text("Now.").wait_for()
    assert page.locator(".problem, .variant").count() == 0


def test_server_that_wants_a_key_gets_it(open_page: Open, address: str) -> None:
    page = open_page(go=False)
    asked: list[str | None] = []

    def models(route: Any) -> None:
        asked.append(route.request.headers.get("authorization"))
        if asked[-1] is None:
            route.fulfill(**error(401, "give an API key", "invalid_api_key"))
        else:
            route.fulfill(json={"object": "list", "data": [{"id": "tiny", "version": "3", "lineage": {}}]})

    page.route("**/v1/models", models)
    page.goto(address)
    page.get_by_text("This server wants an API key").wait_for()
    page.get_by_role("button", name="Enter the key").click()
    assert page.evaluate("document.activeElement.id") == "set-key"
    page.keyboard.type("cl-secret")
    page.keyboard.press("Escape")
    page.locator("#model.ready").wait_for()
    assert asked == [None, "Bearer cl-secret"]

    requests = answers(page, error(401, "the API key is not known here", "invalid_api_key"), events("Welcome."))
    ask(page, "one").get_by_role("button", name="Enter the key").click()
    page.get_by_label("API key").fill("cl-better")
    page.keyboard.press("Escape")
    page.locator("#thread").get_by_text("Welcome.").wait_for()
    assert [request["headers"]["authorization"] for request in requests] == ["Bearer cl-secret", "Bearer cl-better"]


@pytest.mark.parametrize(
    ("body", "shown", "text"),
    [
        ({"abort": True}, "The server does not answer", ""),
        (events("Half", end=""), "The connection broke off", "Half"),
        (events("Half", end='data: {"error": {"message": "out of memory"}}\n\n'), "The server failed", "Half"),
        (error(500, "its log says why"), "The server failed", ""),
        (error(429, "over its rate", "rate_limit_exceeded"), "This API key has used up its rate", ""),
        (error(503, "loading"), "The server is starting or changing its model", ""),
        (error(400, "ask for at most 12", "context_length_exceeded"), "too long for this model", ""),
        (error(404, "has 'other'", "model_not_found"), "The server has another model by now", ""),
        (error(400, "temperature: too hot"), "The server did not take the request", ""),
        ({"status": 502, "body": "<html>Bad Gateway</html>"}, "The server does not answer", ""),
    ],
)
def test_errors_are_said_and_tried_again(open_page: Open, body: Any, shown: str, text: str) -> None:
    page = open_page()
    requests = answers(page, body, events("Better."), events("Fine."))
    answer = ask(page, "one")
    answer.get_by_text(shown).wait_for()
    assert answer.locator(".body").inner_text() == text
    answer.get_by_role("button", name="Try again").click()
    page.locator("#thread").get_by_text("Better.").wait_for()
    ask(page, "two")
    assert [message["content"] for message in requests[2]["messages"]] == ["one", "Better.", "two"]


def test_server_that_comes_back_is_found(open_page: Open, address: str) -> None:
    page = open_page(go=False)
    down = [True]
    page.route("**/v1/models", lambda route: route.abort() if down else route.continue_())
    page.goto(address)
    page.get_by_text("The server does not answer").wait_for()
    down.clear()
    page.locator("#model.ready").wait_for()
    assert page.locator("#banner").is_hidden()


def test_page_is_whole_in_the_package(address: str) -> None:
    files = sorted(file.name for file in (ROOT / "chatloom/serving/page").iterdir())
    assert {"index.html", "style.css", "app.js"} <= set(files)
    for name in files:
        text = (ROOT / "chatloom/serving/page" / name).read_text(encoding="utf-8")
        assert "innerHTML" not in text
        # Nothing from elsewhere; a namespace is no address.
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)\w", text), name
        assert httpx.get(f"{address}page/{name}").status_code == 200
    assert httpx.get(f"{address}page/%2e%2e/web.py").status_code == 404
    assert httpx.get(address).headers["x-content-type-options"] == "nosniff"
