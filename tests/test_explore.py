"""The explore page: its parts without a browser, and the page itself in a headless Chromium.

`pytest -m slow tests/test_explore.py` runs the browser; it needs Chromium with its driver (Debian:
`apt install chromium chromium-driver`) and selenium. JZ3_SCREENSHOTS=FOLDER keeps pictures of the page.
"""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jz3.cli import main
from jz3.config import shipped_recipe
from jz3.explore import render, server
from jz3.features.exact import exact_cosines
from jz3.files import write_json
from jz3.gradients import tokenize_text
from jz3.index.opening import open_collection
from jz3.index.scores import ScoreTable
from jz3.records import Doc


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    columns = {
        "id": [f"{i:016x}" for i in range(6)],
        "source": ["a", "b", "a", "b", "c", "a"],
        "influence:x": np.array([0.1, 0.6, 0.3, 0.6, -0.2, 0.0], np.float32),
        "influence:y": np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], np.float32),
        "bm25:x": np.zeros(6, np.float32),
    }
    pq.write_table(pa.table(columns), path)
    return ScoreTable([path])


def test_best_and_worst_by_pages(table: ScoreTable) -> None:
    assert table.tasks == ["x", "y"] and len(table) == 6
    best = [table.page("x", False, start, 4) for start in (0, 4)]
    # Equal scores stay in the file's order.
    assert [int(str(i), 16) for _, i, _ in best[0]] == [1, 3, 2, 0] and [
        int(str(i), 16) for _, i, _ in best[1]
    ] == [
        5,
        4,
    ]
    assert [r for page in best for r, *_ in page] == [1, 2, 3, 4, 5, 6]
    worst = table.page("x", True, 0, 2)
    assert [(r, int(str(i), 16)) for r, i, _ in worst] == [(6, 4), (5, 5)]
    assert worst[0][2] == pytest.approx(-0.2)


def test_histograms_share_their_range_and_count_everything(table: ScoreTable) -> None:
    (one, edges), (two, same) = table.histogram("x"), table.histogram("y")
    assert one.sum() == two.sum() == 6 and np.array_equal(edges, same)
    assert edges[0] == pytest.approx(-0.2) and edges[-1] == pytest.approx(0.6)


def test_folders_named_like_columns_are_no_columns(table: ScoreTable, tmp_path: Path) -> None:
    paths = [tmp_path / "source=web" / f"{number}.parquet" for number in range(2)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(table._paths[0], path)
    joined = ScoreTable(paths)
    assert joined.sources == ["a", "b", "c"] and len(joined) == 12


def test_source_mix(table: ScoreTable) -> None:
    mix = table.mix(2)
    assert mix["whole corpus"] == {"a": 0.5, "b": pytest.approx(1 / 3), "c": pytest.approx(1 / 6)}
    assert mix["best 2: x"] == {"a": 0, "b": 1, "c": 0} and mix["best 2: y"] == {"a": 0.5, "b": 0, "c": 0.5}
    for picture in (render.histograms(table), render.source_mix(table, 2)):
        assert "<svg" in picture and "http-equiv" not in picture
        assert not re.search(r"(?:src|href)=\"(?!#)", picture)


def test_many_sources_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sources = [f"part-{i % 40}.jsonl" for i in range(80)] + ["books"] * 20
    columns = {"source": sources, "influence:x": np.arange(100, dtype=np.float32)}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    drawn: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.barh",
        lambda axis, names, share, left, label, **style: drawn.append((label, share.tolist())),
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axis, **style: None)
    render.source_mix(ScoreTable([tmp_path / "scores.parquet"]), 10)
    assert len(drawn) == render.SOURCES and ("books", [0.2, 1.0]) in drawn
    assert drawn[-1][0] == "30 others"
    assert np.allclose(np.sum([share for _, share in drawn], 0), 1)


def test_names_of_sources_are_no_formulas(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jz3.report.page import _mix, _plot

    name = "$\\frac$.jsonl"
    pq.write_table(
        pa.table({"source": [name], "influence:x": np.ones(1, np.float32)}), tmp_path / "scores.parquet"
    )
    assert "<svg" in render.source_mix(ScoreTable([tmp_path / "scores.parquet"]), 1)
    assert _plot(lambda axes: _mix(axes, {"chosen": {name: 1}})).startswith("data:image/png")


def test_texts_are_escaped() -> None:
    evil = "<script>alert(1)</script> & 'x'"
    doc = Doc(id="0" * 16, text=evil, source="<b>", tokens=3)
    shown = render.card(1, 0.5, doc, render.plain(evil), 2.0)
    assert (
        "<script" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown and "width:100%" in shown
    )
    tinted = render.highlighted(evil, ["<script>", "alert"], [0.2, -0.1])
    assert "<script" not in tinted and re.sub(r"<[^>]*>", "", tinted) == render.plain(evil)
    assert "<img" not in render.message("<img src=x>", "error")


def test_tokens_are_tinted_by_sign_and_strength() -> None:
    shown = render.highlighted("abc rest", ["a", "b", "c"], [0.4, -0.1, 0.0])
    colours = re.findall(r"rgba\(([\d, ]+),([\d.]+)\)", shown)
    assert colours == [(render.HELPS, "0.75"), (render.HURTS, "0.38"), (render.HURTS, "0.00")]
    assert shown.endswith("</span> rest") and 'title="+0.40000"' in shown
    assert "0.00)" in render.highlighted("a", ["a"], [0.0])


def test_view(small_run: Path) -> None:
    """Without a browser: what is found, its order, its paging, its tokens."""
    from jz3.explore.view import View

    view = View(open_collection(small_run))
    assert "recall@100 1.000" in view.header() and f"{len(view.table())} texts" in view.header()
    assert len(view.examples()) == 2 and all(len(row) == 2 for row in view.examples())
    answer = view.ask("What is the sum of 12 and 5?", "")
    assert "all its tokens scored" in answer.about
    assert [m.score for m in answer.matches] == sorted((m.score for m in answer.matches), reverse=True)
    shown = view.found(answer, 5, 5, False)
    assert re.findall(r'jz3-rank">(\d+)<', shown) == ["6", "7", "8", "9", "10"] and "rgba(" not in shown
    tinted = view.found(answer, 0, 2, True)
    values = [
        sum(float(v) for v in re.findall(r'title="([+-][\d.]+)"', card))
        for card in tinted.split("<article")[1:]
    ]
    # A text's token values add up to its exact cosine.
    searcher = view.searcher
    texts = [
        tokenize_text(searcher.tokenizer, m.doc.id, m.doc.text, searcher.document_tokens)
        for m in answer.matches[:2]
    ]
    exact = exact_cosines(searcher.encoders[0].model, searcher.encoders[0].layers, texts, [answer.tokens])[
        :, 0
    ]
    # Titles have five digits, so that their sum is off by up to 5e-6 a token.
    assert values == pytest.approx(exact.tolist(), abs=2e-3) and abs(values[0]) > 0.01
    assert "its solution&#x27;s tokens scored" in view.found(
        view.ask("What is 2 + 2?", "It is 4."), 0, 1, False
    )
    with pytest.raises(ValueError, match="empty"):
        view.ask(" ", "")
    task = view.table().tasks[0]
    best, worst = view.ranked(task, False, 0, 3), view.ranked(task, True, 0, 3)
    scores = [[float(s) for s in re.findall(r'jz3-score">([+-][\d.]+)<', part)] for part in (best, worst)]
    assert scores[0] == sorted(scores[0], reverse=True) and scores[1] == sorted(scores[1])
    assert scores[0][0] > scores[1][0]
    assert view.pictures().count("<svg") == 2


def test_the_recipe_says_what_is_a_prompt(tmp_path: Path) -> None:
    recipe = shipped_recipe("tiny")
    for field in ("", "ask"):
        features = dataclasses.replace(recipe.features, prompt_field=field)
        write_json(
            tmp_path / "recipe.json", dataclasses.asdict(dataclasses.replace(recipe, features=features))
        )
        assert open_collection(tmp_path).prompt_field == field


def test_start_tokens_stand_for_no_characters(
    small_run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_gradients_tokens import with_start

    from jz3.explore.view import View

    view = View(open_collection(small_run))
    view.searcher.tokenizer = with_start(tiny_model)
    monkeypatch.setattr(render, "highlighted", lambda text, pieces, values: (pieces, values))
    doc = Doc(id="0", text="The sum of 12 and 5 is 17.", source="s", tokens=9)
    pieces, values = view._explained(doc, tokenize_text(view.searcher.tokenizer, "q", "12 and 5", 100))
    assert len(pieces) == len(values) and pieces[0] == "" and "".join(pieces) == doc.text


def test_a_run_without_an_index_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert main(["explore", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


class Page:
    """`jz3 explore` in a process of its own."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "jz3", "explore", str(run), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline() if self.process.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"the page did not start: {line!r}"
        self.url = found[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"sec-fetch-site": "cross-site"}, 200),  # a link to the page
        ("POST", "/gradio_api/queue/join", {}, 200),
        ("POST", "/gradio_api/queue/join", {"origin": "http://localhost:8", "host": "localhost:8"}, 200),
        ("POST", "/gradio_api/queue/join", {"origin": "https://proxy", "sec-fetch-site": "same-origin"}, 200),
        ("POST", "/gradio_api/queue/join", {"origin": "http://evil.example", "host": "localhost:8"}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": "null", "host": "localhost:8"}, 403),
        ("POST", "/gradio_api/call/show", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", "/gradio_api/upload", {}, 403),
    ],
)
def test_orders_of_other_sites_and_uploads_are_refused(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    pytest.importorskip("starlette")
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(server._Guard(app)(scope, None, send))
    assert sent[0]["status"] == status
    assert b"content-security-policy" in dict(sent[0]["headers"])


@pytest.fixture(scope="module")
def page(small_run: Path) -> Iterator[Page]:
    pytest.importorskip("gradio")
    page = Page(small_run)
    yield page
    page.stop()


def get(url: str, host: str = "") -> tuple[int, Any, str]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_page_is_for_this_machine_alone(page: Page, small_run: Path) -> None:
    status, headers, text = get(page.url + "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    # Scripts, styles and fonts are the page's own.
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(?:https?:)?//", text)
    config = json.loads(get(page.url + "/config")[2])
    assert config["analytics_enabled"] is False
    assert get(page.url + "/", host="evil.example:80")[0] == 400
    port = page.url.rpartition(":")[2]
    listening = Path("/proc/net/tcp").read_text()
    assert re.search(rf"0100007F:{int(port):04X} ", listening)
    assert not re.search(rf"00000000:{int(port):04X} ", listening)
    command = [sys.executable, "-m", "jz3", "explore", str(small_run), "--port", port]
    taken = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert taken.returncode == 2 and f"can't listen on 127.0.0.1 port {port}" in taken.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_page_in_a_browser(page: Page, browser: Any, small_run: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def all_of(selector: str) -> list[Any]:
        return [e for e in browser.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def texts(selector: str) -> list[str]:
        return [e.text for e in all_of(selector)]

    def until(condition: Any) -> None:
        from selenium.common.exceptions import StaleElementReferenceException

        wait = WebDriverWait(browser, 120, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: condition())

    def shoot(name: str) -> None:
        if folder := os.environ.get("JZ3_SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / f"{name}.png"))

    browser.get(page.url)
    until(lambda: all_of("#problem textarea"))

    # Nothing typed: the page says so, and stays usable.
    all_of("#ask")[0].click()
    until(lambda: texts(".jz3-error") == ["the text to look up is empty"])

    # A problem finds texts, with tinted tokens that are the corpus's.
    lines = (small_run / "corpus" / "docs.jsonl").read_text().splitlines()
    docs = {row["id"]: row for row in map(json.loads, lines)}
    all_of("#problem textarea")[0].send_keys("What is the sum of 12 and 5 < 6?")
    all_of("#ask")[0].click()
    until(lambda: all_of(".jz3-legend") and len(all_of(".jz3-card")) == 5)
    shoot("look-up")
    for key, source, text in zip(texts(".jz3-id"), texts(".jz3-source"), all_of(".jz3-text"), strict=True):
        row = docs[key[:16]]
        assert source == row["source"] and text.get_attribute("textContent") == row["text"]
    scores = [float(s) for s in texts(".jz3-score")]
    assert scores == sorted(scores, reverse=True)
    tints = {e.value_of_css_property("background-color") for e in all_of(".jz3-card .jz3-text span")[:60]}
    assert len(tints) > 5
    assert texts(".jz3-rank") == ["1", "2", "3", "4", "5"]
    assert not all_of("#found-previous")[0].is_enabled()

    # On and back.
    first = texts(".jz3-id")
    all_of("#found-next")[0].click()
    until(lambda: texts(".jz3-rank") == ["6", "7", "8", "9", "10"])
    assert not set(first) & set(texts(".jz3-id")) and texts("#found-place")[0].startswith("6 to 10 of")
    until(lambda: all_of(".jz3-legend"))
    all_of("#found-previous")[0].click()
    until(lambda: texts(".jz3-rank") == ["1", "2", "3", "4", "5"])
    assert texts(".jz3-id") == first

    # An example fills in problem and solution.
    until(lambda: not all_of(".generating"))
    all_of(".gallery-item, .gallery button")[0].click()
    until(lambda: all_of("#solution textarea")[0].get_attribute("value"))
    all_of("#ask")[0].click()
    until(lambda: any("its solution's tokens scored" in t for t in texts(".jz3-message")))

    look, ranked, pictures = browser.find_elements(By.CSS_SELECTOR, "[role=tab]")[:3]
    ranked.click()
    until(lambda: texts(".jz3-rank")[:2] == ["1", "2"] and all_of("#side"))
    shoot("texts")
    best = texts(".jz3-id")
    all_of("#texts-next")[0].click()
    until(lambda: texts(".jz3-rank")[:1] == ["6"])
    all_of("#side input[value=worst]")[0].click()
    until(lambda: texts(".jz3-rank") and int(texts(".jz3-rank")[0]) > 20)
    worst = [float(s) for s in texts(".jz3-score")]
    assert worst == sorted(worst) and not set(best) & set(texts(".jz3-id"))

    pictures.click()
    until(lambda: len(all_of(".jz3-picture svg")) == 2)
    shoot("scores")

    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors, errors
    asked = {
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    }
    assert asked and all(url.startswith((page.url + "/", "data:", "blob:")) for url in asked), asked


def test_other_hosts_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from jz3.explore.server import _is_loopback

    assert all(_is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(_is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"))
