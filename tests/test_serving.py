"""A served model answers as it does in process, says in words what is wrong, and shows why."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from headstart import serving
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.models import Answers, Model
from tests import examples, versions
from tests.browser import colours, for_documents, opened
from tests.conftest import ROOT, Project, Ran, isolated

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FileChooser, Page

pytest_plugins = ["tests.browser"]
pytestmark = pytest.mark.xdist_group("serving")
slow = pytest.mark.slow
JSON = {"Content-Type": "application/json"}
PRAISE = "the film was splendid next to the lamp"


@dataclass
class Server:
    """A server process that answers, and the first line that it printed."""

    process: subprocess.Popen[str]
    line: str

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.line)
        assert found
        return found[0]

    def post(self, path: str, content: object, headers: dict[str, str] | None = None) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(
            self.url + path, content=body, headers=JSON if headers is None else headers, timeout=60
        )

    def rows(self, *rows: dict[str, Any]) -> httpx.Response:
        return self.post("/invocations", {"dataframe_records": list(rows)})

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serve(project: Project, name: str) -> Iterator[Server]:
    process = subprocess.Popen(
        ["headstart", "serve", name, "--port", "0"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def project(photos: Ran, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has registered a model for texts and one for images."""
    return photos.project.copy(tmp_path_factory.mktemp("served") / "project")


@pytest.fixture(scope="module")
def texts(project: Project) -> Iterator[Server]:
    with serve(project, "moods") as server:
        yield server


@pytest.fixture(scope="module")
def images(project: Project) -> Iterator[Server]:
    with serve(project, "photos") as server:
        yield server


@pytest.fixture(scope="module")
def pictures(project: Project) -> list[Path]:
    return sorted((project.root / "start/photos").rglob("*.png"))


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def in_process(project: Project, name: str, items: str) -> Any:
    """What the version that the registry holds says in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; from headstart import environment, models;"
        f"environment.prepare(Path('.').resolve()); found = models.load('{name}').model({items});"
        "print(json.dumps([found.labels, found.probabilities.tolist()]))"
    )
    return json.loads(project.ok("python", "-c", code).splitlines()[-1])


@slow
def test_the_first_line_says_what_is_served_and_where(texts: Server) -> None:
    assert texts.line == f"serving moods version 1 at {texts.url} (Ctrl-C stops it)\n"


@slow
def test_it_is_alive_where_mlflows_server_is(texts: Server) -> None:
    import mlflow

    assert httpx.get(texts.url + "/ping").status_code == 200
    assert httpx.get(texts.url + "/health").status_code == 200
    assert httpx.get(texts.url + "/version").text == mlflow.__version__


@slow
def test_it_says_what_it_is(texts: Server, images: Server) -> None:
    said = httpx.get(texts.url + "/model").json()
    assert (said["name"], said["version"], said["reads"]) == ("moods", "1", "text")
    assert said["classes"] == ["happy", "unhappy"]
    assert httpx.get(images.url + "/model").json()["reads"] == "image"


@slow
def test_served_texts_get_the_answers_of_the_model(project: Project, texts: Server) -> None:
    sent = [PRAISE, "a cold and dull soup", ""]
    labels, probabilities = in_process(project, "moods", repr(sent))
    said = texts.rows(*({"text": text} for text in sent)).json()["predictions"]
    assert [line["label"] for line in said] == labels
    found = [[line["p:happy"], line["p:unhappy"]] for line in said]
    np.testing.assert_allclose(found, probabilities, rtol=1e-6)


@slow
def test_served_images_get_the_answers_of_the_model(
    project: Project, images: Server, pictures: list[Path]
) -> None:
    sent = pictures[::20]
    labels, probabilities = in_process(project, "photos", f"[Path(p) for p in {[str(p) for p in sent]}]")
    said = images.rows(*({"image": in_base64(path)} for path in sent)).json()["predictions"]
    assert [line["label"] for line in said] == labels
    found = [[line["p:dark"], line["p:light"]] for line in said]
    np.testing.assert_allclose(found, probabilities, rtol=1e-6)


@slow
@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["text"], "data": [[PRAISE]]}},
        {"inputs": {"text": [PRAISE]}},
        {"inputs": [PRAISE]},
        {"instances": [{"text": PRAISE}]},
    ],
    ids=["split", "inputs", "list", "instances"],
)
def test_every_form_that_mlflow_takes_gives_the_same_answer(texts: Server, body: object) -> None:
    assert texts.post("/invocations", body).json() == texts.rows({"text": PRAISE}).json()


@slow
def test_a_csv_is_answered_too(texts: Server) -> None:
    said = texts.post("/invocations", f"text\n{PRAISE}\n".encode(), {"Content-Type": "text/csv"})
    assert said.json() == texts.rows({"text": PRAISE}).json()


def parquet(rows: int, text: str, *, dictionary: bool = False) -> bytes:
    """Rows that are all the same, which Parquet keeps in next to no room."""
    sink = io.BytesIO()
    table = pa.table({"text": pa.array([text] * rows)})
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary)
    return sink.getvalue()


PARQUET = {"Content-Type": "application/vnd.apache.parquet"}
BAD = {
    "malformed JSON": (b"{nope", JSON, 400, "JSON"),
    "empty body": (b"", JSON, 400, "JSON"),
    "a list": (b"[1, 2]", JSON, 400, "dictionary"),
    "another key": ({"rows": 1}, JSON, 400, "exactly one of"),
    "another column": ({"dataframe_records": [{"txt": "a"}]}, JSON, 400, "need a column text.*txt"),
    "no rows": ({"dataframe_records": []}, JSON, 400, "need a column text"),
    "a number": ({"dataframe_records": [{"text": "a"}, {"text": 5}]}, JSON, 400, "no text.*row 1: 5"),
    "null": ({"dataframe_records": [{"text": None}]}, JSON, 400, "no text.*row 0"),
    "ragged rows": ({"dataframe_split": {"columns": ["text"], "data": [["a", "b"]]}}, JSON, 400, "columns"),
    "half a character": (b'{"inputs": {"text": ["\\ud800"]}}', JSON, 400, "no table"),
    "deep nesting": (b"[" * 100_000, JSON, 400, "nested too deeply"),
    "not UTF-8": (b"\xff", JSON, 400, "JSON"),
    "no content type": (b"a", {}, 415, "content types"),
    "another content type": (b"a", {"Content-Type": "text/html"}, 415, "content types"),
    "another charset": (b"a", {"Content-Type": "application/json; charset=latin-1"}, 415, "UTF-8"),
    "a broken CSV": (b'a,b\n"1\n2,3,4\n', {"Content-Type": "text/csv"}, 400, "CSV"),
    "a broken Parquet": (b"PAR1", PARQUET, 400, "Parquet"),
    "an endless number": (b'{"inputs": {"text": [' + b"1" * 5000 + b"]}}", JSON, 400, "4300 digits"),
    "too many rows": ({"inputs": ["a"] * (serving.MOST_ROWS + 1)}, JSON, 413, "10000 rows.*has 10001"),
    "too many lines": (b"text\n" + b"a\n" * 20_000, {"Content-Type": "text/csv"}, 413, "has 20000"),
    "too many rows in Parquet": (parquet(1_000_000, "a"), PARQUET, 413, "10000 rows.*has 1000000"),
    "a Parquet that grows": (parquet(3, "a" * (100 << 20)), PARQUET, 413, "256 MB.*has more"),
    "a Parquet that says one thing many times": (
        parquet(1_000, "a" * (1 << 20), dictionary=True),
        PARQUET,
        413,
        "256 MB.*has more",
    ),
    "too large": (b"x" * (serving.MOST_BYTES + 1), JSON, 413, "32 MB"),
}


def told(response: httpx.Response, status: int, words: str) -> None:
    """A failure is short JSON with a reason, and no stack trace."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error_code", "message"}
    assert re.search(words, response.json()["message"], re.DOTALL)
    assert "Traceback" not in response.text
    assert len(response.text) < 2500


@slow
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_reason(texts: Server, case: str) -> None:
    body, headers, status, words = BAD[case]
    told(texts.post("/invocations", body, headers), status, words)


@slow
def test_a_parquet_is_answered_too(texts: Server) -> None:
    said = texts.post("/invocations", parquet(serving.MOST_ROWS, PRAISE), PARQUET).json()["predictions"]
    assert len(said) == serving.MOST_ROWS
    assert said[-1]["label"] == "happy"


@slow
@pytest.mark.parametrize("path", ["/model", "/explain", "/"])
def test_a_page_whose_name_is_made_to_lead_here_gets_nothing(texts: Server, path: str) -> None:
    port = texts.url.rpartition(":")[2]
    for host in ("elsewhere.example", f"127.0.0.1.elsewhere.example:{port}", "[", ""):
        told(httpx.get(texts.url + path, headers={"Host": host}), 421, "goes by 127.0.0.1, ::1, localhost")
    for host in ("127.0.0.1", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert httpx.get(texts.url + "/model", headers={"Host": host}).status_code == 200


@slow
@pytest.mark.parametrize("kind", ["text/plain", "text/plain; application/json", None])
def test_a_question_must_say_that_it_is_json(texts: Server, kind: str | None) -> None:
    headers = {"Origin": "https://elsewhere.example"} | ({"Content-Type": kind} if kind else {})
    told(texts.post("/explain", {"text": PRAISE}, headers), 415, "application/json")
    assert texts.post(
        "/explain", {"text": PRAISE}, {"Content-Type": "Application/JSON; charset=utf-8"}
    ).is_success


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_SECONDS", 0.01)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/invocations", "headers": []}
    with ThreadPoolExecutor(1) as thread:  # in this one, Playwright's event loop may be running
        thread.submit(asyncio.run, serving.Guard(None, ())(scope, never, send)).result()
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"did not come" in sent[1]["body"]


@slow
def test_a_body_without_a_length_is_limited_too(texts: Server) -> None:
    chunks = (b"x" * (1 << 20) for _ in range(40))
    told(httpx.post(texts.url + "/explain", content=chunks, headers=JSON, timeout=60), 413, "32 MB")


@slow
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": base64.b64encode(b"no picture").decode()}, "not a picture"),
        ({"image": "@@@"}, "cannot be read"),
        ({"image": 5}, "image"),
        ({"image": None}, "image"),
        ({"text": "a"}, "need a column image.*text"),
    ],
    ids=["no picture", "no base64", "number", "null", "text"],
)
def test_a_bad_image_gets_a_reason(images: Server, row: dict[str, Any], words: str) -> None:
    told(images.rows(row), 400, words)


@slow
def test_a_picture_that_would_fill_the_memory_is_refused_unseen(images: Server) -> None:
    side, sink = 1 + math.isqrt(serving.MOST_PIXELS), io.BytesIO()
    Image.new("L", (side, side)).save(sink, format="PNG")
    assert len(sink.getvalue()) < serving.MOST_BYTES / 100
    image = base64.b64encode(sink.getvalue()).decode()
    told(images.rows({"image": image}), 400, r"\(\d+ pixels\) exceeds limit")
    told(images.post("/explain", {"image": image}), 400, r"\(\d+ pixels\) exceeds limit")


@slow
def test_a_request_cannot_name_a_file_of_the_server(images: Server, pictures: list[Path]) -> None:
    told(images.rows({"path": str(pictures[0])}), 400, "need a column image")


@slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        ({"txt": "a"}, "txt"),
        ({"text": 5}, "text"),
        ({}, "reads texts"),
        ({"image": "aaaa"}, "reads texts"),
        ({"text": "a", "label": "glad"}, "happy, unhappy"),
    ],
    ids=["empty", "list", "unknown key", "number", "nothing", "image", "unknown label"],
)
def test_a_bad_question_gets_a_reason(texts: Server, body: object, words: str) -> None:
    told(texts.post("/explain", body), 400, words)


@slow
def test_a_question_with_a_bad_image_gets_a_reason(images: Server) -> None:
    told(images.post("/explain", {"image": "é"}), 400, "base64")
    told(images.post("/explain", {"image": "aaaa"}), 400, "not a picture")


@slow
def test_an_unknown_address_or_method_gets_a_reason(texts: Server) -> None:
    told(httpx.get(texts.url + "/nowhere"), 404, "Not Found")
    told(httpx.get(texts.url + "/invocations"), 405, "Not Allowed")


@slow
def test_a_text_is_explained_word_by_word(texts: Server) -> None:
    said = texts.post("/explain", {"text": PRAISE}).json()
    assert said["label"] == said["explained"] == "happy"
    assert sum(said["probabilities"].values()) == pytest.approx(1)
    assert "".join(word for word, _ in said["words"]) == PRAISE
    other = texts.post("/explain", {"text": PRAISE, "label": "unhappy"}).json()
    assert (other["label"], other["explained"]) == ("happy", "unhappy")
    assert other["words"][3][1] == pytest.approx(-said["words"][3][1], abs=1e-3)


@slow
def test_many_clients_at_once_each_get_their_own_answer(texts: Server) -> None:
    sent = [f"the {thing} was {mood}" for thing in examples.THINGS for mood in examples.GOOD + examples.BAD]
    alone = [line["p:happy"] for line in texts.rows(*({"text": text} for text in sent)).json()["predictions"]]

    def ask(text: str) -> float:
        return float(texts.rows({"text": text}).json()["predictions"][0]["p:happy"])

    with ThreadPoolExecutor(32) as clients:
        np.testing.assert_allclose(list(clients.map(ask, sent)), alone, rtol=1e-3, atol=1e-6)


@slow
def test_one_clients_broken_image_is_not_another_clients_trouble(
    images: Server, pictures: list[Path]
) -> None:
    good = {"image": in_base64(pictures[0])}
    bad = {"image": base64.b64encode(b"broken").decode()}
    with ThreadPoolExecutor(32) as clients:
        statuses = list(
            clients.map(lambda i: images.rows(bad if i % 4 == 0 else good).status_code, range(64))
        )
    assert statuses == [400 if i % 4 == 0 else 200 for i in range(64)]


@slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.long),
    ],
)
def test_it_stops_cleanly_and_leaves_no_process(project: Project, how: int) -> None:
    with serve(project, "moods") as server:
        assert server.rows({"text": PRAISE}).status_code == 200
        assert server.stop(how) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


# A server without a model, one of whose steps is another: what a signal meets there.
SIGNALLED = """
import asyncio, os, signal, sys, time
from types import SimpleNamespace
import uvicorn
from headstart import serving

serve = uvicorn.Server.serve

async def early(server, sockets):
    os.kill(os.getpid(), signal.SIGTERM)  # before uvicorn listens for it
    await serve(server, sockets)

async def late(server, sockets):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)  # a request that goes on
    print("stopped", flush=True)

serving.app_of = lambda version, names: None
uvicorn.Server.serve = {"early": early, "late": late}[sys.argv[1]]
serving.serve(SimpleNamespace(name="small", version="1"), serving.bound("127.0.0.1", 0))
"""


def test_a_signal_that_comes_before_the_server_listens_stops_it() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, "early"], stdout=subprocess.DEVNULL, timeout=50)
    assert done.returncode == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_server_that_waits_for_a_request_can_be_stopped_again(how: int) -> None:
    command = [sys.executable, "-c", SIGNALLED, "late"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "stopped\n" in iter(process.stdout.readline, "")
        for _ in range(500):
            if process.poll() is not None:
                break
            process.send_signal(how)  # the first may come while uvicorn still returns
            time.sleep(0.1)
        else:
            process.kill()
    assert process.returncode == -how


@slow
def test_a_taken_port_is_told(project: Project, texts: Server) -> None:
    port = texts.url.rpartition(":")[2]
    done = project("headstart", "serve", "moods", "--port", port)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot serve at this address")
    assert f"127.0.0.1:{port}" in done.stderr


@slow
@pytest.mark.parametrize("asked", [["nobody"], ["moods", "--version", "99"]], ids=["name", "version"])
def test_a_model_that_does_not_exist_is_told(project: Project, asked: list[str]) -> None:
    done = project("headstart", "serve", *asked, "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the registry has no")


def shares(page: Page) -> dict[str, str]:
    lines = page.locator("#bars button")
    return {line.locator(".name").inner_text(): line.locator(".share").inner_text() for line in lines.all()}


@slow
def test_a_text_typed_into_the_page_gets_a_label_and_tinted_words(browser: Browser, texts: Server) -> None:
    with opened(browser, texts.url) as page:
        page.get_by_label("A text to classify").fill(PRAISE)
        page.keyboard.press("Enter")
        page.wait_for_selector("#words span")
        assert page.locator("#label").inner_text() == "happy"
        assert page.title() == "moods version 1"
        assert page.locator("#words").inner_text() == PRAISE
        assert set(shares(page)) == {"happy", "unhappy"}
        tints = page.eval_on_selector_all("#words span", "all => all.map(e => e.style.backgroundColor)")
        assert len(set(tints)) > 1


@slow
def test_the_page_explains_the_class_that_is_pressed(browser: Browser, texts: Server) -> None:
    with opened(browser, texts.url) as page:
        page.get_by_label("A text to classify").fill(PRAISE)
        page.get_by_role("button", name="Classify").click()
        page.get_by_role("button", name="unhappy").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("button[aria-pressed=true] >> text=unhappy")
        assert "speaks for unhappy" in page.locator("#legend").inner_text()
        assert page.locator("#label").inner_text() == "happy"


def choose(page: Page, path: Path) -> None:
    page.get_by_label("Choose an image").set_input_files(path)


def drop(page: Page, path: Path) -> None:
    dropped = page.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), carried = new DataTransfer();
            carried.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
            return carried;
        }""",
        in_base64(path),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})


@slow
@pytest.mark.parametrize("give", [choose, drop])
def test_an_image_given_to_the_page_gets_a_label_bars_and_an_overlay(
    browser: Browser, images: Server, pictures: list[Path], give: Callable[[Page, Path], None]
) -> None:
    with opened(browser, images.url) as page:
        page.wait_for_selector("#drop", state="visible")
        give(page, pictures[0])
        page.wait_for_selector("#map", state="visible")
        width = page.locator("#map").evaluate("map => map.decode().then(() => map.naturalWidth)")
        assert width == 160  # as the network sees it
        assert page.locator("#label").inner_text() == "dark"
        assert set(shares(page)) == {"dark", "light"}
        assert page.locator("#map").bounding_box() == page.locator("#shown").bounding_box()
        page.get_by_label("Show what speaks for the label").uncheck()
        assert not page.locator("#map").is_visible()


@contextmanager
def shown(name: str, made: Server, folder: Path) -> Iterator[Server]:
    """The model that the documents show, where `make demo` has registered it; else the one made here."""
    if (Layout(ROOT, name).report / "report.html").exists():
        with serve(Project(ROOT, isolated(folder)), name) as server:
            yield server
    else:
        yield made


@slow
def test_screenshots_for_the_documents(
    browser: Browser, texts: Server, images: Server, pictures: list[Path], tmp_path: Path
) -> None:
    folder = for_documents(tmp_path)
    with (
        shown("sentiment", texts, tmp_path) as server,
        opened(browser, server.url, width=1000, height=500) as page,
    ):
        page.get_by_label("A text to classify").fill(
            "The lamp looks lovely, but the switch broke after a week and nobody answered my letters. "
            "What a waste!"
        )
        page.keyboard.press("Enter")
        page.wait_for_selector("#words span")
        page.screenshot(path=folder / "serve-text.png", full_page=True)
    cell, answers = pictures[0], ROOT / "model/solar-cells/predictions.parquet"
    if answers.exists():  # the defect that the model is surest of, among cells that it has not learned from
        rows = pd.read_parquet(answers).query("split == 'test'")
        cell = ROOT / "data/solar-cells" / rows["id"][rows["p:defective"].idxmax()]
    with (
        shown("solar-cells", images, tmp_path) as server,
        opened(browser, server.url, width=1000, height=500) as page,
    ):
        page.wait_for_selector("#drop", state="visible")
        choose(page, cell)
        page.wait_for_selector("#map", state="visible")
        page.locator("#map").evaluate("image => image.decode()")
        page.screenshot(path=folder / "serve-image.png", full_page=True)
    for name in ("serve-text.png", "serve-image.png"):
        assert colours(folder / name) > 100  # it is not blank


@slow
def test_the_page_says_in_words_what_is_wrong_with_an_image(
    browser: Browser, images: Server, pictures: list[Path], tmp_path: Path
) -> None:
    broken, large = tmp_path / "broken.png", tmp_path / "large.png"
    broken.write_bytes(b"no picture")
    large.write_bytes(b"x" * serving.MOST_BYTES)
    context = browser.new_context()  # the answer 400 is an error to the browser's console
    page = context.new_page()
    page.goto(images.url)
    page.wait_for_selector("#drop", state="visible")
    choose(page, broken)
    page.wait_for_selector("#alarm:has-text('not a picture')")
    choose(page, large)
    page.wait_for_selector("#alarm:has-text('too much for this server')")
    choose(page, pictures[0])
    page.wait_for_selector("#map", state="visible")
    assert not page.locator("#alarm").is_visible()
    context.close()


@slow
def test_the_map_of_an_earlier_image_is_never_laid_over_another(
    browser: Browser, images: Server, pictures: list[Path]
) -> None:
    context = browser.new_context()  # the failed request is an error to the browser's console
    page = context.new_page()
    page.goto(images.url)
    page.wait_for_selector("#drop", state="visible")
    choose(page, pictures[0])
    page.wait_for_selector("#map", state="visible")
    page.route("**/explain", lambda route: route.abort())
    choose(page, pictures[1])
    page.wait_for_selector("#alarm:has-text('does not answer')")
    page.get_by_label("Show what speaks for the label").uncheck()
    page.get_by_label("Show what speaks for the label").check()
    assert page.locator("#shown").is_visible()
    assert not page.locator("#map").is_visible()
    context.close()


@slow
def test_an_image_that_is_too_large_ends_the_wait_for_the_one_before(
    browser: Browser, images: Server, pictures: list[Path], tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * serving.MOST_BYTES)
    with opened(browser, images.url) as page:
        page.wait_for_selector("#drop", state="visible")
        page.route("**/explain", lambda route: None)  # which is never answered
        choose(page, pictures[0])
        page.wait_for_selector("#answer.busy[aria-busy]")
        choose(page, large)
        page.wait_for_selector("#alarm:has-text('too much for this server')")
        assert page.locator("#answer.busy, #answer[aria-busy]").count() == 0


@slow
def test_the_page_says_that_the_server_is_gone(browser: Browser, project: Project) -> None:
    with serve(project, "moods") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("A text to classify").fill(PRAISE)
        server.stop()
        page.get_by_role("button", name="Classify").click()
        page.wait_for_selector("#alarm:has-text('does not answer')")
        page.close()


@slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_by_day_and_by_night(browser: Browser, texts: Server, scheme: Any) -> None:
    with opened(browser, texts.url, width=375, scheme=scheme) as page:
        page.get_by_label("A text to classify").fill("splendid " * 40 + "x" * 200)
        page.get_by_role("button", name="Classify").click()
        page.wait_for_selector("#words span")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 64) == (scheme == "dark")


@slow
def test_the_page_is_used_by_keyboard_alone(browser: Browser, images: Server, texts: Server) -> None:
    with opened(browser, texts.url) as page:
        page.wait_for_selector("#said:focus")
        page.keyboard.type(PRAISE)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#words span")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.dataset.name") == "happy"
    with opened(browser, images.url) as page:
        choosers: list[FileChooser] = []

        def opens(chooser: FileChooser) -> None:
            choosers.append(chooser)

        page.on("filechooser", opens)  # from now on: asked for at the key, it may come too late
        page.wait_for_selector("#drop", state="visible")
        page.keyboard.press("Tab")
        page.wait_for_selector("#file:focus")
        page.keyboard.press("Space")
        if not choosers:
            page.wait_for_event("filechooser")


def test_the_page_names_no_address_but_its_own() -> None:
    page = serving.PAGE.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^'\"\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import", page)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return versions.read(versions.write_images_version(tmp_path_factory.mktemp("small"))).model


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()


class Counted:
    """A model that notes how many items it was asked about at a time."""

    def __init__(self, model: Model) -> None:
        self.model, self.sizes = model, list[int]()

    def __call__(self, items: Sequence[Any]) -> Answers:
        self.sizes.append(len(items))
        return self.model(items)


def ask_together(queue: serving.Queue, questions: Sequence[Sequence[Any]]) -> list[Answers | Exception]:
    """Answers to questions that all came while another had the turn."""
    found: list[Any] = [None] * len(questions)

    def ask(place: int) -> None:
        try:
            found[place] = queue(questions[place])
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(questions))]
    with queue.turn:
        for thread in threads:
            thread.start()
        while len(queue.waiting) < len(questions):
            pass
    for thread in threads:
        thread.join()
    return found


def test_those_who_wait_are_answered_in_one_pass_and_each_its_own(small: Model) -> None:
    pictures = [noise(i) for i in range(7)]
    questions = [pictures[:1], pictures[1:4], [], pictures[4:]]
    counted = Counted(small)
    found = ask_together(serving.Queue(counted), questions)  # type: ignore[arg-type]
    assert counted.sizes == [7]
    for answers, question in zip(found, questions, strict=True):
        assert isinstance(answers, Answers)
        alone = small(question)
        assert answers.labels == alone.labels
        np.testing.assert_allclose(answers.probabilities, alone.probabilities, rtol=1e-5)


def test_an_item_that_cannot_be_read_is_told_to_the_one_who_sent_it(small: Model) -> None:
    good = noise(0)
    first, second, third = ask_together(serving.Queue(small), [[good], [b"broken"], [good, good]])
    assert isinstance(first, Answers) and len(first.labels) == 1
    assert isinstance(second, HeadstartError)
    assert isinstance(third, Answers) and len(third.labels) == 2
