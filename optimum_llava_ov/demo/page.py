"""Chat in a browser: one page, a session for each visitor, and nothing loaded from other servers."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from optimum_llava_ov.chat.images import fetch_image
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.streaming import Answer
from optimum_llava_ov.demo.guard import Guard, OpenPages, Uploads
from optimum_llava_ov.demo.markup import answer_to_html
from optimum_llava_ov.images import DEFAULT_LIMITS
from optimum_llava_ov.loading import sampling_options


SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
CSS = """
.gradio-container, .gradio-container main {
    max-width: 1180px !important; width: 100% !important; margin: 0 auto !important;
}
#title h1 { font-size: 1.55rem; margin: 0.6rem 0 0 0; }
#title p { margin: 0.1rem 0 0.4rem 0; color: var(--body-text-color-subdued); }
#chat { border-radius: 14px; }
#chat [data-testid=user] { white-space: pre-wrap; }
#chat .prose { white-space: normal; }
#settings { gap: 10px; }
#chat .icon-button-wrapper:has([aria-label="Share"], [aria-label="Download"]) { display: none; }
"""
# Gradio's own button would copy the HTML
COPY = """() => {
    const answer = [...document.querySelectorAll("#chat .prose")].pop();
    if (answer) {
        getSelection().selectAllChildren(answer);
        document.execCommand("copy");
        getSelection().removeAllRanges();
    }
}"""
PLACEHOLDER = "<h3>Add an image, and ask about it</h3><p>Use the clip below, or drop or paste an image there.</p>"
MAX_EVICTED = 1000  # expired visitors that are remembered, so that they are told when they come back
SHOW_SECONDS = 0.05  # between two updates of an answer; a fast model generates words faster than a page can show them


@dataclass(frozen=True)
class Limits:
    """Limit what visitors may use.

    Attributes:
        answers (`int`): Number of answers that are computed at the same time.
        queue (`int`): Number of visitors that may wait. The next one is told to come back later.
        sessions (`int`): Number of sessions that are kept. A new session replaces the one that was idle longest.
        busy_seconds (`float`): Time after its last word in which a session is not replaced. If all sessions are busy,
            a new visitor must wait.
        idle_seconds (`float`): Time after which an idle session is dropped.
        max_bytes (`int`), max_pixels (`int`): Maximum size of an image.
        max_uploads_bytes (`int`): Maximum size of all uploads on the disk. They are deleted after one to two hours.
        max_characters (`int`): Maximum length of a question.
        max_new_tokens (`int`): Maximum length of an answer that a visitor can choose.
        hosts (`tuple[str, ...]`): Hosts from which the server fetches images for visitors.
        names (`tuple[str, ...]`): Additional names of the server. IP addresses, `localhost` and the name that it
            listens on are always accepted.
    """

    answers: int = 2
    queue: int = 16
    sessions: int = 32
    busy_seconds: float = 60.0
    idle_seconds: float = 1800.0
    max_bytes: int = DEFAULT_LIMITS.max_bytes
    max_pixels: int = DEFAULT_LIMITS.max_pixels
    max_uploads_bytes: int = 1_000_000_000
    max_characters: int = 20_000
    max_new_tokens: int = 1024
    hosts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass
class Turn:
    """Hold what the page shows of a turn."""

    text: str
    files: list[str]
    answer: str = ""
    _html: tuple[str, str] = ("", "")

    def messages(self) -> list[dict[str, Any]]:
        images = [{"role": "user", "content": {"path": file}} for file in self.files]
        question = [_shown("user", escape(self.text))] if self.text else []
        return [*images, *question, _shown("assistant", self._answer_html())]

    def _answer_html(self) -> str:
        """Return the answer as HTML. Keep the result, because the page shows earlier answers again at every update."""
        if self._html[0] != (text := self.answer or "…"):
            self._html = (text, answer_to_html(text))
        return self._html[1]


def _shown(role: str, html: str) -> dict[str, Any]:
    return {"role": role, "content": {"type": "text", "text": html}}


class Pending(NamedTuple):
    """Hold a turn that is being answered. Its position is after the other turns, or that of the last turn (retry)."""

    turn: Turn
    answer: Answer
    position: int


@dataclass
class Visitor:
    """Hold the session of one open page, and the turns that it shows."""

    session: ChatSession
    device: str
    turns: list[Turn] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    was_evicted: bool = False
    _pending: Pending | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def messages(self) -> list[dict[str, Any]]:
        with self._lock:
            turns = (
                self.turns if self._pending is None else [*self.turns[: self._pending.position], self._pending.turn]
            )
            return [message for turn in turns for message in turn.messages()]

    def send(self, turn: Turn, images: list[Any], options: dict[str, Any]) -> Pending:
        """Ask a question. Raise the errors of [`ChatSession.send`]."""
        with self._lock:
            answer = self.session.send(turn.text, images, **options)
            return self._begin(turn, answer, retried=False)

    def retry(self, options: dict[str, Any]) -> Pending:
        """Ask the last question again. Raise the errors of [`ChatSession.retry`]."""
        with self._lock:
            answer = self.session.retry(**options)
            return self._begin(Turn(self.turns[-1].text, self.turns[-1].files), answer, retried=True)

    def undo(self) -> Turn | None:
        """Remove one question and return it: the one that is being answered, or the last one.

        If a retry has no word yet, remove only the new answer.
        """
        pending = self._pending
        self.session.cancel()
        self.finish(pending)
        with self._lock:
            if pending is not None and not pending.answer.kept:
                return pending.turn if pending.position == len(self.turns) else None
            return self.turns.pop() if self.session.undo() is not None else None

    def finish(self, pending: Pending | None) -> None:
        """Keep or drop a turn whose answer has ended, as the session did."""
        with self._lock:
            if pending is None or pending is not self._pending:
                return
            self._pending = None
            if pending.answer.kept:
                pending.turn.answer = pending.answer.text
                self.turns[pending.position :] = [pending.turn]

    def leave(self) -> None:
        """Stop the answer, and remove all turns."""
        self.session.cancel()
        with self._lock:
            self._pending = None
            self.turns.clear()

    def _begin(self, turn: Turn, answer: Answer, retried: bool) -> Pending:
        self.finish(self._pending)  # an earlier answer, if the page did not wait for its end
        self._pending = Pending(turn, answer, len(self.turns) - retried)
        return self._pending


class Visitors:
    """Keep a session for each open page: up to `limit` sessions, none idle for longer than `idle_seconds`."""

    def __init__(
        self,
        factory_of: Callable[[str], Callable[..., ChatSession]],
        limit: int,
        idle_seconds: float,
        busy_seconds: float = Limits.busy_seconds,
    ):
        self._factory_of = factory_of
        self._factories: dict[str, Callable[..., ChatSession]] = {}
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # by time of their last question
        self._evicted: OrderedDict[str, None] = OrderedDict()
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, name: str, device: str) -> Visitor:
        """Return the visitor with this name. Make a new one if the device has changed.

        Raises:
            `RuntimeError`: The maximum number of sessions is reached, and all are in use.
        """
        self.load(device)
        removed = []
        with self._lock:
            visitor = self._visitors.get(name)
            if visitor is not None and visitor.device != device:
                removed.append(self._visitors.pop(name))
                visitor = None
            if visitor is None:
                removed += self._make_room()
                visitor = self._visitors[name] = Visitor(self._factories[device](), device)
                visitor.was_evicted = name in self._evicted
                self._evicted.pop(name, None)
            visitor.seen = time.monotonic()
            self._visitors.move_to_end(name)
        for other in removed:
            other.leave()
        return visitor

    def evict(self) -> None:
        """Drop sessions that were idle for too long."""
        with self._lock:
            too_old = time.monotonic() - self._idle_seconds
            removed = self._remove([name for name, visitor in self._visitors.items() if visitor.seen < too_old])
        for visitor in removed:
            visitor.leave()

    def load(self, device: str) -> None:
        """Load the model on a device, unless it is loaded there."""
        with self._loading:  # a separate lock, so that visitors on other devices do not wait
            if device not in self._factories:
                self._factories[device] = self._factory_of(device)

    def find(self, name: str) -> Visitor | None:
        return self._visitors.get(name)

    def leave(self, name: str) -> None:
        with self._lock:
            visitor = self._visitors.pop(name, None)
        if visitor is not None:
            visitor.leave()

    def _make_room(self) -> list[Visitor]:
        """Remove the sessions that were idle longest, so that one more fits."""
        used = time.monotonic() - self._busy_seconds
        idle = [name for name, visitor in self._visitors.items() if not visitor.busy and visitor.seen <= used]
        too_many = max(len(self._visitors) + 1 - self._limit, 0)
        if len(idle) < too_many:
            raise RuntimeError(f"All {self._limit} conversations of this server are in use. Try again in a minute.")
        return self._remove(idle[:too_many])

    def _remove(self, names: list[str]) -> list[Visitor]:
        self._evicted.update(dict.fromkeys(names))
        while len(self._evicted) > MAX_EVICTED:
            self._evicted.popitem(last=False)
        return [self._visitors.pop(name) for name in names]


def only_uploads(component: gr.components.Component) -> gr.components.Component:
    """Make a component accept uploaded files only, and no addresses that the server would fetch."""
    original = component.async_move_resource_to_block_cache

    async def move(url_or_file_path):
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error("Upload the image. This server does not fetch addresses.")
        return await original(url_or_file_path)

    component.async_move_resource_to_block_cache = move
    return component


class Demo:
    """Handle the events of the page. Each method takes values of its components and returns new ones."""

    def __init__(self, visitors: Visitors, limits: Limits):
        self.visitors = visitors
        self.limits = limits
        self.pages = OpenPages()

    def ask(
        self, question: dict, temperature: float, top_p: float, tokens: int, device: str, request: gr.Request
    ) -> Iterator:
        """Stream the answer to a question."""
        self._check_page(request)
        text, files = (question.get("text") or "").strip(), question.get("files") or []
        if not text:
            gr.Info("Write a question about the image.")
            yield gr.skip(), question_box(question)
            return
        try:
            self._check_length(text)
            visitor = self.visitors.get(request.session_hash, device)
            pending = visitor.send(Turn(text, files), files, self._options(temperature, top_p, tokens))
        except (ValueError, RuntimeError) as error:
            _warn(error, files)
            yield gr.skip(), question_box(question)
            return
        if visitor.was_evicted and not visitor.turns:
            gr.Info("Your session expired. This is a new conversation.")
        yield from self._show(visitor, pending)
        kept = pending.answer.kept or self.visitors.find(request.session_hash) is not visitor
        yield visitor.messages(), question_box(None if kept else question)

    def retry(self, temperature: float, top_p: float, tokens: int, request: gr.Request) -> Iterator:
        """Stream another answer to the last question. If it fails, the earlier answer stays."""
        self._check_page(request)
        visitor = self.visitors.find(request.session_hash)
        if visitor is None or not visitor.turns:
            yield gr.skip(), gr.skip()
            return
        try:
            pending = visitor.retry(self._options(temperature, top_p, tokens))
        except (ValueError, RuntimeError) as error:
            _warn(error)
            yield visitor.messages(), gr.skip()
            return
        yield from self._show(visitor, pending)
        yield visitor.messages(), question_box()

    def undo(self, request: gr.Request) -> tuple:
        """Remove the last question from the conversation and put it into the question box."""
        visitor = self.visitors.find(request.session_hash)
        if visitor is None:
            return gr.skip(), gr.skip()
        turn = visitor.undo()
        box = gr.skip() if turn is None else question_box({"text": turn.text, "files": turn.files})
        return visitor.messages(), box

    def clear(self, request: gr.Request) -> tuple:
        self.visitors.leave(request.session_hash)
        return [], question_box()

    def fetch(self, address: str, question: dict, request: gr.Request) -> tuple:
        """Fetch an image and add it to the question, if the operator allows its host."""
        self._check_page(request)
        try:
            image = fetch_image(address.strip(), self.limits.max_bytes, self.limits.max_pixels, self.limits.hosts)
        except ValueError as error:
            _warn(error)
            return gr.skip(), gr.skip()
        folder = Path(get_upload_folder())  # Gradio deletes its files after an hour
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(tempfile.mkdtemp(dir=folder)) / "image.png"
        image.save(file)
        return question_box(
            {"text": question.get("text") or "", "files": [*(question.get("files") or []), str(file)]}
        ), ""

    def stop(self, request: gr.Request) -> None:
        visitor = self.visitors.find(request.session_hash)
        if visitor is not None:
            visitor.session.cancel()

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)

    def _show(self, visitor: Visitor, pending: Pending) -> Iterator:
        shown = 0.0
        try:
            yield visitor.messages(), question_box(answering=True)
            for piece in pending.answer:
                pending.turn.answer += piece
                visitor.seen = time.monotonic()
                if visitor.seen - shown >= SHOW_SECONDS:
                    shown = visitor.seen
                    yield visitor.messages(), gr.skip()
        except Exception as error:
            _warn(error)
        finally:
            if not pending.answer.done():  # the page was closed
                pending.answer.cancel()
            pending.answer.wait()
            visitor.finish(pending)

    def _check_page(self, request: gr.Request) -> None:
        """Raise an error if no page with this session's id is open. Browsers choose the id, so it proves nothing."""
        if request.session_hash not in self.pages:
            raise gr.Error("This page has lost its connection to the server. Reload it.", print_exception=False)

    def _check_length(self, text: str) -> None:
        if len(text) > self.limits.max_characters:
            raise ValueError(
                f"The question has {len(text):,} characters. The limit is {self.limits.max_characters:,}. Make it "
                "shorter."
            )

    def _options(self, temperature: float, top_p: float, tokens: int) -> dict[str, Any]:
        """Return options within their bounds. A browser may send values that the sliders do not allow."""
        return sampling_options(
            min(max(float(temperature), 0.0), 2.0),
            min(max(float(top_p), 0.01), 1.0),
            min(max(int(tokens), 1), self.limits.max_new_tokens),
        )


def _warn(error: Exception, files: Sequence[str] = ()) -> None:
    """Show an error with the names of files instead of their paths on the server."""
    text = str(error)
    for file in files:
        text = text.replace(str(file), Path(file).name)
    gr.Warning(escape(text))


def question_box(value: Any = None, answering: bool = False) -> Any:
    """Return the question box, empty or with `value`. During an answer it has a stop button."""
    if answering is False and value is None:
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    return gr.MultimodalTextbox(value=value, submit_btn=not answering, stop_btn=answering)


def build_page(
    demo: Demo, title: str, devices: list[str], temperature: float = 0.0, top_p: float = 0.9, max_new_tokens: int = 512
) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# {title}\nAsk questions about images. The answers are computed on this machine.", elem_id="title"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height="66vh",
                    layout="bubble",
                    placeholder=PLACEHOLDER,
                    render_markdown=False,  # messages are HTML that loads nothing
                    latex_delimiters=[],
                    buttons=[],
                    feedback_options=None,
                )
                question = gr.MultimodalTextbox(
                    elem_id="question",
                    show_label=False,
                    placeholder="Ask about the image",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
                only_uploads(question)
            with gr.Column(scale=1, min_width=270, elem_id="settings"):
                with gr.Row():
                    retry = gr.Button("Retry", elem_id="retry", size="sm", min_width=50)
                    undo = gr.Button("Undo", elem_id="undo", size="sm", min_width=50)
                    copy = gr.Button("Copy", elem_id="copy", size="sm", min_width=50)
                    clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=50, variant="stop")
                settings = [
                    gr.Slider(
                        0.0, 2.0, temperature, step=0.05, label="Temperature", info="0 for greedy decoding.",
                    ),
                    gr.Slider(
                        0.05, 1.0, top_p, step=0.05, label="Top-p", info="Used if the temperature is above 0.",
                    ),
                    gr.Slider(
                        1, demo.limits.max_new_tokens, min(max_new_tokens, demo.limits.max_new_tokens), step=1,
                        label="Maximum length of an answer", info="In tokens.",
                    ),
                    gr.Dropdown(
                        devices, value=devices[0], label="Device",
                        info="Changing the device starts a new conversation.",
                    ),
                ]  # fmt: skip
                with gr.Group(visible=bool(demo.limits.hosts)):
                    address = gr.Textbox(
                        label="Image from",
                        info=", ".join(demo.limits.hosts),
                        placeholder="https://",
                        max_length=2000,
                    )
                    fetch = gr.Button("Add", elem_id="fetch", size="sm")
        shown = [chat, question]
        answers = {"concurrency_limit": demo.limits.answers, "concurrency_id": "answers", "show_progress": "hidden"}
        question.submit(demo.ask, [question, *settings], shown, api_visibility="private", **answers)
        retry.click(demo.retry, settings[:-1], shown, api_visibility="private", **answers)
        undo.click(demo.undo, None, shown, queue=False, api_visibility="private")
        clear.click(demo.clear, None, shown, queue=False, api_visibility="private")
        chat.clear(demo.clear, None, shown, queue=False, api_visibility="private")
        copy.click(None, js=COPY, queue=False, api_visibility="private")
        question.stop(demo.stop, None, None, queue=False, api_visibility="private")
        if demo.limits.hosts:
            fetching = [fetch.click, address.submit]
            limit = demo.limits.answers
            gr.on(
                fetching,
                demo.fetch,
                [address, question],
                [question, address],
                api_visibility="private",
                concurrency_limit=limit,
            )
        page.unload(demo.leave)
    return page


def run_demo(page: gr.Blocks, demo: Demo, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        **_prepare(page, demo, host),
    )


def mount_demo(app: FastAPI, page: gr.Blocks, demo: Demo) -> FastAPI:
    """Show the page at `/` of another application, behind the routes that it has."""
    return gr.mount_gradio_app(app, page, path="", **_prepare(page, demo))


def _prepare(page: gr.Blocks, demo: Demo, *names: str) -> dict[str, Any]:
    """Begin to drop idle visitors. Return how Gradio must serve the page."""
    limits = demo.limits
    uploads = Uploads(Path(get_upload_folder()), limits.max_uploads_bytes)
    guard = Middleware(Guard, names=(*names, *limits.names), pages=demo.pages, uploads=uploads)
    threading.Thread(
        target=_evict_now_and_then, args=(demo.visitors, limits.idle_seconds / 10), daemon=True, name="evict"
    ).start()
    page.queue(max_size=limits.queue, api_open=False)
    return {
        "ssr_mode": False,
        "pwa": False,
        "run_history": False,
        "app_kwargs": {"middleware": [guard]},
        "max_file_size": limits.max_bytes,
        "footer_links": [],
        "theme": gr.themes.Soft(
            primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS
        ),
        "css": CSS,
    }


def _evict_now_and_then(visitors: Visitors, seconds: float) -> None:
    while True:
        time.sleep(seconds)
        visitors.evict()
