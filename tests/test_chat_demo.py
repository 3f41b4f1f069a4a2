"""`optimum-cli llava-ov demo`, driven in a real browser."""

import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import programs
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import EXAMPLES, run
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.chat.messages import text_of
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.demo.page import Demo, Limits, Turn, Visitors, build_page, run_demo
from optimum_llava_ov.samples.shapes import render, small_question, small_scene


# A browser on a busy machine may take longer than a test waits
pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]


PICTURES = EXAMPLES / "shapes" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REBINDING = "--host-resolver-rules=MAP elsewhere.example 127.0.0.1"  # a site whose name leads to this machine


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """The real command, until the page answers."""

    def __init__(self, bundle, log, *options, fresh=False):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        program = Path(sys.executable).parent / "optimum-cli"
        command = [program, "llava-ov", "demo", bundle, "--port", self.port, "--no-browser", *options]
        command = [str(part) for part in command]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command if fresh else programs.quick(command), stdout=output, stderr=subprocess.STDOUT
            )
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
    limits = ("--max-megapixels", 1, "--max-upload-mb", 0.5)
    hosts = ("--allow-host", website.removeprefix("http://"), "--allow-name", "shapes.example")
    server = Server(shapes_bundle, log, "--title", "Coloured shapes", *limits, *hosts, fresh=True)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        program = next(
            filter(None, map(shutil.which, BROWSERS)), None
        )  # else the one that `playwright install` fetched
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a browser: `apt install chromium`, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, REBINDING])
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium):
    """The browser. Its pages are closed after the test, because open ones draw and take time from others."""
    yield chromium
    for context in chromium.contexts:
        context.close()


class Page:
    """What a visitor does."""

    def __init__(self, browser, server, width=1200, height=900, **options):
        self.page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.messages = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.goto(server.url)
        self.box = self.page.locator("#question textarea")
        expect(self.box).to_be_visible(timeout=60_000)

    def upload(self, *files):
        self.page.locator("#question input[type=file]").set_input_files([str(file) for file in files])
        expect(self.pictures).to_be_visible(timeout=60_000)

    def send(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text, answer):
        self.send(text)
        expect(self.answers.last).to_have_text(answer, timeout=60_000)
        expect(self.page.locator("#question .stop-button")).to_have_count(0)

    @property
    def session(self):
        """The id that the page has chosen for itself."""
        return next(filter(None, (re.search(r"/heartbeat/(\w+)", url) for url in self.requests)))[1]

    @property
    def pictures(self):
        return self.page.locator("#question .thumbnail-item, #question .thumbnail-image").first

    @property
    def answers(self):
        return self.page.locator("#chat [data-testid=bot] .prose").filter(visible=True)

    def button(self, name):
        """Press a button below the conversation, or one at the last answer."""
        at_answer = {"retry": "Retry", "undo": "Undo"}
        place = f"#chat [aria-label={at_answer[name]}]" if name in at_answer else f"#{name}"
        # The browser applies the last value of an answer once more when its event ends, shortly after the answer is shown
        self.page.wait_for_timeout(700)
        self.page.locator(place).last.click()


def test_two_visitors_talk_about_their_own_pictures(browser, server):
    first, second = Page(browser, server), Page(browser, server)
    first.upload(PICTURES / "a.png")
    second.upload(PICTURES / "b.png")
    first.ask("What colour is the circle?", "The circle is red.")
    if folder := os.environ.get("SCREENSHOTS"):  # docs/demo.png, without the box that this server's options add
        first.page.evaluate("document.getElementById('addresses').style.display = 'none'")
        first.page.set_viewport_size({"width": 1000, "height": 920})
        first.page.wait_for_timeout(700)
        first.page.screenshot(path=f"{folder}/demo.png")
    second.ask("How many shapes are there?", "There are two shapes.")
    first.ask("Where is the star?", "The star is at the top right.")
    second.ask("What is in the middle?", "A blue square is in the middle.")
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
        assert not [message for message in page.messages if "Content Security Policy" in message]
        assert {url.split("/")[2] for url in page.requests if url.startswith("http")} == {f"127.0.0.1:{server.port}"}


def test_limits(browser, server, tmp_path):
    page = Page(browser, server)
    file = tmp_path / "<img src=x onerror=document.title='taken'>.png"
    Image.new("1", (1500, 1500)).save(file)
    page.upload(file)
    page.send("What is this?")
    expect(page.page.get_by_text("1500 x 1500 pixels, but at most 1 million are accepted")).to_be_visible(
        timeout=60_000
    )
    expect(page.page).to_have_title("Coloured shapes")  # a name of a file is text
    # The image is not in the way any longer, and the question is not lost
    expect(page.pictures).to_have_count(0)
    expect(page.box).to_have_value("What is this?")
    page.upload(PICTURES / "a.png")
    page.ask("What colour is the circle?", "The circle is red.")


def test_pictures_from_hosts_that_the_operator_allows(browser, server, website):
    page = Page(browser, server)
    page.page.get_by_label("Image from").fill(f"{website}/elsewhere")
    page.button("fetch")
    expect(page.page.get_by_text("Images from 'localhost' are not allowed")).to_be_visible(timeout=60_000)
    page.page.get_by_label("Image from").fill(f"{website}/b.png")
    page.button("fetch")
    expect(page.pictures).to_be_visible(timeout=60_000)
    page.ask("How many shapes are there?", "There are two shapes.")


def test_sessions_that_are_too_many_or_idle_go(shapes_bundle):
    model, processor = OVModelForLlavaMPT.from_pretrained(shapes_bundle), AutoProcessor.from_pretrained(shapes_bundle)
    visitors = Visitors(lambda device: lambda: model.chat(processor), limit=2, idle_seconds=3600, busy_seconds=0)
    first = visitors.get("first", "CPU")
    for name in ("second", "first", "third"):
        visitors.get(name, "CPU")
    assert visitors.find("second") is None
    assert visitors.find("first") is first
    assert not first.was_evicted
    assert visitors.get("second", "CPU").was_evicted
    assert len(visitors) == 2
    first.session.send("Where is the star?", PICTURES / "a.png").result()

    idle = Visitors(lambda device: lambda: model.chat(processor), limit=2, idle_seconds=0.2)
    idle.get("first", "CPU").session.send("Where is the star?")
    assert len(idle) == 1
    end = time.monotonic() + 10
    while len(idle) and time.monotonic() < end:
        idle.evict()
    assert len(idle) == 0


def test_sessions_in_use_make_no_room(shapes_bundle):
    model, processor = OVModelForLlavaMPT.from_pretrained(shapes_bundle), AutoProcessor.from_pretrained(shapes_bundle)
    visitors = Visitors(lambda device: lambda: model.chat(processor), limit=2, idle_seconds=3600)
    first, second = visitors.get("first", "CPU"), visitors.get("second", "CPU")
    with pytest.raises(RuntimeError, match="All 2 conversations of this server are in use"):
        visitors.get("third", "CPU")
    assert visitors.get("first", "CPU") is first
    assert visitors.find("second") is second
    visitors.leave("second")
    assert visitors.get("third", "CPU")


def test_size_of_uploads(server):
    boundary = "x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + b"0" * 600_000 + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/gradio_api/upload", body, headers))
    assert error.value.code == 413


def upload(server, name, content, **headers):
    """As anybody can who has no page open."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x", **headers}
    return urllib.request.urlopen(urllib.request.Request(f"{server.url}/gradio_api/upload", body, headers)).status


def test_uploads_do_not_fill_the_disk(shapes_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "of another program").write_bytes(bytes(3_000_000))
    server = Server(shapes_bundle, tmp_path / "log", "--max-uploads-mb", 2)
    try:
        for number in range(3):
            assert upload(server, "a.png", bytes([number]) * 600_000) == 200
        for headers, status, message in (
            ({"Content-Length": "600000"}, 507, "no room for more uploads. Try again in an hour"),
            ({"Content-Length": "1000000000000"}, 507, "no room for more uploads. Try again in an hour"),
            ({"Transfer-Encoding": "chunked"}, 411, "must say its length"),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.putrequest("POST", "/gradio_api/upload")
            for name, value in {"Content-Type": "multipart/form-data; boundary=x", **headers}.items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            assert response.status == status
            assert message in response.read().decode()
        written = sum(file.stat().st_size for file in (tmp_path / "uploads").rglob("*") if file.is_file())
        assert 4_800_000 <= written < 5_000_000
        with pytest.raises(urllib.error.HTTPError) as error:  # small files take room, too
            [upload(server, "a.png", str(number).encode()) for number in range(60)]
        assert error.value.code == 507
    finally:
        server.stop()


def post(server, path, data):
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/gradio_api/{path}", json.dumps(data).encode(), headers)
    )


def functions(server):
    return json.loads(urllib.request.urlopen(f"{server.url}/config").read())["dependencies"]


def join_queue(server, files=(), text="Hi", session="visitor"):
    """Ask as a page does."""
    asking = next(item["id"] for item in functions(server) if len(item["inputs"]) == 6)
    data = [{"text": text, "files": list(files)}, 0, 0.9, 8, "CPU", None]
    post(server, "queue/join?", {"fn_index": asking, "session_hash": session, "data": data})


def events(server, session="visitor"):
    """What a page is told until its question is answered or refused."""
    stream = urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash={session}", timeout=30)
    return [json.loads(line[5:]) for line in stream if line.startswith(b"data:")]


def test_addresses_are_not_fetched(server):
    """Somebody who speaks to the server without its page. The address is its own, so a fetch would show in its answer."""
    join_queue(server, [{"path": f"{server.url}/theme.css", "meta": {"_type": "gradio.FileData"}}])
    completed = next(event for event in events(server) if event["msg"] == "process_completed")
    assert not completed["success"]
    assert "This server does not fetch addresses" in server.log.read_text() + json.dumps(completed)


def test_sessions_are_made_by_open_pages_only(browser, server):
    """40 invented ids, queued and not, against a server that keeps 32 sessions."""
    page = Page(browser, server)
    page.upload(PICTURES / "a.png")
    page.ask("What colour is the circle?", "The circle is red.")
    unqueued = [
        item for item in functions(server) if item["queue"] is False and item["backend_fn"]
    ]  # not those in the browser
    assert len(unqueued) >= 3
    for number in range(40):
        item = unqueued[number % len(unqueued)]
        data = {"fn_index": item["id"], "session_hash": f"invented{number}", "data": ["CPU"] * len(item["inputs"])}
        assert post(server, "run/predict", data).status == 200
    for number in range(40):
        join_queue(server, session=f"invented{number}")
        told = events(server, f"invented{number}")
        assert "This page has lost its connection to the server" in json.dumps(told)
    page.ask("Where is the star?", "The star is at the top right.")
    expect(page.answers).to_have_count(2)


def test_a_long_text_holds_nobody_up(browser, server):
    one, other = Page(browser, server), Page(browser, server)
    other.upload(PICTURES / "a.png")
    other.ask("What colour is the circle?", "The circle is red.")
    for _ in range(4):
        join_queue(server, text="word " * 1_000_000, session=one.session)
    started = time.monotonic()
    other.ask("Where is the star?", "The star is at the top right.")
    assert time.monotonic() - started < 10
    assert "The question has 4,999,999 characters. The limit is 20,000." in json.dumps(events(server, one.session))
    status, _, text = answer_to(server, "POST", "/gradio_api/queue/join", Host="localhost", Content_Length="20000000")
    assert (status, text) == (413, "The request is larger than the limit of 16,000,000 bytes.\n")


def answer_to(server, method="GET", path="/config", **headers):
    """Status, headers and text that a request with these headers gets."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


def test_names_of_the_server(browser, server):
    own = f"127.0.0.1:{server.port}"
    for host in (
        own,
        f"localhost:{server.port}",
        "LOCALHOST",
        f"[::1]:{server.port}",
        "192.0.2.7",
        "shapes.example:443",
    ):
        assert answer_to(server, Host=host)[0] == 200, host
    for host in (
        "elsewhere.example",
        f"elsewhere.example:{server.port}",
        "localhost.elsewhere.example",
        "",
        "a b",
        "[::1",
    ):
        status, _, text = answer_to(server, Host=host)
        assert status == 421, host
        assert text.startswith("This server does not accept the name")
        assert "--allow-name" in text
        assert "Coloured" not in text
    assert answer_to(server)[0] in (400, 421)  # without a name, uvicorn may refuse the request itself
    for origin in (f"http://{own}", f"http://localhost:{server.port}", "https://shapes.example"):
        assert answer_to(server, Host=own, Origin=origin)[0] == 200, origin
    for origin in ("http://elsewhere.example", "null", "http://192.0.2.7"):
        status, _, text = answer_to(server, Host=own, Origin=origin)
        assert (status, text) == (403, f"Pages of {origin} may not use this server. Only its own pages may.\n")

    page = browser.new_page()
    assert page.goto(f"http://elsewhere.example:{server.port}/").status == 421
    assert "This server does not accept the name 'elsewhere.example'" in page.content()
    page.close()


def test_what_a_browser_may_load(server):
    for headers in ({"Host": "localhost"}, {"Host": "elsewhere.example"}):
        _, sent, _ = answer_to(server, **headers)
        assert "img-src 'self' data: blob:;" in sent["Content-Security-Policy"]
        assert "object-src 'none'" in sent["Content-Security-Policy"]
        assert sent["Referrer-Policy"] == "no-referrer"


def test_an_image_in_tiles(browser, export_once, tmp_path):
    """A wide image, whose shapes only tiles show."""
    bundle = export_once("shapes-tiles-ov", EXAMPLES / "shapes" / "checkpoint-tiles")
    rng = random.Random("demo")
    kind = "count"
    while kind == "count":
        scene = small_scene(rng, (3, 1), 120)
        kind, question, answer = small_question(rng, scene)
    render(scene).save(tmp_path / "wide.png")
    server = Server(bundle, tmp_path / "log")
    try:
        page = Page(browser, server)
        page.upload(tmp_path / "wide.png")
        page.ask(question, answer)
    finally:
        server.stop()


def test_words_arrive_one_by_one_and_stop(browser, bundles, tmp_path):
    """A random model talks without end."""
    options = ("--context-window", 100_000, "--max-new-tokens", 20_000, "--parallel-answers", 1, "--max-queue", 1)
    server = Server(bundles["linear_fp16_sharded"], tmp_path / "log", *options)
    try:
        page = Page(browser, server)
        page.send("Write a short poem about the sea.")
        expect(page.page.locator("#question .stop-button")).to_be_visible(timeout=60_000)
        lengths, end = [], time.monotonic() + 240
        while len(set(lengths)) < 3 and time.monotonic() < end:
            lengths.append(len(page.answers.last.text_content(timeout=60_000)))
            page.page.wait_for_timeout(20)  # else the question takes the processor from the answer
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
        expect(page.answers).to_have_count(2, timeout=60_000)
    finally:
        server.stop()


def test_a_device_that_is_not_there(shapes_bundle):
    result = run("optimum-cli", "llava-ov", "demo", shapes_bundle, "--device", "TOASTER", check=False)
    assert result.returncode == 1
    assert "Choose one of CPU" in result.stderr


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
    assert result.stderr.strip().endswith(
        'error: The demo needs gradio. Install it with: pip install "optimum-llava-ov[demo]"'
    )


# What would load something if a page took it for a part of itself. URL is where a request would be seen.
PAYLOADS = """
<img src="URL">
<IMG SRC=URL>
<img src="/gradio_api/file=URL">
<img srcset="URL 1x">
<img src=x onerror="fetch('URL')">
<picture><source srcset="URL"><img src="data:,"></picture>
<svg xmlns="http://www.w3.org/2000/svg"><image href="URL" xlink:href="URL"/></svg>
<svg><use href="URL#a"/></svg>
<svg onload="new Image().src='URL'"></svg>
<svg><style>@import "URL";</style></svg>
<math><mtext><img src="URL"></mtext></math>
<video src="URL" autoplay></video>
<video poster="URL"></video>
<audio src="URL" preload="auto"></audio>
<audio><source src="URL"></audio>
<video><track src="URL" default></video>
<iframe src="URL"></iframe>
<iframe srcdoc="<img src='URL'>"></iframe>
<frameset><frame src="URL"></frameset>
<embed src="URL">
<object data="URL"></object>
<link rel="stylesheet" href="URL">
<link rel="preload" as="image" href="URL">
<link rel="prefetch" href="URL">
<link rel="preconnect" href="URL">
<link rel="dns-prefetch" href="URL">
<link rel="icon" href="URL">
<meta http-equiv="refresh" content="0;url=URL">
<meta http-equiv="Content-Security-Policy" content="default-src *; report-uri URL">
<base href="URL/">
<script src="URL"></script>
<script>fetch("URL")</script>
<style>@import url("URL");</style>
<style>body { background: url("URL") !important }</style>
<div style="background-image: url('URL')">x</div>
<div style="list-style: url(URL); display: list-item; cursor: url(URL), auto">x</div>
<table background="URL"><tr><td background="URL">x</td></tr></table>
<body background="URL">
<input type="image" src="URL">
<form action="URL"><button autofocus onfocus="this.form.submit()">x</button></form>
<details open ontoggle="fetch('URL')"><summary>x</summary></details>
<custom-tag style="background: url(URL)" onclick="x">x</custom-tag>
<a href="URL" ping="URL">x</a>
![x](URL)
![x][y]\n\n[y]: URL
[x](URL)
[x](javascript:fetch('URL'))
<URL>
URL
www.elsewhere.example
<a href="data:text/html,<img src='URL'>">x</a>
<plaintext><img src="URL">
<!--><img src="URL">-->
<noscript><p title="</noscript><img src='URL'>"></noscript>
&lt;img src="URL"&gt; &#60;img src="URL"&#62;
`<img src="URL">`
```html\n<img src="URL">\n```
```mermaid\ngraph LR; A["<img src='URL'>"]; click A "URL"\n```
$$\\includegraphics{URL} \\href{URL}{x}$$
<think><img src="URL"></think>
"""


class Echo:
    """An engine whose one conversation at a time answers what it is asked, or as it is told."""

    def __init__(self, processor, config):
        self.processor, self.config, self.stop_strings = processor, config, None
        self.name, self.folder = "echo", Path()
        self.errors: Iterator[str] = iter(())

    def new_conversation(self):
        return self

    def answer(self, prompt, answer, **options):
        question = text_of(prompt.messages[-1])
        if error := next(self.errors, ""):
            raise ValueError(error)
        if question == "Wait.":
            while not answer.cancelled:
                time.sleep(0.01)
            return
        for word in re.findall(r"\S*\s*", question):
            answer.token()
            answer.emit(word)
        answer.flush()

    def reset(self):
        pass


class EchoServer:
    """The page in this process, with a listener beside it that notes who connects, and what for."""

    def __init__(self, processor, config):
        self.seen = []

        class Listener(BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                self.seen.append(handler.path)
                handler.send_response(204)
                handler.end_headers()

            def log_message(self, *args):
                pass

        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
        self.listener.verify_request = lambda request, address: self.seen.append("a connection") or True
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()
        self.payloads = [
            line.replace("\\n", "\n")
            .replace("\\\\", "\\")
            .replace("URL", f"http://127.0.0.1:{self.listener.server_port}/{number}")
            for number, line in enumerate(PAYLOADS.strip().splitlines())
        ]
        self.engine = Echo(processor, config)
        self.visitors = Visitors(lambda device: lambda: ChatSession(self.engine, context_window=10**6), 32, 3600)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        demo = Demo(self.visitors, Limits())
        page = build_page(demo, "Echo", ["CPU"], facts="Echo · int4", example=PICTURES / "a.png")
        arguments = (page, demo, "127.0.0.1", self.port, False)
        threading.Thread(target=run_demo, args=arguments, daemon=True).start()
        end = time.monotonic() + 30
        while not Server.answers(self):
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture(scope="module")
def echo(shapes_bundle):
    model = OVModelForLlavaMPT.from_pretrained(shapes_bundle)
    return EchoServer(AutoProcessor.from_pretrained(shapes_bundle), model.config)


def test_no_text_loads_anything(browser, echo):
    """As question and as answer."""
    page = Page(browser, echo)
    page.ask("Hello", "Hello")
    visitor = echo.visitors.find(page.session)
    visitor.turns += [Turn(payload, [], payload) for payload in echo.payloads]
    page.send(echo.payloads[0])  # and through the whole way, word by word
    expect(page.answers).to_have_count(len(echo.payloads) + 2, timeout=60_000)
    echo.engine.errors = iter([f"Not possible: {' '.join(echo.payloads)}"])
    page.send(" ".join(echo.payloads[:8]))
    expect(page.page.get_by_text("Not possible: <img src=")).to_be_visible(timeout=60_000)
    page.page.wait_for_timeout(1000)

    assert len(echo.payloads) >= 50
    assert echo.seen == []
    assert {url.split("/")[2] for url in page.requests if url.startswith("http")} == {f"127.0.0.1:{echo.port}"}
    expect(page.answers.nth(1)).to_have_text(echo.payloads[0])
    expect(page.page.locator("#chat [data-testid=user]").nth(1)).to_have_text(echo.payloads[0])
    texts = page.page.locator("#chat [data-testid=bot] .md *, #chat [data-testid=user] .md *")
    shown = set(texts.evaluate_all("found => found.map(element => element.localName)"))
    assert shown <= {"div", "p", "br", "code", "pre"}

    # In a page that takes them for a part of itself, the listener hears of many
    careless = browser.new_page()
    frames = "".join(f'<iframe srcdoc="{escape(payload)}"></iframe>' for payload in echo.payloads)
    careless.set_content(frames, wait_until="commit")
    end = time.monotonic() + 20
    while len(set(echo.seen)) < 20 and time.monotonic() < end:
        careless.wait_for_timeout(100)
    careless.close()
    assert len(set(echo.seen)) >= 20


def test_markdown(browser, echo):
    page = Page(browser, echo)
    page.send("# Head\n\n1. *one*\n2. **two** & `<b>`\n\n> said\n\n```python\nif a < b:\n    pass\n```")
    found = page.answers.last
    for selector, text in {
        "h1": "Head",
        "ol > li > em": "one",
        "ol > li > strong": "two",
        "li > code": "<b>",
        "blockquote": "said",
        "pre > code.language-python": "if a < b:\n    pass\n",
    }.items():
        expect(found.locator(selector)).to_have_text(text, timeout=60_000)
    expect(page.page.locator("#chat [data-testid=user]").last).to_contain_text("# Head 1. *one* 2. **two** & `<b>`")
    page.page.context.grant_permissions(["clipboard-read"])
    page.button("copy")
    assert page.page.evaluate("navigator.clipboard.readText()").split() == (
        ["Head", "one", "two", "&", "<b>", "said", "if", "a", "<", "b:", "pass"]
    )


def test_a_question_without_an_answer_is_not_lost(browser, echo):
    """Stopped before the first word: it is in the box again. Undo cannot be pressed meanwhile, and then takes back one question."""
    page = Page(browser, echo)
    page.ask("One", "One")
    page.send("Wait.")
    stop = page.page.locator("#question .stop-button")
    expect(stop).to_have_text("Stop", timeout=60_000)
    expect(page.page.locator("#chat [aria-label=Undo]").last).to_be_disabled()
    stop.click()
    expect(page.box).to_have_value("Wait.")
    expect(stop).to_have_count(0)
    expect(page.answers).to_have_count(1)
    session = echo.visitors.find(page.session).session
    assert [text_of(message) for message in session.messages] == ["One", "One"]
    page.ask("Two", "Two")
    page.button("undo")
    expect(page.box).to_have_value("Two")
    expect(page.answers).to_have_count(1)


def test_a_retry_that_fails_keeps_the_turn(browser, echo):
    page = Page(browser, echo)
    page.ask("One", "One")
    session = echo.visitors.find(page.session).session
    echo.engine.errors = iter(["The second time it fails."])
    page.button("retry")
    expect(page.page.get_by_text("The second time it fails.")).to_be_visible(timeout=60_000)
    expect(page.answers).to_have_count(1)
    expect(page.answers.last).to_have_text("One")
    assert [text_of(message) for message in session.messages] == ["One", "One"]
    session.context_window = 1
    page.button("retry")
    expect(page.page.get_by_text("exceeds the context window of 1")).to_be_visible(timeout=60_000)
    expect(page.answers).to_have_count(1)
    session.context_window = 10**6
    page.ask("Two", "Two")
    expect(page.answers).to_have_count(2)
    assert [text_of(message) for message in session.messages] == ["One", "One", "Two", "Two"]


SIZES = [(1200, 900, "light"), (1200, 900, "dark"), (390, 780, "light")]


@pytest.mark.parametrize(("width", "height", "scheme"), SIZES, ids=["light", "dark", "phone"])
def test_everybody_can_use_it(browser, echo, width, height, scheme):
    """No violation of the rules of axe-core (contrast, names, roles, keyboard), in every state of the page."""
    page = Page(browser, echo, width, height, color_scheme=scheme)

    def check(state):
        page.page.wait_for_timeout(700)  # colours fade in
        if folder := os.environ.get("SCREENSHOTS"):
            page.page.screenshot(path=f"{folder}/{width}-{scheme}-{state}.png")
        found = Axe().run(page.page).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == [], state
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width

    expect(page.page.locator("#chat .examples button")).to_have_count(3)
    check("empty")
    page.page.locator("#chat .examples button").first.click()
    expect(page.answers.last).to_have_text("What colour is the circle?", timeout=60_000)
    expect(page.page.locator("#chat .stats")).to_have_text(re.compile(r"\d tokens · first after \d\.\d\d s"))
    expect(page.page.locator("#foot")).to_have_text("Echo · int4")
    check("answered")
    page.page.get_by_role("button", name="Settings").press("Enter")
    expect(page.page.get_by_label("Temperature").first).to_be_visible()
    check("settings")


def test_a_conversation_survives_a_reload(browser, echo):
    """The browser keeps it. The session is made again with the next question, and the image is part of it."""
    page = Page(browser, echo)
    page.upload(PICTURES / "a.png")
    page.ask("One", "One")
    page.requests.clear()
    page.page.reload()
    expect(page.answers).to_have_count(1, timeout=60_000)
    expect(page.page.get_by_alt_text("An image of the question")).to_be_visible()
    page.ask("Two", "Two")
    session = echo.visitors.find(page.session).session
    assert [text_of(message) for message in session.messages] == ["One", "One", "Two", "Two"]
    assert [item["type"] for item in session.messages[0]["content"]] == ["image", "text"]
    page.button("clear")
    expect(page.answers).to_have_count(0)
    page.page.reload()
    expect(page.page.locator("#chat .examples button")).to_have_count(3, timeout=60_000)
    expect(page.answers).to_have_count(0)


def test_a_conversation_is_saved_and_opened(browser, echo, tmp_path):
    """The file is what `save` writes, so that the terminal and Python can go on with it."""
    page = Page(browser, echo)
    page.upload(PICTURES / "a.png")
    page.ask("One", "One")
    with page.page.expect_download() as download:
        page.button("export")
    download.value.save_as(tmp_path / "conversation.json")
    assert [message["role"] for message in json.loads((tmp_path / "conversation.json").read_text())] == [
        "user", "assistant"
    ]  # fmt: skip
    session = ChatSession(echo.engine, messages=tmp_path / "conversation.json")
    assert [text_of(message) for message in session.messages] == ["One", "One"]

    other = Page(browser, echo)
    other.page.locator("input[type=file][accept='.json']").set_input_files(str(tmp_path / "conversation.json"))
    expect(other.answers).to_have_count(1, timeout=60_000)
    other.ask("Two", "Two")
    session = echo.visitors.find(other.session).session
    assert [text_of(message) for message in session.messages] == ["One", "One", "Two", "Two"]
    other.button("undo")
    expect(other.answers).to_have_count(1)

    long = json.dumps([{"role": role, "content": "word " * 15_000} for role in ("user", "assistant")])
    many = json.dumps([{"role": role, "content": "x"} for role in ("user", "assistant")] * 101)
    contents = ("[1]", "{}", "nonsense", '[{"role": "user"}, 1]', long, many)
    for number, content in enumerate(contents):
        file = tmp_path / f"other{number}.json"
        file.write_text(content)
        other.page.locator("input[type=file][accept='.json']").set_input_files(str(file))
        expect(other.page.get_by_text(f"{file.name} cannot be opened")).to_be_visible(timeout=60_000)
        expect(other.answers).to_have_count(1)
