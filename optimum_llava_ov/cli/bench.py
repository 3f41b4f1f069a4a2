"""The command `optimum-cli llava-ov bench`. Must be fast to import."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_llava_ov.cli.engine import EngineCommand, add_engine_arguments


class BenchCommand(EngineCommand):
    COMMAND = CommandInfo(name="bench", help="Measure speed and memory of a bundle on this machine.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("bundle", help="Folder or model id of the bundle.")
        add_engine_arguments(parser)
        parser.add_argument(
            "--prompt-tokens",
            type=int,
            nargs="+",
            metavar="N",
            help="Lengths of the prompts in tokens, with the image. Default: 300 1000, or more if the image needs it.",
        )
        parser.add_argument("--new-tokens", type=int, default=64, help="Tokens of each answer (default: %(default)s).")
        parser.add_argument(
            "--rounds",
            type=int,
            default=3,
            help="Number of answers for each length. Medians are shown (default: %(default)s).",
        )
        parser.add_argument(
            "--batch-size", type=int, default=1, help="Number of prompts at a time (default: %(default)s)."
        )
        parser.add_argument(
            "--image",
            action="append",
            default=[],
            help="Path or URL of an image for the prompts. Repeatable. Default: random images.",
        )
        parser.add_argument(
            "--json",
            action="store_true",
            help="Print only JSON, with the results of each answer.",
        )
        parser.add_argument(
            "--card",
            action="store_true",
            help="Also write the results, with the processor's name, into the bundle's card. Needs a folder.",
        )

    def execute_on_device(self) -> None:
        args = self.args
        if args.card and not Path(args.bundle).is_dir():
            raise ValueError(
                f"{args.bundle} is not a folder, so it has no card to write into (--card). Download it first."
            )
        with redirect_stdout(sys.stderr):  # messages of libraries are not part of the result
            from optimum_llava_ov.benchmark.result import report
            from optimum_llava_ov.benchmark.run import benchmark
            from optimum_llava_ov.bundle.card import update_card
            from optimum_llava_ov.bundle.settings import write_json
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
            if args.card:
                write_json(Path(args.bundle) / "bench.json", result.to_dict())
                update_card(Path(args.bundle))
        print(json.dumps(result.to_dict(), indent=2) if args.json else report(result))
