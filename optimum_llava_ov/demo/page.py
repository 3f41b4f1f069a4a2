"""Chat in a browser: one page, a session for each visitor, and nothing loaded from other servers."""

from __future__ import annotations

import json
import re
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

from optimum_llava_ov.bundle.example import QUESTION
from optimum_llava_ov.chat.images import fetch_image
from optimum_llava_ov.chat.messages import messages_as_json
from optimum_llava_ov.chat.sampling import sampling_options
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.streaming import Answer, Stats
from optimum_llava_ov.demo.guard import Guard, OpenPages, Uploads
from optimum_llava_ov.demo.markup import answer_to_html, image_to_html
from optimum_llava_ov.errors import ImageError
from optimum_llava_ov.images import DEFAULT_LIMITS
from optimum_llava_ov.units import readable_rate


SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
CSS = """
.gradio-container, .gradio-container main {
    max-width: 920px !important; width: 100% !important; margin: 0 auto !important;
}
#title h1 { font-size: 1.45rem; margin: 0.5rem 0 0 0; }
#title p { margin: 0.1rem 0 0.3rem 0; color: var(--body-text-color-subdued); }
#chat { border-radius: 14px; min-height: 260px; }
#chat [data-testid=user] { white-space: pre-wrap; }
#chat .prose { white-space: normal; }
#chat img { max-height: 260px; max-width: 100%; width: auto; object-fit: contain; }
#chat .stats { margin-top: 0.4rem; font-size: 0.8rem; color: var(--body-text-color-subdued); }
#chat .placeholder { text-align: center; padding: 0 1rem; }
#chat .examples button { border: 1px solid var(--input-border-color); border-radius: 10px; padding: 0.6rem; }
#question .submit-button { background: var(--primary-600); color: white; border-radius: 10px; padding: 0 0.9rem; }
#question .submit-button:hover { background: var(--primary-700); }
#question .stop-button {
    border: 1px solid var(--input-border-color); border-radius: 10px; padding: 0 0.9rem; width: auto;
    background: var(--button-secondary-background-fill);
}
#foot, #foot p { font-size: 0.85rem; color: var(--body-text-color-subdued); text-align: center; }
/* A white thumb on a white page */
#settings input[type=range]::-webkit-slider-thumb { border: 1px solid var(--input-border-color); }
#settings input[type=range]::-moz-range-thumb { border: 1px solid var(--input-border-color); }
#tools { gap: 8px; flex-wrap: wrap; }
#tools button { min-width: 90px; flex: 1 1 auto; }
#chat .icon-button-wrapper:has([aria-label="Share"], [aria-label="Download"]) { display: none; }
@media (max-width: 640px) {
    #title h1 { font-size: 1.2rem; }
    #chat { height: 58vh !important; }
    #tools { display: grid !important; grid-template-columns: 1fr 1fr; }
}
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
# Roles and names that Gradio's components lack, for screen readers
NAMES = """() => {
    const name = () => {
        document.querySelectorAll("#chat .examples[role=list]").forEach((list) => list.setAttribute("role", "group"));
        document.querySelectorAll("#chat button:has(> .image-frame)").forEach((button) => {
            button.setAttribute("aria-label", "Show the image in full size");
        });
    };
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
# The file is made in the browser, from what the browser has kept
EXPORT = """(saved) => {
    if (saved) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 2)], {type: "application/json"}));
        link.download = "conversation.json";
        link.click();
        URL.revokeObjectURL(link.href);
    }
}"""
PLACEHOLDER = (
    "<h2>Ask about an image</h2><p>Choose an example, or add an image with the clip below, and write a question.</p>"
)
EXAMPLES = (QUESTION, "Where is the star?", "Describe the image.")  # about the image of the bundle's card
STORAGE = "optimum-llava-ov"  # key of the conversation in the browser
SEND, STOP = "Send", "Stop"
MAX_SAVED = 4_000_000  # characters; browsers keep 5 million for a site
# Of a conversation that a browser sends
MAX_RESTORED_IMAGES, MAX_RESTORED_MESSAGES, MAX_RESTORED_CHARACTERS = 64, 200, 100_000
IMAGE = "An image of the question"
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
    """Hold what the page shows of a turn.

    Attributes:
        text, answer (`str`): Question and answer.
        files (`list[str]`): Uploaded images.
        images (`list[str]`): Images of a conversation that the browser had kept, as base64 of PNG files.
        stats (`str`): Tokens and times of the answer.
    """

    text: str
    files: list[str]
    answer: str = ""
    stats: str = ""
    images: list[str] = field(default_factory=list)
    _html: tuple[tuple[str, str], str] = (("", ""), "")

    def messages(self) -> list[dict[str, Any]]:
        files = [{"role": "user", "content": {"path": file, "alt_text": IMAGE}} for file in self.files]
        images = [_shown("user", image_to_html(data, IMAGE)) for data in self.images]
        question = [_shown("user", escape(self.text))] if self.text else []
        return [*files, *images, *question, _shown("assistant", self._answer_html())]

    def _answer_html(self) -> str:
        """Return the answer as HTML. Keep the result, because the page shows earlier answers again at every update."""
        if self._html[0] != (key := (self.answer or "…", self.stats)):
            self._html = (key, answer_to_html(*key))
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
                pending.turn.stats = _short(pending.answer.stats)
                self.turns[pending.position :] = [pending.turn]

    def restore(self, saved: list[Any]) -> None:
        """Continue a conversation that a browser had kept. Raise the errors of [`ChatSession.load`]."""
        self.session.load(_checked(saved))
        with self._lock:
            self.turns = turns_of(saved)

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


def turns_of(saved: list[Any]) -> list[Turn]:
    """Return the turns of a conversation that a browser had kept.

    Raises:
        `ValueError`: It is not a conversation.
    """
    try:
        messages = [message for message in _checked(saved) if message["role"] != "system"]
        return [
            Turn(_text(question), [], _text(answer), images=_images(question))
            for question, answer in zip(messages[::2], messages[1::2])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("The file is not a conversation that this page has saved.") from error


def _checked(saved: Any) -> list[Any]:
    """Return a conversation from outside if its size is acceptable."""
    if not isinstance(saved, list) or not all(isinstance(message, dict) for message in saved):
        raise ValueError("The file is not a conversation that this page has saved.")
    images = sum(len(_images(message)) for message in saved)
    characters = sum(len(_text(message)) for message in saved)
    for number, most, what in (
        (len(saved), MAX_RESTORED_MESSAGES, "messages"),
        (images, MAX_RESTORED_IMAGES, "images"),
        (characters, MAX_RESTORED_CHARACTERS, "characters"),
    ):
        if number > most:
            raise ValueError(f"The conversation has {number:,} {what}. At most {most:,} are accepted.")
    return saved


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    items = content if isinstance(content, list) else []
    texts = [str(item["text"]) for item in items if isinstance(item, dict) and "text" in item]
    return content if isinstance(content, str) else "\n".join(texts)


def _images(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    items = content if isinstance(content, list) else []
    return [str(item["base64"]) for item in items if isinstance(item, dict) and "base64" in item]


def _short(stats: Stats) -> str:
    """Return the number of tokens and the times of an answer, in a few words."""
    rate = f" · {readable_rate(stats.tokens_per_second)} tokens/s" if stats.tokens_per_second else ""
    return f"{stats.new_tokens} tokens · first after {stats.time_to_first_token:.2f} s{rate}"


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
        self,
        question: dict,
        temperature: float,
        top_p: float,
        tokens: int,
        device: str,
        saved: Any,
        request: gr.Request,
    ) -> Iterator:
        """Stream the answer to a question."""
        self._check_page(request)
        text, files = (question.get("text") or "").strip(), question.get("files") or []
        if not text:
            gr.Info("Write a question about the image.")
            yield gr.skip(), question_box(question), gr.skip()
            return
        try:
            self._check_length(text)
            visitor = self._visitor(request, device, saved)
            if unreadable := self._unreadable(visitor, files):
                # Without them the next try is possible
                question = {"text": question.get("text"), "files": [file for file in files if file not in unreadable]}
                yield gr.skip(), question_box(question), gr.skip()
                return
            pending = visitor.send(Turn(text, files), files, self._options(temperature, top_p, tokens))
        except (ValueError, RuntimeError) as error:
            _warn(error, files)
            yield gr.skip(), question_box(question), gr.skip()
            return
        if visitor.was_evicted and not visitor.turns:
            gr.Info("Your session expired. This is a new conversation.")
        yield from self._show(visitor, pending)
        kept = pending.answer.kept or self.visitors.find(request.session_hash) is not visitor
        yield visitor.messages(), gr.skip() if kept else gr.MultimodalTextbox(value=question), _kept(visitor)

    def retry(
        self, temperature: float, top_p: float, tokens: int, device: str, saved: Any, request: gr.Request
    ) -> Iterator:
        """Stream another answer to the last question. If it fails, the earlier answer stays."""
        self._check_page(request)
        try:
            visitor = self._visitor(request, device, saved)
            if not visitor.turns:
                yield gr.skip(), gr.skip(), gr.skip()
                return
            pending = visitor.retry(self._options(temperature, top_p, tokens))
        except (ValueError, RuntimeError) as error:
            _warn(error)
            found = self.visitors.find(request.session_hash)
            yield gr.skip() if found is None else found.messages(), gr.skip(), gr.skip()
            return
        yield from self._show(visitor, pending)
        yield visitor.messages(), gr.skip(), _kept(visitor)

    def undo(self, device: str, saved: Any, request: gr.Request) -> tuple:
        """Remove the last question from the conversation and put it into the question box."""
        if request.session_hash not in self.pages:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            visitor = self._visitor(request, device, saved)
        except (ValueError, RuntimeError) as error:
            _warn(error)
            return gr.skip(), gr.skip(), gr.skip()
        turn = visitor.undo()
        box = gr.skip() if turn is None else question_box({"text": turn.text, "files": turn.files})
        return visitor.messages(), box, _kept(visitor)

    def clear(self, request: gr.Request) -> tuple:
        self.visitors.leave(request.session_hash)
        return [], question_box({"text": "", "files": []}), None

    def restore(self, saved: Any) -> list[dict[str, Any]]:
        """Return the messages of the conversation that the browser has kept, for a page that was opened again."""
        try:
            return [message for turn in turns_of(saved or []) for message in turn.messages()]
        except ValueError:  # of another version
            return []

    def open(self, file: str, request: gr.Request) -> tuple:
        """Open a conversation from a file of the visitor. It takes the place of the one on the page."""
        self._check_page(request)
        path = Path(file)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            messages = [message for turn in turns_of(saved) for message in turn.messages()]
        except (ValueError, OSError, RecursionError) as error:
            _warn(ValueError(f"{path.name} cannot be opened: {error}"), [file])
            return gr.skip(), gr.skip()
        finally:
            path.unlink(missing_ok=True)
        self.visitors.leave(request.session_hash)
        return messages, saved

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

    def _visitor(self, request: gr.Request, device: str, saved: Any) -> Visitor:
        """Return the visitor of a page. A new session continues what the browser has kept.

        Raises:
            `RuntimeError`: All sessions are in use.
            `ValueError`: What the browser has kept is not a conversation.
        """
        visitor = self.visitors.get(request.session_hash, device)
        if saved and not visitor.turns and not visitor.busy:
            visitor.restore(saved)
        return visitor

    def _unreadable(self, visitor: Visitor, files: Sequence[str]) -> list[str]:
        """Return the images that the session refuses, and tell the visitor why."""
        refused = []
        for file in files:
            try:
                visitor.session.see_image(file)
            except ImageError as error:  # noqa: PERF203  each image has its own
                _warn(error, [file])
                refused.append(file)
        return refused

    def _show(self, visitor: Visitor, pending: Pending) -> Iterator:
        shown = 0.0
        try:
            yield visitor.messages(), question_box(answering=True), gr.skip()
            for piece in pending.answer:
                pending.turn.answer += piece
                visitor.seen = time.monotonic()
                if visitor.seen - shown >= SHOW_SECONDS:
                    shown = visitor.seen
                    yield visitor.messages(), gr.skip(), gr.skip()
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
    folder = re.escape(str(get_upload_folder()))
    gr.Warning(escape(re.sub(rf"{folder}/(?:[^/\s]+/)*", "", text)))


def _kept(visitor: Visitor) -> Any:
    """Return the conversation for the browser to keep; `None` if it has no turns, or is too long for a browser."""
    messages = messages_as_json(visitor.session.messages)
    if not visitor.turns:
        return None
    try:
        fits = len(json.dumps(_checked(messages))) <= MAX_SAVED
    except ValueError:
        fits = False
    if not fits:
        gr.Info("The conversation is too long for the browser to keep. It is lost if you reload the page.")
        return None
    return messages


def question_box(value: Any = None, answering: bool = False) -> Any:
    """Return the question box, empty or with `value`. During an answer it has a stop button."""
    buttons = {"submit_btn": False, "stop_btn": STOP} if answering else {"submit_btn": SEND, "stop_btn": False}
    if answering is False and value is None:
        return gr.MultimodalTextbox(**buttons)
    return gr.MultimodalTextbox(value=value, **buttons)


def build_page(
    demo: Demo,
    title: str,
    devices: list[str],
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_new_tokens: int = 512,
    facts: str = "",
    example: Path | None = None,
) -> gr.Blocks:
    """Build the page.

    Args:
        facts: What is said of the model in the last line.
        example: Image of the examples that visitors can click. Without one, there are no examples.
    """
    files = [] if example is None else [str(example)]
    examples = [{"text": text, "files": files} for text in EXAMPLES] if files else None
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, delete_cache=(3600, 3600)) as page:
        saved = gr.BrowserState(None, storage_key=STORAGE, secret=STORAGE)
        gr.Markdown(
            f"# {title}\nAsk questions about images. The answers are computed on this machine.", elem_id="title"
        )
        chat = gr.Chatbot(
            elem_id="chat",
            label="Conversation",
            show_label=False,
            height="56vh",
            layout="bubble",
            placeholder=PLACEHOLDER,
            examples=examples,
            render_markdown=False,  # messages are HTML that loads nothing
            latex_delimiters=[],
            buttons=[],
            feedback_options=None,
        )
        question = gr.MultimodalTextbox(
            elem_id="question",
            label="Question",
            show_label=False,
            placeholder="Ask about the image",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=100_000,
            autofocus=True,
            submit_btn=SEND,
        )
        only_uploads(question)
        with gr.Row(elem_id="tools"):
            copy = gr.Button("Copy answer", elem_id="copy", size="sm", min_width=90)
            clear = gr.Button("New conversation", elem_id="clear", size="sm", min_width=90)
            export = gr.Button("Save", elem_id="export", size="sm", min_width=90)
            opened = gr.UploadButton("Open", elem_id="open", size="sm", min_width=90, file_types=[".json"])
            only_uploads(opened)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            settings = [
                gr.Slider(
                    0.0, 2.0, temperature, step=0.05, label="Temperature",
                    info="0: always the most likely word. Higher: more varied.",
                ),
                gr.Slider(
                    0.05, 1.0, top_p, step=0.05, label="Top-p",
                    info="Lower: only likely words. Used if the temperature is above 0.",
                ),
                gr.Slider(
                    1, demo.limits.max_new_tokens, min(max_new_tokens, demo.limits.max_new_tokens), step=1,
                    label="Maximum length of an answer", info="In tokens.",
                ),
                gr.Dropdown(devices, value=devices[0], label="Device", info="Where answers are computed."),
            ]  # fmt: skip
        with gr.Group(visible=bool(demo.limits.hosts), elem_id="addresses"):
            address = gr.Textbox(
                label="Image from",
                info=", ".join(demo.limits.hosts),
                placeholder="https://",
                max_length=2000,
            )
            fetch = gr.Button("Add", elem_id="fetch", size="sm")
        gr.HTML(f"<p>{escape(facts)}</p>", elem_id="foot", visible=bool(facts))
        shown = [chat, question, saved]
        answers = {"concurrency_limit": demo.limits.answers, "concurrency_id": "answers", "show_progress": "hidden"}
        private = {"api_visibility": "private"}
        asked = question.submit(demo.ask, [question, *settings, saved], shown, **private, **answers)
        retried = chat.retry(demo.retry, [*settings, saved], shown, **private, **answers)
        chat.undo(demo.undo, [settings[-1], saved], shown, queue=False, **private)
        chosen = chat.example_select(fill_in, None, question, show_progress="hidden", **private).then(
            demo.ask, [question, *settings, saved], shown, **private, **answers
        )
        for event in (asked, retried, chosen):
            # Afterwards, because the browser applies the last value again when an event ends. With the stop button
            # gone before that, it would undo what another button has done.
            event.then(question_box, None, question, queue=False, show_progress="hidden", **private)
        clear.click(demo.clear, None, shown, queue=False, **private)
        chat.clear(demo.clear, None, shown, queue=False, **private)
        copy.click(None, js=COPY, queue=False, **private)
        export.click(None, saved, None, js=EXPORT, queue=False, **private)
        opened.upload(demo.open, opened, [chat, saved], show_progress="hidden", **private)
        question.stop(demo.stop, None, None, queue=False, **private)
        if demo.limits.hosts:
            gr.on(
                [fetch.click, address.submit],
                demo.fetch,
                [address, question],
                [question, address],
                concurrency_limit=demo.limits.answers,
                **private,
            )
        page.load(demo.restore, saved, chat, queue=False, show_progress="hidden", **private)
        page.load(None, js=NAMES, queue=False, **private)
        page.unload(demo.leave)
    return page


def fill_in(example: gr.SelectData) -> dict[str, Any]:
    """Return an example as a question."""
    return {"text": example.value["text"], "files": [file["path"] for file in example.value.get("files") or []]}


def run_demo(
    page: gr.Blocks,
    demo: Demo,
    host: str,
    port: int,
    open_browser: bool,
    tell: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until Ctrl-C. `tell` gets the address of the page when it can be opened."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,  # Gradio would recommend a public link, which this page does not have
        prevent_thread_lock=True,
        **_prepare(page, demo, host),
    )
    tell(address)
    page.block_thread()


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
        "theme": _theme(),
        "css": CSS,
    }


def _theme() -> gr.themes.Base:
    """Return the theme, with a contrast of at least 4.5 : 1 for all text (WCAG 2.2, level AA)."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS)
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        # Without borders, a box, a button and the page are the same white
        body_background_fill="*neutral_100",
        block_border_width="1px",
        block_border_color="*neutral_300",
        block_border_color_dark="*neutral_700",
        input_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        button_border_width="1px",
        button_secondary_border_color="*neutral_400",
        button_secondary_border_color_dark="*neutral_500",
        # The name of a setting is text. In a coloured box it would look like a button
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_label_text_color="*primary_700",
        block_label_text_color_dark="*neutral_100",
    )


def _evict_now_and_then(visitors: Visitors, seconds: float) -> None:
    while True:
        time.sleep(seconds)
        visitors.evict()
