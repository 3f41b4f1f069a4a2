"""`optimum-cli llava-ov demo`, driven in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import EXAMPLES, run
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.chat.demo import Visitors


PICTURES = EXAMPLES / "shapes" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """The real command, until the page answers."""

    def __init__(self, bundle, log, *options):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        program = Path(sys.executable).parent / "optimum-cli"
        command = [program, "llava-ov", "demo", bundle, "--port", self.port, "--no-browser", *options]
        with open(log, "w") as output:
            self.process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + 90
        while not self.answers():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def answers(self):
        try:
            return urllib.request.urlopen(self.url, timeout=5).status == 200
        except urllib.error.URLError:
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(shapes_bundle, website, tmp_path_factory):
    log = tmp_path_factory.mktemp("demo") / "log"
    limits = ("--max-megapixels", 1, "--max-upload-mb", 0.5, "--allow-host", website.removeprefix("http://"))
    server = Server(shapes_bundle, log, "--title", "Coloured shapes", *limits)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, BROWSERS)), None)  # else the one that `playwright install` fetched
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a browser: `apt install chromium`, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """What a visitor does."""

    def __init__(self, browser, server):
        self.page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)
        self.box = self.page.locator("#question textarea")
        expect(self.box).to_be_visible(timeout=30_000)

    def upload(self, *files):
        self.page.locator("#question input[type=file]").set_input_files([str(file) for file in files])
        expect(self.pictures).to_be_visible(timeout=15_000)

    def send(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text, answer):
        self.send(text)
        expect(self.answers.last).to_have_text(answer, timeout=20_000)
        expect(self.page.locator("#question .stop-button")).to_have_count(0)

    @property
    def pictures(self):
        return self.page.locator("#question .thumbnail-item, #question .thumbnail-image").first

    @property
    def answers(self):
        return self.page.locator("#chat [data-testid=bot]").filter(visible=True)

    def button(self, name):
        self.page.locator(f"#{name}").click()


def test_two_visitors_talk_about_their_own_pictures(browser, server):
    first, second = Page(browser, server), Page(browser, server)
    first.upload(PICTURES / "a.png")
    second.upload(PICTURES / "b.png")
    first.ask("What colour is the circle?", "The circle is red.")
    second.ask("How many shapes are there?", "There are two shapes.")
    first.ask("Where is the star?", "The star is at the top right.")
    second.ask("What is in the middle?", "A blue square is in the middle.")
    if folder := os.environ.get("SCREENSHOTS"):
        first.page.screenshot(path=f"{folder}/demo.png")

    first.button("retry")
    expect(first.answers.last).to_have_text("The star is at the top right.")
    expect(first.answers).to_have_count(2)
    first.button("undo")
    expect(first.answers).to_have_count(1)
    expect(first.box).to_have_value("Where is the star?")
    first.ask("Where is the star?", "The star is at the top right.")
    first.button("clear")
    expect(first.answers).to_have_count(0)
    expect(second.answers).to_have_count(2)
    # A new conversation: the picture is gone too
    first.upload(PICTURES / "c.png")
    first.ask("Where is the purple star?", "The purple star is at the bottom left.")
    expect(first.answers).to_have_count(1)

    # Nothing that would hand a picture on
    expect(second.page.locator("#chat img").first).to_be_visible()
    for label in ("Share", "Download"):
        expect(second.page.locator(f"#chat [aria-label={label}]").filter(visible=True)).to_have_count(0)

    # With no internet: all that the page asked for came from the server
    for page in (first, second):
        assert page.requests
        assert {url.split("/")[2] for url in page.requests if url.startswith("http")} == {f"127.0.0.1:{server.port}"}


def test_limits(browser, server, tmp_path):
    page = Page(browser, server)
    Image.new("1", (1500, 1500)).save(tmp_path / "wide.png")
    page.upload(tmp_path / "wide.png")
    page.send("What is this?")
    expect(page.page.get_by_text("1500 x 1500 pixels, and at most 1 million are accepted")).to_be_visible(timeout=15_000)


def test_pictures_from_hosts_that_the_operator_allows(browser, server, website):
    page = Page(browser, server)
    page.page.get_by_label("Picture from").fill(f"{website}/elsewhere")
    page.button("fetch")
    expect(page.page.get_by_text("Pictures from 'localhost' are not fetched here")).to_be_visible(timeout=15_000)
    page.page.get_by_label("Picture from").fill(f"{website}/b.png")
    page.button("fetch")
    expect(page.pictures).to_be_visible(timeout=15_000)
    page.ask("How many shapes are there?", "There are two shapes.")


def test_sessions_that_are_too_many_or_idle_go(shapes_bundle):
    model, processor = OVModelForLlavaMPT.from_pretrained(shapes_bundle), AutoProcessor.from_pretrained(shapes_bundle)
    visitors = Visitors(lambda device: lambda: model.chat(processor), limit=2, idle_seconds=3600)
    first = visitors.get("first", "CPU")
    for name in ("second", "first", "third"):
        visitors.get(name, "CPU")
    assert visitors.find("second") is None
    assert visitors.find("first") is first
    assert not first.was_evicted
    assert visitors.get("second", "CPU").was_evicted
    first.session.send("Where is the star?", PICTURES / "a.png").result()

    idle = Visitors(lambda device: lambda: model.chat(processor), limit=2, idle_seconds=0.2)
    idle.get("first", "CPU").session.send("Where is the star?")
    assert len(idle) == 1
    end = time.monotonic() + 10
    while len(idle) and time.monotonic() < end:
        idle.evict()
    assert len(idle) == 0


def test_size_of_uploads(server):
    boundary = "x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + b"0" * 600_000 + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/gradio_api/upload", body, headers))
    assert error.value.code == 413


def join_queue(server, files=()):
    """Ask as a page does."""
    config = json.loads(urllib.request.urlopen(f"{server.url}/config").read())
    asking = next(item["id"] for item in config["dependencies"] if len(item["inputs"]) == 5)
    data = {"fn_index": asking, "session_hash": "visitor", "data": [{"text": "Hi", "files": list(files)}, 0, 0.9, 8, "CPU"]}
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/gradio_api/queue/join?", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
    )


def test_addresses_are_not_fetched(server):
    """Somebody who speaks to the server without its page. The address is its own, so a fetch would show in its answer."""
    join_queue(server, [{"path": f"{server.url}/theme.css", "meta": {"_type": "gradio.FileData"}}])
    stream = urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash=visitor", timeout=30)
    events = [json.loads(line[5:]) for line in stream if line.startswith(b"data:")]
    completed = next(event for event in events if event["msg"] == "process_completed")
    assert not completed["success"]
    assert "this server fetches no addresses" in server.log.read_text() + json.dumps(completed)


def test_words_arrive_one_by_one_and_stop(browser, bundles, tmp_path):
    """A random model talks without end."""
    options = ("--context-window", 100_000, "--max-new-tokens", 20_000, "--parallel-answers", 1, "--max-queue", 1)
    server = Server(bundles["linear_fp16_sharded"], tmp_path / "log", *options)
    try:
        page = Page(browser, server)
        page.send("Write a short poem about the sea.")
        expect(page.page.locator("#question .stop-button")).to_be_visible(timeout=15_000)
        lengths, end = [], time.monotonic() + 20
        while len(set(lengths)) < 3 and time.monotonic() < end:
            lengths.append(len(page.answers.last.text_content(timeout=20_000)))
        assert len(set(lengths)) >= 3
        assert lengths == sorted(lengths)

        join_queue(server)  # may wait; the next one may not
        with pytest.raises(urllib.error.HTTPError) as error:
            join_queue(server)
        assert error.value.code == 503

        page.page.locator("#question .stop-button").click()
        expect(page.page.locator("#question .stop-button")).to_have_count(0, timeout=10_000)
        said = page.answers.last.text_content()
        assert len(said) < 40_000
        page.send("Go on.")
        expect(page.answers).to_have_count(2, timeout=20_000)
    finally:
        server.stop()


def test_a_device_that_is_not_there(shapes_bundle):
    result = run("optimum-cli", "llava-ov", "demo", shapes_bundle, "--device", "TOASTER", check=False)
    assert result.returncode == 1
    assert "OpenVINO finds: CPU" in result.stderr


def test_without_gradio(shapes_bundle):
    code = f"""
import sys
sys.modules["gradio"] = None  # as if it were not installed
sys.argv = ["optimum-cli", "llava-ov", "demo", {str(shapes_bundle)!r}]
from optimum.commands.optimum_cli import main
main()
"""
    result = run(sys.executable, "-c", code, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().endswith('error: The demo needs gradio. Install it with: pip install "optimum-llava-ov[demo]"')
