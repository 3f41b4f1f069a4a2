"""`optimum-cli llava-ov chat` in a terminal with colours: what is on the screen, by a terminal emulator."""

import re
import shutil

import pyte
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from test_chat_terminal import PICTURES, Console

from optimum_llava_ov.chat.console import CommandCompleter, open_history, split_paragraphs
from optimum_llava_ov.chat.terminal import HELP


pytestmark = pytest.mark.slow


COLUMNS, ROWS = 100, 200  # nothing scrolls away


class Emulator(Console):
    """A terminal emulator that shows a program, and somebody who types."""

    def __init__(self, *command, env, cwd=None):
        self.display = pyte.Screen(COLUMNS, ROWS)
        self.display.write_process_input = self.type  # answers of the terminal, such as where the cursor is
        self.stream = pyte.ByteStream(self.display)
        self.raw = b""
        super().__init__(*command, cwd=cwd, env={"TERM": "xterm-256color", **env}, size=(ROWS, COLUMNS), fresh=False)

    def receive(self, data):
        self.raw += data
        self.stream.feed(data)
        return "\n".join(line.rstrip() for line in self.display.display)

    @property
    def colours(self):
        return {cell.fg for row in self.display.buffer.values() for cell in row.values()}

    def expect(self, text, timeout=90):
        """Wait until a text is on the screen, and return the screen."""
        return self.wait(lambda screen: text in screen, text, timeout)


@pytest.fixture
def emulator(tmp_path):
    started = []

    def start(*command, **env):
        env = {"OPTIMUM_LLAVA_OV_HISTORY": str(tmp_path / "history"), **env}
        started.append(Emulator("optimum-cli", "llava-ov", "chat", *command, env=env, cwd=tmp_path))
        return started[-1]

    yield start
    for console in started:
        console.process.kill()
        console.process.wait()


def test_a_conversation(emulator, shapes_bundle, tmp_path):
    """Spinner, banner, preview, Markdown, completion, history, and the way out."""
    console = emulator(shapes_bundle, "--stats")
    console.expect("Starting")
    screen = console.expect("/help shows all commands.")
    assert "Starting" not in screen  # the spinner is gone
    for name, value in {"precision": "fp16", "engine": "genai", "device": "CPU", "license": "apache-2.0"}.items():
        assert any(line.split("│")[1].split() == [name, value] for line in screen.splitlines() if "│" in line)
    assert "2,048 tokens" in screen

    shutil.copyfile(PICTURES / "a.png", tmp_path / "shapes.png")
    for typed, completed in (("/im\t", "> /image"), ("sha\t", "> /image shapes.png")):
        console.type(typed)
        console.expect(completed)
    console.type("\r")
    screen = console.expect("Added an image of 224 x 224 pixels")
    assert screen.count("▀") >= 16 * 8  # half blocks, as this terminal has no graphics
    console.type("What colour is the circle?\r")
    console.expect("The circle is red.")
    console.expect("tokens/s")
    console.type("/undoo\r")
    console.expect("Do you mean /undo?")
    console.type("\x1b[A\x1b[A\r")  # up, up: the question again
    console.wait(lambda screen: screen.count("The circle is red.") == 2, "the second answer")
    console.type("/quit\r")
    assert console.process.wait(timeout=60) == 0
    assert "+What colour is the circle?" in (tmp_path / "history").read_text()
    assert (tmp_path / "history").stat().st_mode & 0o077 == 0


class Kitty(Console):
    """A terminal with the graphics of Kitty. It tells who asks."""

    ANSWERS = ((r"\x1b_Gi=(\d+),[^;]*a=q[^;]*;AAAA\x1b\\", "\x1b_Gi={};OK\x1b\\"), (r"\x1b\[6n", "\x1b[1;1R"))

    def receive(self, data):
        for question, answer in self.ANSWERS:
            for asked in re.finditer(question, data.decode(errors="replace")):
                self.type(answer.format(*asked.groups()))
        return super().receive(data)


class Sixel(Kitty):
    """A terminal with Sixel graphics, such as iTerm2."""

    ANSWERS = ((r"\x1b\[c", "\x1b[?62;4c"), (r"\x1b\[6n", "\x1b[1;1R"))


PNG = r"iVBORw0KGgo"  # its first bytes in base64


@pytest.mark.flaky(reruns=2)  # textual-image waits a tenth of a second for an answer
@pytest.mark.parametrize(
    ("terminal", "graphics"),
    [(Kitty, rf"\x1b_Gi=\d+,m=\d,f=100,q=2;{PNG}"), (Sixel, r'\x1bP0;0;0q"1;1;\d+;\d+')],
    ids=["Kitty", "Sixel"],
)
def test_graphics_of_the_terminal(terminal, graphics, shapes_bundle, monkeypatch):
    """The image of the question is sent as an image, and not drawn with characters."""
    monkeypatch.setenv("OPTIMUM_LLAVA_OV_HISTORY", "")
    options = {"env": {"TERM": "xterm-256color"}, "fresh": False}
    console = terminal("optimum-cli", "llava-ov", "chat", shapes_bundle, "--image", PICTURES / "a.png", **options)
    try:
        screen = console.wait(lambda screen: re.search(graphics, screen), "an image")
        assert "▀" not in screen
    finally:
        console.process.kill()
        console.process.wait()


def test_no_colour(emulator, shapes_bundle):
    console = emulator(shapes_bundle, "--image", PICTURES / "a.png", NO_COLOR="1")
    console.expect("/help shows all commands.")
    console.type("Where is\x1b\rthe star?\r")  # Alt-Enter: a question of two lines
    screen = console.expect("The star is at the top right.")
    assert "▀" not in screen
    assert console.colours == {"default"}


def test_plain(emulator, shapes_bundle):
    """For a screen reader: no control codes at all."""
    console = emulator(shapes_bundle, "--plain")
    screen = console.expect("/help shows all commands.")
    assert "precision fp16, engine genai, device CPU" in screen.replace("\n", "")
    console.wait(lambda screen: "\n>" in screen, "the prompt")
    console.type("/set top_p 0.5\r")
    console.expect("temperature 0, top_p 0.5")
    before_readline = console.raw.split(b"> ")[0]
    assert b"\x1b" not in before_readline


@pytest.mark.parametrize(
    ("text", "completions"),
    [
        ("/sa", ["/save "]),
        ("/un", ["/undo"]),
        ("/se", ["/set "]),
        ("/", None),
        ("What /s", []),
        ("/set t", ["temperature", "top_p"]),
        ("/set top_p 0", []),
        ("/undo x", []),
    ],
)
def test_completion(text, completions):
    found = [item.text for item in CommandCompleter().get_completions(Document(text), CompleteEvent())]
    assert found == completions or (completions is None and set(found) >= {"/image ", "/quit"})
    assert all(name in HELP for name in found if name.startswith("/") and name != "/exit")


def test_history_needs_no_file(tmp_path, monkeypatch):
    """A home that cannot be written, or a user who wants no file."""
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file" / "history"), ""):
        monkeypatch.setenv("OPTIMUM_LLAVA_OV_HISTORY", name)
        open_history().append_string("secret")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("one", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\n", "one\n\ntwo\n\n"),
        ("one\n\n```\na\n\nb", "one\n\n"),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
    ],
)
def test_paragraphs(text, complete):
    """What is complete is never written again. A block of code is not cut in two."""
    assert split_paragraphs(text) == (complete, text[len(complete) :])
