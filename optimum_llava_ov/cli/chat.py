"""`optimum-cli llava-ov chat` and `demo`. Light to import, as all of this folder."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser

from optimum.commands.base import CommandInfo

from optimum_llava_ov.cli.base import Command


def add_engine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="CPU", help='OpenVINO device, such as CPU, GPU or AUTO; "list" shows those of this machine.'
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "openvino", "genai"),
        default="auto",
        help="What computes: OpenVINO GenAI, or this package's own model. Default: GenAI, if it is installed and can read the model.",
    )


def _add_common_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="Bundle: a folder or a model id. An original checkpoint is converted on the fly.")
    add_engine_arguments(parser)
    parser.add_argument("--system", help="System prompt, instead of the model's usual one.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest words (default: %(default)s).")
    parser.add_argument("--top-p", type=float, default=0.9, help="When sampling (default: %(default)s).")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="Longest answer (default: %(default)s).")
    parser.add_argument(
        "--context-window", type=int, help="Tokens of conversation and answer. Default: as the model was trained."
    )
    parser.add_argument(
        "--when-full",
        choices=("error", "drop_oldest"),
        default="drop_oldest",
        help="At the end of the context window: an error, or forget the oldest turns but not their pictures (%(default)s).",
    )


class ChatCommand(Command):
    COMMAND = CommandInfo(name="chat", help="Talk with a LLaVA-MPT about pictures, in the terminal or through a pipe.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        _add_common_arguments(parser)
        parser.add_argument(
            "--image", action="append", default=[], help="Picture for the first question: path or URL. Repeatable."
        )
        parser.add_argument("--load", help="Go on with a conversation that /save wrote.")
        parser.add_argument("--stats", action="store_true", help="Show tokens per second and time to the first token.")

    def execute(self) -> None:
        args = self.args
        if args.device == "list":
            return list_devices()
        if not sys.stdin.isatty():
            # Only the answer, for whoever reads the other end.
            os.environ.setdefault("TQDM_DISABLE", "1")
        from optimum_llava_ov.chat.devices import check_device

        check_device(args.device)
        from optimum_llava_ov.chat.loading import sampling_options, session_factory
        from optimum_llava_ov.chat.terminal import run_chat

        factory = session_factory(args.model, args.device, engine=args.engine)
        chat = factory(
            system=args.system,
            messages=args.load or (),
            context_window=args.context_window,
            when_full=args.when_full,
            **sampling_options(args.temperature, args.top_p, args.max_new_tokens),
        )
        return run_chat(chat, args.image, args.stats, sys.stdin, sys.stdout)


def list_devices() -> None:
    from optimum_llava_ov.chat.devices import available_devices

    print("\n".join(available_devices()))


class DemoCommand(Command):
    COMMAND = CommandInfo(name="demo", help="Serve a page on which visitors talk with a LLaVA-MPT about pictures.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        _add_common_arguments(parser)
        parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for everyone (%(default)s).")
        parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
        parser.add_argument("--no-browser", action="store_true", help="Do not open the page.")
        parser.add_argument("--title", help="Heading of the page. Default: the model's name.")
        parser.add_argument("--parallel-answers", type=int, default=2, help="Computed at the same time (default: %(default)s).")
        parser.add_argument("--max-queue", type=int, default=16, help="Visitors that may wait (default: %(default)s).")
        parser.add_argument("--max-sessions", type=int, default=32, help="Conversations kept in memory (default: %(default)s).")
        parser.add_argument("--idle-minutes", type=float, default=30, help="After which one is dropped (default: %(default)s).")
        parser.add_argument(
            "--allow-host",
            action="append",
            default=[],
            help="Host from which visitors may have the server fetch pictures. Repeatable. Default: none; no address is fetched.",
        )
        parser.add_argument(
            "--allow-name",
            action="append",
            default=[],
            help="Host name under which browsers may open the page, as demo.example.org. Repeatable. Always allowed: localhost, IP "
            "addresses and --host.",
        )
        parser.add_argument("--max-characters", type=int, default=20_000, help="Of a question (default: %(default)s).")
        parser.add_argument("--max-upload-mb", type=float, default=20, help="Of a picture (default: %(default)s).")
        parser.add_argument(
            "--max-uploads-mb", type=float, default=1000, help="Of all uploads that are kept on the disk (default: %(default)s)."
        )
        parser.add_argument("--max-megapixels", type=float, default=50, help="Of a picture (default: %(default)s).")

    def execute(self) -> None:
        args = self.args
        if args.device == "list":
            return list_devices()
        from optimum_llava_ov.chat.devices import available_devices, check_device

        check_device(args.device)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ImportError('The demo needs gradio. Install it with: pip install "optimum-llava-ov[demo]"') from error
        from optimum_llava_ov.chat.demo import Demo, Limits, Visitors, build_page, run_demo
        from optimum_llava_ov.chat.loading import session_factory
        from optimum_llava_ov.images import ImageLimits

        def factory_of(device: str):
            options = {"system": args.system, "context_window": args.context_window, "when_full": args.when_full}
            options["image_limits"] = ImageLimits(limits.max_bytes, limits.max_pixels)
            factory = session_factory(args.model, device, engine=args.engine)
            return lambda: factory(**options)

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
        devices = list(dict.fromkeys([args.device, *available_devices()]))
        visitors = Visitors(factory_of, limits.sessions, limits.idle_seconds)
        visitors.load(args.device)
        title = args.title or os.path.basename(os.path.normpath(args.model))
        demo = Demo(visitors, limits)
        page = build_page(demo, title, devices, args.temperature, args.top_p, args.max_new_tokens)
        return run_demo(page, demo, args.host, args.port, not args.no_browser)
