"""The conversation in a browser: one page, a session for each visitor, nothing fetched from outside."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from optimum_llava_ov.chat.loading import sampling_options
from optimum_llava_ov.chat.pictures import fetch_picture
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.images import DEFAULT_LIMITS


SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
CSS = """
.gradio-container, .gradio-container main { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
#title h1 { font-size: 1.55rem; margin: 0.6rem 0 0 0; }
#title p { margin: 0.1rem 0 0.4rem 0; color: var(--body-text-color-subdued); }
#chat { border-radius: 14px; }
#settings { gap: 10px; }
#chat .icon-button-wrapper:has([aria-label="Share"], [aria-label="Download"]) { display: none; }
"""
PLACEHOLDER = "<h3>Show a picture, and ask about it</h3><p>Add one with the clip, drop it or paste it below.</p>"
MAX_EVICTED = 1000  # visitors whose session went, and who are told so when they come back


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        answers (`int`): computed at the same time.
        queue (`int`): visitors that may wait; the next one is told to come back later.
        sessions (`int`): kept; the one that was idle longest makes room for a new one.
        idle_seconds (`float`): after which a session goes in any case.
        max_bytes (`int`), max_pixels (`int`): of a picture.
        max_new_tokens (`int`): that a visitor can ask for.
        hosts (`tuple[str, ...]`): from which the server may fetch pictures for visitors.
    """

    answers: int = 2
    queue: int = 16
    sessions: int = 32
    idle_seconds: float = 1800.0
    max_bytes: int = DEFAULT_LIMITS.max_bytes
    max_pixels: int = DEFAULT_LIMITS.max_pixels
    max_new_tokens: int = 1024
    hosts: tuple[str, ...] = ()


@dataclass
class Turn:
    """What the page shows of a turn."""

    text: str
    files: list[str]
    answer: str = ""

    def messages(self) -> list[dict[str, Any]]:
        pictures = [{"role": "user", "content": {"path": file}} for file in self.files]
        question = [{"role": "user", "content": self.text}] if self.text else []
        return [*pictures, *question, {"role": "assistant", "content": self.answer or "…"}]


@dataclass
class Visitor:
    """A page that somebody has open."""

    session: ChatSession
    device: str
    turns: list[Turn] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    was_evicted: bool = False

    def messages(self) -> list[dict[str, Any]]:
        return [message for turn in self.turns for message in turn.messages()]


class Visitors:
    """A session for each open page: no more than `limit` of them, none that was idle for longer than `idle_seconds`."""

    def __init__(self, factory_of: Callable[[str], Callable[..., ChatSession]], limit: int, idle_seconds: float):
        self._factory_of = factory_of
        self._factories: dict[str, Callable[..., ChatSession]] = {}
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # who asked last comes last
        self._evicted: OrderedDict[str, None] = OrderedDict()
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, name: str, device: str) -> Visitor:
        """The visitor of that name; anew, with nothing said yet, on another device."""
        with self._lock:
            visitor = self._visitors.get(name)
            if visitor is None or visitor.device != device:
                self.load(device)
                visitor = self._visitors[name] = Visitor(self._factories[device](), device)
                visitor.was_evicted = name in self._evicted
                self._evicted.pop(name, None)
            visitor.seen = time.monotonic()
            self._visitors.move_to_end(name)
        self.evict()
        return visitor

    def evict(self) -> None:
        """Let the sessions go that are too many, and those that are idle for too long."""
        with self._lock:
            too_many = list(self._visitors)[: max(len(self._visitors) - self._limit, 0)]
            too_old = time.monotonic() - self._idle_seconds
            idle = [name for name, visitor in self._visitors.items() if visitor.seen < too_old]
            gone = {name: self._visitors.pop(name) for name in {*too_many, *idle}}
            self._evicted.update(dict.fromkeys(gone))
            while len(self._evicted) > MAX_EVICTED:
                self._evicted.popitem(last=False)
        for visitor in gone.values():
            visitor.session.cancel()

    def load(self, device: str) -> None:
        """Load the model there, unless it is."""
        if device not in self._factories:
            self._factories[device] = self._factory_of(device)

    def find(self, name: str) -> Visitor | None:
        return self._visitors.get(name)

    def leave(self, name: str) -> None:
        with self._lock:
            visitor = self._visitors.pop(name, None)
        if visitor is not None:
            visitor.session.cancel()


def only_uploads(component: gr.components.Component) -> gr.components.Component:
    """Let a component take files that were uploaded, and nothing that the server would have to fetch."""
    original = component.async_move_resource_to_block_cache

    async def move(url_or_file_path):
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error("Pictures must be uploaded; this server fetches no addresses.")
        return await original(url_or_file_path)

    component.async_move_resource_to_block_cache = move
    return component


class Demo:
    """What happens when visitors press something. Each method takes and gives what the page shows."""

    def __init__(self, visitors: Visitors, limits: Limits):
        self.visitors = visitors
        self.limits = limits

    def ask(self, question: dict, temperature: float, top_p: float, tokens: int, device: str, request: gr.Request) -> Iterator:
        """Stream the answer. The last picture that came is what the question is about."""
        visitor = self.visitors.get(request.session_hash, device)
        text, files = (question.get("text") or "").strip(), question.get("files") or []
        if not text:
            gr.Info("Write a question about the picture.")
            yield visitor.messages(), question_box(question)
            return
        try:
            answer = visitor.session.send(text, files, **self._options(temperature, top_p, tokens))
        except (ValueError, RuntimeError) as error:
            gr.Warning(_without_paths(str(error), files))
            yield visitor.messages(), question_box(question)
            return
        if visitor.was_evicted and not visitor.turns:
            gr.Info("You were away for long, so the conversation began anew.")
        yield from self._show(visitor, Turn(text, files), answer)

    def retry(self, temperature: float, top_p: float, tokens: int, device: str, request: gr.Request) -> Iterator:
        visitor = self.visitors.get(request.session_hash, device)
        if visitor.turns:
            with suppress(RuntimeError):
                answer = visitor.session.retry(**self._options(temperature, top_p, tokens))
                turn = visitor.turns.pop()
                yield from self._show(visitor, Turn(turn.text, turn.files), answer)
                return
        yield visitor.messages(), gr.skip()

    def undo(self, device: str, request: gr.Request) -> tuple:
        """Take the last question back into the box."""
        visitor = self.visitors.get(request.session_hash, device)
        visitor.session.cancel()
        if not visitor.turns:
            return [], gr.skip()
        visitor.session.undo()
        turn = visitor.turns.pop()
        return visitor.messages(), question_box({"text": turn.text, "files": turn.files})

    def clear(self, request: gr.Request) -> tuple:
        self.visitors.leave(request.session_hash)
        return [], question_box()

    def fetch(self, address: str, question: dict) -> tuple:
        """Put the picture of an address beside the question, if the operator allows its host."""
        try:
            picture = fetch_picture(address.strip(), self.limits.max_bytes, self.limits.max_pixels, self.limits.hosts)
        except ValueError as error:
            gr.Warning(str(error))
            return gr.skip(), gr.skip()
        folder = Path(get_upload_folder())  # where the page's other pictures are, which go after an hour
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(tempfile.mkdtemp(dir=folder)) / "picture.png"
        picture.save(file)
        return question_box({"text": question.get("text") or "", "files": [*(question.get("files") or []), str(file)]}), ""

    def stop(self, request: gr.Request) -> None:
        visitor = self.visitors.find(request.session_hash)
        if visitor is not None:
            visitor.session.cancel()

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)

    def _show(self, visitor: Visitor, turn: Turn, answer: Any) -> Iterator:
        visitor.turns.append(turn)
        yield visitor.messages(), question_box(answering=True)
        try:
            for piece in answer:
                turn.answer += piece
                visitor.seen = time.monotonic()
                yield visitor.messages(), gr.skip()
        except Exception as error:
            visitor.turns.remove(turn)
            gr.Warning(str(error))
        if answer.cancelled and not turn.answer and turn in visitor.turns:
            visitor.turns.remove(turn)  # as the session does
        yield visitor.messages(), question_box(answering=False)

    def _options(self, temperature: float, top_p: float, tokens: int) -> dict[str, Any]:
        """Within bounds: what comes from a browser need not come from our sliders."""
        return sampling_options(
            min(max(float(temperature), 0.0), 2.0),
            min(max(float(top_p), 0.01), 1.0),
            min(max(int(tokens), 1), self.limits.max_new_tokens),
        )


def question_box(value: Any = None, answering: bool = False) -> Any:
    """The box of the question, empty or with `value`, with a button to stop while there is an answer to stop."""
    if answering is False and value is None:
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    return gr.MultimodalTextbox(value=value, submit_btn=not answering, stop_btn=answering)


def build_page(
    demo: Demo, title: str, devices: list[str], temperature: float = 0.0, top_p: float = 0.9, max_new_tokens: int = 512
) -> gr.Blocks:
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {title}\nQuestions about pictures, answered on this machine.", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height="66vh",
                    layout="bubble",
                    placeholder=PLACEHOLDER,
                    render_markdown=False,  # an answer must not make the page fetch anything
                    buttons=["copy"],
                    feedback_options=None,
                )
                question = gr.MultimodalTextbox(
                    elem_id="question",
                    show_label=False,
                    placeholder="Ask about the picture",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
                only_uploads(question)
            with gr.Column(scale=1, min_width=270, elem_id="settings"):
                with gr.Row():
                    retry = gr.Button("Retry", elem_id="retry", size="sm", min_width=60)
                    undo = gr.Button("Undo", elem_id="undo", size="sm", min_width=60)
                    clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=60, variant="stop")
                settings = [
                    gr.Slider(0.0, 2.0, temperature, step=0.05, label="Temperature", info="0 gives the likeliest words."),
                    gr.Slider(0.05, 1.0, top_p, step=0.05, label="Top-p", info="With temperature above 0."),
                    gr.Slider(
                        1, demo.limits.max_new_tokens, min(max_new_tokens, demo.limits.max_new_tokens), step=1, label="Longest answer",
                        info="In tokens.",
                    ),
                    gr.Dropdown(devices, value=devices[0], label="Device", info="Another one begins a new conversation."),
                ]  # fmt: skip
                with gr.Group(visible=bool(demo.limits.hosts)):
                    address = gr.Textbox(
                        label="Picture from", info=", ".join(demo.limits.hosts), placeholder="https://", max_length=2000
                    )
                    fetch = gr.Button("Add", elem_id="fetch", size="sm")
        shown = [chat, question]
        answers = {"concurrency_limit": demo.limits.answers, "concurrency_id": "answers", "show_progress": "hidden"}
        question.submit(demo.ask, [question, *settings], shown, api_visibility="private", **answers)
        retry.click(demo.retry, settings, shown, api_visibility="private", **answers)
        undo.click(demo.undo, settings[-1:], shown, queue=False, api_visibility="private")
        clear.click(demo.clear, None, shown, queue=False, api_visibility="private")
        chat.clear(demo.clear, None, shown, queue=False, api_visibility="private")
        question.stop(demo.stop, None, None, queue=False, api_visibility="private")
        if demo.limits.hosts:
            gr.on([fetch.click, address.submit], demo.fetch, [address, question], [question, address], api_visibility="private")
        page.unload(demo.leave)
    return page


def _without_paths(message: str, files: list[str]) -> str:
    """Where the server keeps an upload is nobody's business."""
    for file in files:
        message = message.replace(f" {file} ", " ")
    return message


def run_demo(page: gr.Blocks, visitors: Visitors, limits: Limits, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    threading.Thread(target=_evict_now_and_then, args=(visitors, limits.idle_seconds / 10), daemon=True, name="evict").start()
    page.queue(max_size=limits.queue, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=limits.max_bytes,
        footer_links=[],
        theme=gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS),
        css=CSS,
    )


def _evict_now_and_then(visitors: Visitors, seconds: float) -> None:
    while True:
        time.sleep(seconds)
        visitors.evict()
