"""The command classes; the work is done elsewhere and imported when a command runs."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_llava_ov.cli.chat import ChatCommand, DemoCommand


class EvalCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="eval", help="Measure what a conversion costs in quality.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("bundles", nargs="+", type=Path, metavar="bundle", help="Folders of the bundles to measure.")
        parser.add_argument(
            "--reference", required=True, help="Original checkpoint (folder or model id; run in torch), or another bundle."
        )
        parser.add_argument(
            "--dataset",
            help="Folder of pictures, or JSONL file of {image, prompt, answer}. Default: drawn pictures of coloured shapes.",
        )
        parser.add_argument("--num-samples", type=int, default=64, help="How many samples (default: %(default)s).")
        parser.add_argument("--max-new-tokens", type=int, default=64, help="Longest answer (default: %(default)s).")
        parser.add_argument("--device", default="CPU", help="OpenVINO device for bundles (default: %(default)s).")
        parser.add_argument("--work-dir", type=Path, help="Where recordings are kept to resume from (default: <bundle>/.eval).")
        parser.add_argument("--plot", type=Path, help="Picture of quality against size (default: <first bundle>/eval.png).")

    def run(self) -> None:
        from optimum_llava_ov.evaluation.main import evaluate
        from optimum_llava_ov.evaluation.metrics import table
        from optimum_llava_ov.evaluation.plot import plot

        args = self.args
        qualities = evaluate(
            args.bundles, args.reference, args.dataset, args.num_samples, args.max_new_tokens, args.work_dir, args.device
        )
        print(table(qualities))
        picture = args.plot or args.bundles[0] / "eval.png"
        plot(qualities, picture)
        print(f"\nWritten: eval.json in each bundle, {picture}")


class LlavaOVCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="llava-ov", help="Tools for LLaVA-MPT bundles.")
    SUBCOMMANDS = (
        CommandInfo(name=EvalCommand.COMMAND.name, help=EvalCommand.COMMAND.help, subcommand_class=EvalCommand),
        CommandInfo(name=ChatCommand.COMMAND.name, help=ChatCommand.COMMAND.help, subcommand_class=ChatCommand),
        CommandInfo(name=DemoCommand.COMMAND.name, help=DemoCommand.COMMAND.help, subcommand_class=DemoCommand),
    )
