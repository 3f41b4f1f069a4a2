"""The commands `optimum-cli llava-ov chat` and `demo`. Must be fast to import."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from optimum_llava_ov.bundle.layout import EXAMPLE
from optimum_llava_ov.chat.sampling import sampling_options
from optimum_llava_ov.cli.engine import EngineCommand, add_engine_arguments
from optimum_llava_ov.cli.progress import spinner
from optimum_llava_ov.system.devices import available_devices
from optimum_llava_ov.system.terminal import is_plain


if TYPE_CHECKING:
    from optimum_llava_ov.chat.engine import Engine


def _add_common_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="Folder or model id of a bundle. An original checkpoint is converted first.")
    add_engine_arguments(parser)
    parser.add_argument("--system", help="System prompt. Default: that of the model.")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="Sampling temperature; 0 for greedy decoding (default: %(default)s).",
    )
    parser.add_argument("--top-p", type=float, default=0.9, help="Top-p for sampling (default: %(default)s).")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="Maximum length of an answer in tokens (default: %(default)s)."
    )
    parser.add_argument(
        "--context-window",
        type=int,
        help="Maximum tokens of conversation and answer. Default: those of the model's training.",
    )
    parser.add_argument(
        "--when-full",
        choices=("error", "drop_oldest"),
        default="drop_oldest",
        help="When the context window is full: stop with an error, or drop the oldest turns and keep their images "
        "(default: %(default)s).",
    )


class ChatCommand(EngineCommand):
    COMMAND = CommandInfo(name="chat", help="Chat with a LLaVA about images, in the terminal or through a pipe.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        _add_common_arguments(parser)
        parser.add_argument(
            "--image", action="append", default=[], help="Path or URL of an image for the first question. Repeatable."
        )
        parser.add_argument(
            "-p", "--prompt", metavar="QUESTION", help="Answer only this question. Prints the answer alone."
        )
        parser.add_argument(
            "--plain",
            action="store_true",
            help="Plain text without colours, spinner and images, for screen readers. Pipes always get plain text.",
        )
        parser.add_argument("--load", help="Continue the conversation in this file, which /save wrote.")
        parser.add_argument("--stats", action="store_true", help="Show tokens per second and time to the first token.")

    def execute_on_device(self) -> None:
        args = self.args
        is_interactive = sys.stdin.isatty() and args.prompt is None
        if not is_interactive:
            # The output is the answer alone, without progress bars
            os.environ.setdefault("TQDM_DISABLE", "1")
        with spinner(f"Starting {args.model}", is_interactive and not args.plain and not is_plain(sys.stdout)):
            from optimum_llava_ov.bundle.describe import describe_bundle
            from optimum_llava_ov.chat.run import run_chat
            from optimum_llava_ov.chat.session import ChatSession
            from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
            from optimum_llava_ov.loading import load_engine, resolve_engine

            repository, name = resolve_engine(args.model, args.device, args.engine)
            is_converted = holds_original_checkpoint(repository)  # which shows its own progress
            if not is_converted:
                engine = load_engine(repository, args.device, engine=name)
        if is_converted:
            engine = load_engine(repository, args.device, engine=name)
        chat = ChatSession(
            engine,
            system=args.system,
            messages=args.load or (),
            context_window=args.context_window,
            when_full=args.when_full,
            **sampling_options(args.temperature, args.top_p, args.max_new_tokens),
        )
        banner = None
        if is_interactive:
            bundle = describe_bundle(engine.folder)
            banner = {
                "model": args.model,
                "precision": bundle.precision,
                "engine": engine.name,
                "device": args.device,
                "context": f"{chat.context_window:,} tokens",
                "license": bundle.license,
            }
        run_chat(chat, args.image, args.stats, sys.stdin, sys.stdout, args.prompt, banner, args.plain)


class DemoCommand(EngineCommand):
    COMMAND = CommandInfo(name="demo", help="Serve a page on which visitors chat with a LLaVA about images.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        _add_common_arguments(parser)
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            help="Address to listen on; 0.0.0.0 for all networks (default: %(default)s).",
        )
        parser.add_argument("--port", type=int, default=7860, help="Port to listen on (default: %(default)s).")
        parser.add_argument("--no-browser", action="store_true", help="Do not open the page in a browser.")
        parser.add_argument("--title", help="Heading of the page. Default: the model's name.")
        parser.add_argument(
            "--parallel-answers",
            type=int,
            default=2,
            help="Number of answers computed at the same time (default: %(default)s).",
        )
        parser.add_argument(
            "--max-queue", type=int, default=16, help="Maximum number of waiting visitors (default: %(default)s)."
        )
        parser.add_argument(
            "--max-sessions",
            type=int,
            default=32,
            help="Maximum number of conversations in memory (default: %(default)s).",
        )
        parser.add_argument(
            "--idle-minutes",
            type=float,
            default=30,
            help="Minutes after which an idle conversation is dropped (default: %(default)s).",
        )
        parser.add_argument(
            "--allow-host",
            action="append",
            default=[],
            help="Host from which the server fetches images for visitors. Repeatable. Default: none; the server does "
            "not fetch images.",
        )
        parser.add_argument(
            "--allow-name",
            action="append",
            default=[],
            help="Additional host name of the page, such as demo.example.org. Repeatable. localhost, IP addresses and "
            "--host are always allowed.",
        )
        parser.add_argument(
            "--max-characters", type=int, default=20_000, help="Maximum length of a question (default: %(default)s)."
        )
        parser.add_argument(
            "--max-upload-mb",
            type=float,
            default=20,
            help="Maximum size of an uploaded image in MB (default: %(default)s).",
        )
        parser.add_argument(
            "--max-uploads-mb",
            type=float,
            default=1000,
            help="Maximum size on disk of all uploads together in MB (default: %(default)s).",
        )
        parser.add_argument(
            "--max-megapixels",
            type=float,
            default=50,
            help="Maximum size of an image in megapixels (default: %(default)s).",
        )

    def execute_on_device(self) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'The demo needs gradio. Install it with: pip install "optimum-llava-ov[demo]"'
            ) from error
        from optimum_llava_ov.bundle.describe import describe_bundle
        from optimum_llava_ov.bundle.example import save_example
        from optimum_llava_ov.chat.session import ChatSession
        from optimum_llava_ov.demo.page import Demo, Limits, Visitors, build_page, run_demo
        from optimum_llava_ov.images import ImageLimits
        from optimum_llava_ov.loading import load_engine

        args = self.args
        limits = Limits(
            answers=args.parallel_answers,
            queue=args.max_queue,
            sessions=args.max_sessions,
            idle_seconds=60 * args.idle_minutes,
            max_bytes=int(args.max_upload_mb * 1e6),
            max_pixels=int(args.max_megapixels * 1e6),
            max_uploads_bytes=int(args.max_uploads_mb * 1e6),
            max_characters=args.max_characters,
            max_new_tokens=max(args.max_new_tokens, Limits.max_new_tokens),
            hosts=tuple(args.allow_host),
            names=tuple(args.allow_name),
        )

        engines: dict[str, Engine] = {}

        def factory_of(device: str):
            options = {"system": args.system, "context_window": args.context_window, "when_full": args.when_full}
            options["image_limits"] = ImageLimits(limits.max_bytes, limits.max_pixels)
            engines[device] = load_engine(args.model, device, engine=args.engine)
            return partial(ChatSession, engines[device], **options)

        devices = list(dict.fromkeys([args.device, *available_devices()]))
        visitors = Visitors(factory_of, limits.sessions, limits.idle_seconds)
        with spinner(f"Loading {args.model}", sys.stderr.isatty()):
            visitors.load(args.device)
        title = args.title or os.path.basename(os.path.normpath(args.model))  # noqa: PTH119  also of "."
        engine = engines[args.device]
        bundle = describe_bundle(engine.folder)
        facts = f"{title} · {bundle.precision} · engine {engine.name} · {args.device} · license {bundle.license}"
        demo = Demo(visitors, limits)
        with tempfile.TemporaryDirectory() as folder:
            save_example(Path(folder))
            sampling = (args.temperature, args.top_p, args.max_new_tokens)
            page = build_page(demo, title, devices, *sampling, facts, Path(folder) / EXAMPLE)
            run_demo(page, demo, args.host, args.port, not args.no_browser, _tell)


def _tell(address: str) -> None:
    print(f"The page is at {address.rstrip('/')}. Ctrl-C stops it.", flush=True)
