"""The page in a browser, over HTTP, and as a process: nothing leaves the machine, nothing stays on it."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import eit
from eit.demo.page import LimitBody, open_page
from eit.errors import UserError
from tests.cli.conftest import failed
from tests.helpers.commands import Running
from tests.helpers.shared import require

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")  # a moving disc


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- Before a page is opened


def test_an_address_that_is_taken_or_elsewhere_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"--port {port} of 127.0.0.1 is taken: give another one" in failed(2, "demo", "--port", port)
    for host in ("203.0.113.7", "no such host", "::1::"):
        error = failed(2, "demo", "--host", host)
        assert error.startswith(f"eit: --host {host}: ") and error.count("\n") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no weights at nowhere"),
        (["digits", "nowhere.onnx"], "no exported model at nowhere.onnx"),
        (["digits"] * 5, "5 models: at most 4"),
        (["--share"], "No such option"),
        (["--port", "70000"], "Invalid value for '--port'"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_line(words, said):
    error = failed(2, "demo", *words)
    assert said in error and "\n" not in error


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "eit demo needs gradio, which is not installed: pip install 'eit[demo]'" in failed(2, "demo", "digits")


@pytest.mark.parametrize("headers", [[(b"content-length", b"11")], [(b"content-length", b"x")], []])
def test_a_body_of_too_many_bytes_is_not_read(headers):
    sent, chunks = [], iter([b"12345", b"67890", b"1"] * 9)

    async def receive():
        return dict(type="http.request", body=next(chunks), more_body=True)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        taken = 0
        while (message := await receive())["type"] != "http.disconnect":
            taken += len(message["body"])
        assert taken == 10

    asyncio.run(LimitBody(app, 10)(dict(type="http", headers=headers), receive, send))
    assert [message.get("status") for message in sent][:1] == ([413] if headers else [])


# -- Over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a page with two models, and the folder of its files."""
    require(find_spec("gradio") is not None, "gradio is not installed: pip install 'eit[demo]'")
    folder = tmp_path_factory.mktemp("uploads")
    with open_page({"one": "digits", "<b>two</b>": "digits"}, folder, port=free_port()) as address:
        yield address.rstrip("/"), folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), "u1")).save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("1", (12000, 9000)).save(folder / "bomb.png")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(21 << 20)
    return folder


def ask(address, *data):
    """The outputs for `data`, or the error, of the endpoint that programs use."""
    call = urllib.request.Request(
        f"{address}/gradio_api/call/predict", json.dumps(dict(data=data)).encode(), {"content-type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(call, timeout=30))["event_id"]
    text = urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}", timeout=60).read().decode()
    kind, content = re.findall(r"event: (complete|error)\ndata: (.*)", text)[-1]
    return json.loads(content) if kind == "complete" else None


@pytest.mark.project
def test_a_program_gets_the_predictions_of_eit_predict(served, pictures):
    from gradio_client import Client, handle_file

    found = Client(served[0], verbose=False).predict(handle_file(pictures / "good.png"), api_name="/predict")
    model = eit.load("digits")
    model.norm.register_forward_hook(lambda *_: None)  # so that predict computes all tokens, as the page does
    (predicted,) = eit.predict(model, pictures / "good.png")
    status, *columns = found
    assert status == "" and len(columns) == 4
    for label in (columns[0], columns[2]):
        assert [(c["label"], c["confidence"]) for c in label["confidences"]] == predicted.labels


@pytest.mark.project
def test_without_names_one_of_the_included_weights_is_chosen(pictures, tmp_path):
    require(find_spec("gradio") is not None, "gradio is not installed: pip install 'eit[demo]'")
    from gradio_client import Client, handle_file

    with open_page((), tmp_path, port=free_port()) as address:
        client = Client(address, verbose=False)
        for words, expected in (([], "digits"), (["digits"], "digits"), (["cifar10"], "cifar10")):
            status, label, _ = client.predict(handle_file(pictures / "good.png"), *words, api_name="/predict")
            (predicted,) = eit.predict(expected, pictures / "good.png")
            assert status == "" and label["label"] == predicted.labels[0][0]
        status, label, _ = client.predict(handle_file(pictures / "good.png"), "owls", api_name="/predict")
        assert "owls is none of the models here: digits, cifar10" in status and "label" not in label


@pytest.mark.project
@pytest.mark.parametrize(
    "value",
    [
        dict(path="/etc/passwd", meta={"_type": "gradio.FileData"}),
        dict(path="/etc/passwd"),
        dict(path="http://127.0.0.1:9/x.png", meta={"_type": "gradio.FileData"}),
        dict(path="https://example.invalid/x.png", meta={"_type": "gradio.FileData"}),
        dict(url="https://example.invalid/x.png", meta={"_type": "gradio.FileData"}),
        dict(url="data:image/png;base64,AAAA"),
        "/etc/passwd",
        [1, 2],
        7,
    ],
)
def test_files_and_addresses_that_nobody_uploaded_are_not_read(served, value, monkeypatch):
    asked = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: asked.append(a))
    found = ask(served[0], value, "one")
    assert found is None or "upload a picture" in found[0]
    assert not asked


@pytest.mark.project
def test_a_body_of_too_many_bytes_is_refused_by_the_server(served):
    for path in ("call/predict", "queue/join", "component_server"):
        big = urllib.request.Request(f"{served[0]}/gradio_api/{path}", bytes(22 << 20))
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
            urllib.request.urlopen(big, timeout=30)
        assert getattr(refused.value, "code", 413) == 413


# -- In a browser


@pytest.fixture(scope="module")
def browser():
    require(CHROMIUM is not None, "Chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *CAMERA])
        yield found
        found.close()


@pytest.fixture
def visit(browser, served):
    """Opens the page; at the end nothing was asked of other hosts, and no error was in the console but `expected`."""
    faults, asked, expected, pages = [], [], [], []

    def open_it(width=1200, scheme="light"):
        page = browser.new_page(color_scheme=scheme, viewport=dict(width=width, height=900))
        pages.append(page)
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served[0])
        page.get_by_role("tab", name="Picture").wait_for()
        page.wait_for_function("document.querySelector('input[type=file]')")
        return page

    open_it.expected = expected
    yield open_it
    for page in pages:
        page.close()
    assert all(url.startswith((served[0], "data:", "blob:")) for url in asked) and asked
    assert [text for text in faults if not any(part in text for part in expected)] == []


CONTRAST = """() => {
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > .99) return c; } return [255, 255, 255]; };
  const texts = ".eit-page :is(h1, h2, h3, p, figcaption, summary, .eit-tools button, .eit-spectrum text)";
  return [...document.querySelectorAll(texts)].filter(e => e.checkVisibility()).map(e => {
    const style = getComputedStyle(e), ink = light(rgba(e instanceof SVGElement ? style.fill : style.color));
    const ground = light(paper(e)), [a, b] = [Math.max(ink, ground), Math.min(ink, ground)];
    return [e.tagName + " " + e.textContent.trim().slice(0, 20), (a + .05) / (b + .05)];
  });
}"""


@pytest.mark.project
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_an_example_gives_classes_and_layers(visit, width, scheme):
    page = visit(width, scheme)
    page.locator(".gallery button").first.click()
    page.locator(".eit-overview").nth(1).wait_for()
    assert page.locator(".eit-overview").count() == 2  # of two models
    assert page.locator("[data-testid=label-output-value], .output-class").count() >= 2
    assert page.get_by_text("<b>two</b>").is_visible()  # a title is text
    assert page.locator("details").count() == 2 * (1 + 5) and page.locator(".eit-map").count() == 2 * (5 + 5 * 4)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = page.evaluate(CONTRAST)
    assert len(found) > 20 and [one for one in found if one[1] < 4.5] == []


@pytest.mark.project
def test_broken_and_huge_uploads_are_answered_in_one_line_and_the_page_goes_on(visit, pictures):
    page = visit()
    visit.expected += ["413", "404", "Response"]  # of Gradio, for what is too large
    for name, said in (("broken", "no image, or of a format"), ("bomb", "has more than 89,478,485 pixels")):
        page.locator("input[type=file]").first.set_input_files(pictures / f"{name}.png")
        alert = page.get_by_role("alert").filter(has_text=f"{name}.png")
        alert.wait_for()
        assert said in alert.inner_text() and "\n" not in alert.inner_text()
        page.get_by_label("Remove Image").click()
        alert.wait_for(state="detached")
    page.locator("input[type=file]").first.set_input_files(pictures / "huge.png")
    page.get_by_text("maximum allowed size of 20").wait_for()
    page.locator("input[type=file]").first.set_input_files(pictures / "good.png")
    page.locator(".eit-overview").first.wait_for()


@pytest.mark.project
def test_a_drawing_is_predicted_and_inverted(visit):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    board = page.locator("canvas")
    box = board.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=5)
    page.mouse.move(box["x"] + 120, box["y"] + 240, steps=5)
    page.mouse.up()
    seen = page.locator(".eit-overview img").first
    seen.wait_for()
    before = seen.get_attribute("src")
    page.get_by_role("button", name="Invert").click()
    page.wait_for_function("before => document.querySelector('.eit-overview img').src !== before", arg=before)
    page.get_by_role("button", name="Clear").click()
    pixels = "c => [...c.getContext('2d').getImageData(0, 0, 280, 280).data].every(v => v === 255)"
    assert board.evaluate(pixels)  # white paper, after Invert


@pytest.mark.project
def test_a_photo_is_taken_with_the_camera(visit):
    page = visit()
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("[...document.querySelectorAll('video')].some(v => v.videoWidth > 0 && v.currentTime > 0)")
    page.get_by_label("capture photo").click()
    page.locator(".eit-overview").first.wait_for()


@pytest.mark.project
def test_the_keyboard_reaches_every_control(visit):
    page = visit()
    page.locator(".gallery button").first.focus()
    page.keyboard.press("Enter")
    page.locator(".eit-overview").first.wait_for()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    wanted = {"Picture", "Draw", "Upload file", "Capture from camera", "Paste from clipboard", "stem", "layer 4"}
    name = "(e => e.getAttribute('aria-label') || e.innerText || '')(document.activeElement)"
    for _ in range(60):
        page.keyboard.press("Tab")
        wanted -= {page.evaluate(name).strip().partition("\n")[0]}
    assert not wanted
    stem = page.locator("summary").first
    stem.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert stem.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


# -- As a process


def live_in(folder):
    os.environ.update(HOME=str(folder / "home"), XDG_CACHE_HOME=str(folder / "home"))
    tempfile.tempdir = str(folder / "temporary")


@pytest.mark.project
def test_ctrl_c_ends_it_at_once_and_nothing_is_left(tmp_path):
    require(find_spec("gradio") is not None, "gradio is not installed: pip install 'eit[demo]'")
    port = free_port()
    for name in ("temporary", "home", "here"):
        (tmp_path / name).mkdir()

    page = Running("demo", "digits", "--port", port, cwd=tmp_path / "here", prepare=partial(live_in, tmp_path))
    until = time.monotonic() + 300
    while time.monotonic() < until and page.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    assert any((tmp_path / "temporary").iterdir())
    began = time.monotonic()
    page.send_signal(signal.SIGINT)
    _, said = page.communicate()
    assert page.returncode == 130 and said.endswith("eit: interrupted\n") and "Traceback" not in said
    assert time.monotonic() - began < 10
    assert not any(any((tmp_path / name).iterdir()) for name in ("temporary", "home", "here"))


def test_a_page_that_cannot_be_opened_raises(tmp_path):
    for names in (["nowhere"], ["digits"] * 5, {"x": "nowhere"}):
        with pytest.raises(UserError), open_page(names, tmp_path):
            raise AssertionError
