"""`optimum-cli llava-ov bench`. Light to import, as all of this folder."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout

from optimum.commands.base import CommandInfo

from optimum_llava_ov.cli.base import Command
from optimum_llava_ov.cli.chat import add_engine_arguments, list_devices


class BenchCommand(Command):
    COMMAND = CommandInfo(name="bench", help="Measure how fast a bundle answers on this machine, and its memory.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("bundle", help="Folder or model id of the bundle.")
        add_engine_arguments(parser)
        parser.add_argument(
            "--prompt-tokens",
            type=int,
            nargs="+",
            metavar="N",
            help="Lengths of the prompts, image included. Default: 300 1000, or more where an image takes more.",
        )
        parser.add_argument("--new-tokens", type=int, default=64, help="Length of each answer (default: %(default)s).")
        parser.add_argument(
            "--rounds",
            type=int,
            default=3,
            help="Answers for each length, of which the medians are shown (default: %(default)s).",
        )
        parser.add_argument("--batch-size", type=int, default=1, help="Prompts at a time (default: %(default)s).")
        parser.add_argument(
            "--image",
            action="append",
            default=[],
            help="Image for the prompts: path or URL. Repeatable. Default: noise.",
        )
        parser.add_argument(
            "--json",
            action="store_true",
            help="Print the numbers, and those of each answer, as JSON and nothing else.",
        )

    def execute(self) -> None:
        args = self.args
        if args.device == "list":
            return list_devices()
        with redirect_stdout(sys.stderr):  # what libraries have to say is no part of the result
            from optimum_llava_ov.system.devices import check_device

            check_device(args.device)
            from optimum_llava_ov.benchmark.result import report
            from optimum_llava_ov.benchmark.run import benchmark
            from optimum_llava_ov.chat.terminal import load_image

            result = benchmark(
                args.bundle,
                prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens,
                rounds=args.rounds,
                batch_size=args.batch_size,
                images=[load_image(source) for source in args.image],
                device=args.device,
                engine=args.engine,
            )
        return print(json.dumps(result.to_dict(), indent=2) if args.json else report(result))
