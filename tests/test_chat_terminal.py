"""`optimum-cli llava-ov chat`: driven through a pseudo-terminal, and through a pipe."""

import fcntl
import gzip
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import programs
import pytest
from conftest import EXAMPLES, run
from PIL import Image
from test_chat import SlowProcessor
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.chat.images import fetch_image
from optimum_llava_ov.chat.terminal import Terminal, load_image
from optimum_llava_ov.images import ImageLimits, open_image
from optimum_llava_ov.system.devices import check_device


pytestmark = pytest.mark.slow


PICTURES = EXAMPLES / "shapes" / "pictures"


def _take_terminal():
    """Only the terminal that a session controls turns Ctrl-C into a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def start():
    """Start a [`Console`] that does not outlive its test."""
    consoles = []
    yield lambda *command, **kwargs: consoles.append(Console(*command, **kwargs)) or consoles[-1]
    for console in consoles:
        console.process.kill()
        console.process.wait()


class Console:
    """A program that sits at a terminal, and somebody who types."""

    def __init__(self, *command, cwd=None, env=None, size=(24, 80), fresh=True):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        program = [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])]
        self.process = subprocess.Popen(
            program if fresh else programs.quick(program),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env={**os.environ, "TERM": "dumb", **(env or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.screen = ""

    def type(self, text):
        os.write(self.ours, text.encode())

    def receive(self, data):
        """Return what is on the screen when the program has written `data`."""
        return self.screen + data.decode(errors="replace")

    def wait(self, condition, description, timeout=90):
        """Read until the screen meets a condition. Return the screen."""
        end = time.monotonic() + timeout
        while not condition(self.screen):
            if not select.select([self.ours], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"{description!r} is not in {self.screen!r}")
            self.screen = self.receive(os.read(self.ours, 65536))
        return self.screen

    def expect(self, text, timeout=90):
        """Read up to `text`, and return what came before it."""
        self.wait(lambda screen: text in screen, text, timeout)
        before, _, self.screen = self.screen.partition(text)
        return before

    def press_ctrl_c(self, text):
        """Until it shows: Python misses a signal that comes between its prompt and its wait for a key.

        Not too soon again: a second one would take what is typed next.
        """
        for _ in range(8):
            self.type("\x03")
            with suppress(TimeoutError):
                return self.expect(text, timeout=10)
        raise AssertionError(f"{text!r} is not in {self.screen!r}")

    def ask(self, text, answer):
        self.type(text + "\n")
        return self.expect(answer)

    def leave(self, how="/quit\n"):
        self.expect("> ")
        self.type(how)
        assert self.process.wait(timeout=60) == 0
        os.close(self.ours)


@pytest.fixture(scope="module")
def shapes(shapes_bundle):
    return OVModelForLlavaMPT.from_pretrained(shapes_bundle), AutoProcessor.from_pretrained(shapes_bundle)


def test_conversation_at_a_terminal(start, shapes_bundle, website, tmp_path):
    console = start(
        *("optimum-cli", "llava-ov", "chat", shapes_bundle, "--image", PICTURES / "a.png", "--stats"),
        cwd=tmp_path,
        fresh=False,
    )
    console.expect("> ")
    console.ask("What colour is the circle?", "The circle is red.")
    stats = console.ask("Where is the star?", "The star is at the top right.") + console.ask("", "> ")
    assert re.search(r"prompt \d+ tokens, answer 6 tokens, first token \d+\.\d\d s, then [\d,.]+ tokens/s", stats)
    console.ask('"""', ". ")
    console.ask("What is\nat the bottom?\n" + '"""', "green triangle")
    console.ask("/undo", "Removed: What is")
    console.ask("What is \\\nat the bottom?", "A green triangle is ")
    console.ask("/save chat.json", "Saved: chat.json")
    assert len(json.loads((tmp_path / "chat.json").read_text())) == 6
    console.ask("/reset", "Started a new conversation.")
    console.ask(f"/image {website}/b.png", "to the next question")
    console.ask("How many shapes are there?", "There are two shapes.")
    console.ask("/nonsense", "The command /nonsense does not exist")
    console.expect("> ")
    console.type("half a line")
    console.expect("half a line")
    console.press_ctrl_c("Ctrl-D to leave")
    console.ask("How many shapes are there?", "There are two shapes.")
    console.leave("\x04")


def test_ctrl_c_stops_the_answer_and_not_the_program(start, bundles):
    console = start("optimum-cli", "llava-ov", "chat", bundles["linear_fp16_sharded"], "--max-new-tokens", 1900)
    console.expect("> ")
    started = time.monotonic()
    console.ask("Write a short poem about the sea.", "with")
    console.press_ctrl_c("[stopped]")
    assert time.monotonic() - started < 30
    console.ask("/undo", "Removed: Write a short poem")
    console.leave()


def test_pipe_gets_only_the_answer(shapes_bundle):
    command = ["optimum-cli", "llava-ov", "chat", shapes_bundle, "--image", PICTURES / "a.png", "--temperature", "0"]
    result = run(*command, input="What colour is the circle?\n", fresh=True)
    assert result.stdout == "The circle is red.\n"


def type_in(shapes, *lines):
    """What a terminal shows to somebody who types these lines."""
    model, processor = shapes
    typed, output = iter(lines), io.StringIO()

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    Terminal(model.chat(processor), output, read=read).run()
    return output.getvalue()


def test_commands(shapes, tmp_path):
    assert "no question to undo" in type_in(shapes, "/undo")
    assert "no question yet" in type_in(shapes, "/retry")
    assert "A path or URL is missing" in type_in(shapes, "/image")
    assert "cannot be read" in type_in(shapes, f"/image {tmp_path}/missing.png")
    assert "A file is missing" in type_in(shapes, "/save")
    assert "/image PATH or URL" in type_in(shapes, "/help")
    assert "The command /imgae does not exist. Do you mean /image?" in type_in(shapes, "/imgae a.png")
    assert "The command /xyzzy does not exist. /help shows" in type_in(shapes, "/xyzzy")
    assert "stands for an image" in type_in(shapes, "What is <image>?")
    picture = f"/image '{PICTURES}/a.png'"
    assert type_in(shapes, picture, "Where is the star?", "/retry").count("top right") == 2
    undone = type_in(shapes, picture, "Where is the star?", "/undo", "What colour is the circle?")
    assert "Its image is kept for the next question" in undone
    assert undone.endswith("The circle is red.\n\n")


def test_a_conversation_is_cleared_and_loaded(shapes, tmp_path):
    picture, file = f"/image {PICTURES}/a.png", tmp_path / "chat.json"
    shown = type_in(
        shapes, picture, "Where is the star?", f"/save {file}", "/clear", "/undo", f"/load {file}", "/undo"
    )
    assert "Started a new conversation.\nThere is no question to undo.\n" in shown
    assert f"Loaded: {file} (1 question)\nRemoved: Where is the star?" in shown
    (tmp_path / "other.json").write_text("[1]")
    shown = type_in(
        shapes, picture, "Where is the star?", f"/load {tmp_path}/other.json", "/undo", "/load", "/load nowhere.json"
    )
    assert "Removed: Where is the star?" in shown  # an error leaves the conversation as it was
    assert "A file is missing. Type: /load FILE" in shown
    assert "No such file" in shown


def test_settings(shapes):
    shown = type_in(shapes, "/set", "/set temperature 0.7", "/set max_new_tokens 3", "/set temperature 0", "/set")
    assert [line for line in shown.splitlines() if line.startswith("temperature")] == [
        "temperature 0, top_p 0.9, max_new_tokens 512",
        "temperature 0.7, top_p 0.9, max_new_tokens 512",
        "temperature 0.7, top_p 0.9, max_new_tokens 3",
        "temperature 0, top_p 0.9, max_new_tokens 3",
        "temperature 0, top_p 0.9, max_new_tokens 3",
    ]
    short = type_in(shapes, "/set max_new_tokens 2", f"/image {PICTURES}/a.png", "Where is the star?")
    assert short.splitlines()[-2] == "The star"
    for line, error in {
        "/set temperature hot": "temperature is 'hot'. Expected a number from 0 (greedy decoding) to 2.",
        "/set temperature nan": "temperature is 'nan'.",
        "/set top_p 0": "top_p is '0'. Expected a number above 0, up to 1.",
        "/set max_new_tokens 1.5": "max_new_tokens is '1.5'. Expected an integer above 0.",
        "/set heat 1": "The setting 'heat' does not exist. Choose one of temperature, top_p, max_new_tokens.",
    }.items():
        assert error in type_in(shapes, line)


def test_one_question(shapes_bundle):
    """Only the answer, and nothing is read: the input is a terminal in which nobody types."""
    ours, theirs = pty.openpty()
    options = ("--image", PICTURES / "a.png", "-p", "What colour is the circle?")
    result = run("optimum-cli", "llava-ov", "chat", shapes_bundle, *options, stdin=theirs, timeout=120)
    assert result.stdout == "The circle is red.\n"
    os.close(ours)
    os.close(theirs)


def test_a_picture_waits_for_a_question_that_is_kept(shapes):
    """Neither an error nor a stop before the first word takes it."""
    model, processor = shapes
    chat, output = model.chat(CtrlC(processor)), io.StringIO()
    terminal = Terminal(chat, output)
    terminal.image(str(PICTURES / "a.png"))
    chat.options["nonsense"] = 1
    with pytest.raises(ValueError, match="nonsense"):
        terminal.ask("Where is the star?")
    del chat.options["nonsense"]
    chat.processor.handler = signal.getsignal(signal.SIGINT)
    chat.processor.pressed = True
    terminal.ask("Where is the star?")
    assert output.getvalue().endswith("[stopped before the first word; the conversation is unchanged]\n")
    chat.processor.pressed = False
    terminal.ask("Where is the star?")
    assert output.getvalue().endswith("The star is at the top right.\n")
    assert terminal.images == []


class CtrlC(SlowProcessor):
    """A processor, and somebody who presses Ctrl-C before the first word."""

    pressed = False
    handler = None  # what the test's process does with Ctrl-C

    @property
    def tokenizer(self):
        if self.pressed and threading.current_thread().name == "answer":
            while signal.getsignal(signal.SIGINT) is self.handler:  # the answer is not shown yet
                time.sleep(0.01)
            signal.getsignal(signal.SIGINT)(
                signal.SIGINT, None
            )  # a real one could hit the process that runs the tests
        return self.processor.tokenizer


def test_pictures_from_outside(website, tmp_path):
    assert load_image(f"{website}/a.png").size == load_image(str(PICTURES / "a.png")).size
    with pytest.raises(ValueError, match="cannot be fetched: .*404"):
        load_image(f"{website}/missing.png")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(f"{website}/questions.json")
    assert load_image(f"{website}/elsewhere").size == load_image(f"{website}/a.png").size
    hosts = [website.removeprefix("http://")]
    assert fetch_image(f"{website}/a.png", hosts=hosts)
    for address in (f"{website}/elsewhere", f"{website}/a.png".replace("127.0.0.1", "localhost")):
        with pytest.raises(ValueError, match=r"from 'localhost' are not allowed\. Allowed hosts: 127\.0\.0\.1:"):
            fetch_image(address, hosts=hosts)
    with pytest.raises(ValueError, match=r"has \S+ kB, but at most 10 bytes"):
        open_image(PICTURES / "a.png", ImageLimits(max_bytes=10))
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="9000 x 9000 pixels, but at most 50 million"):
        open_image(tmp_path / "bomb.png")


class HostileSite:
    """Answers with the bytes of its address, some of them drop by drop."""

    def __init__(self):
        bomb = gzip.compress(gzip.compress(bytes(50_000_000)))
        picture = (PICTURES / "a.png").read_bytes()
        ok, found = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\nLocation: %s\r\n"
        self.responses = {
            "/slow-head": (ok + b"X-Padding: ", b"a"),
            "/slow-body": (ok + b"\r\n", b"a"),
            "/bomb": (ok + b"Content-Encoding: gzip, gzip\r\n\r\n" + bomb, None),
            "/large": (ok + b"\r\n" + bytes(3000), None),
            "/to-itself": (found % b"/to-itself" + b"\r\n", None),
            "/slow-redirect": (found % b"/picture" + b"\r\n", b"a"),
            "/bomb-redirect": (found % b"/picture" + b"Content-Encoding: gzip, gzip\r\n\r\n" + bomb, None),
            "/picture": (ok + b"\r\n" + picture, None),
        }
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, suppress(OSError):
            request = connection.recv(10_000).decode()
            assert "accept-encoding: identity" in request.lower()
            data, drop = self.responses[request.split()[1]]
            connection.sendall(data)
            while drop is not None:
                connection.sendall(drop)
                time.sleep(0.05)


def test_addresses_that_would_take_time_or_memory():
    site = HostileSite()
    started = time.monotonic()
    for path, error in {
        "/slow-head": "did not arrive within 0.5 seconds",
        "/slow-body": "did not arrive within 0.5 seconds",
        "/bomb": r"is sent with content-encoding gzip, gzip",
        "/large": "is larger than 2.00 kB",
        "/to-itself": "is redirected more than 5 times",
    }.items():
        with pytest.raises(ValueError, match=error):
            fetch_image(site.url + path, max_bytes=2000, timeout=0.5)
    for path in ("/slow-redirect", "/bomb-redirect"):
        assert fetch_image(site.url + path, timeout=5).size == (224, 224)
    assert time.monotonic() - started < 10


def test_devices():
    check_device("AUTO")
    check_device("cpu")
    with pytest.raises(ValueError, match="Choose one of CPU"):
        check_device("GPU.7")
