"""The commands `eval` and `push`, and the group `llava-ov`. Heavy modules are imported when a command runs."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_llava_ov.cli.base import Command
from optimum_llava_ov.cli.bench import BenchCommand
from optimum_llava_ov.cli.caption import CaptionCommand
from optimum_llava_ov.cli.chat import ChatCommand, DemoCommand
from optimum_llava_ov.cli.serve import ServeCommand


class EvalCommand(Command):
    COMMAND = CommandInfo(name="eval", help="Compare the answers of bundles with those of the original checkpoint.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "bundles", nargs="+", type=Path, metavar="bundle", help="Folders of the bundles to measure."
        )
        parser.add_argument(
            "--reference",
            required=True,
            help="Folder or model id of the original checkpoint, which runs in torch, or another bundle.",
        )
        parser.add_argument(
            "--dataset",
            help="Folder of images, or JSONL file of {image, prompt, answer}. Default: generated images of coloured "
            "shapes.",
        )
        parser.add_argument("--num-samples", type=int, default=64, help="Number of samples (default: %(default)s).")
        parser.add_argument(
            "--max-new-tokens",
            type=int,
            default=64,
            help="Maximum length of an answer in tokens (default: %(default)s).",
        )
        parser.add_argument("--device", default="CPU", help="OpenVINO device for bundles (default: %(default)s).")
        parser.add_argument(
            "--work-dir",
            type=Path,
            help="Folder for recordings, from which an interrupted run resumes (default: <first bundle>/.eval).",
        )
        parser.add_argument(
            "--plot", type=Path, help="File for a plot of quality against size (default: <first bundle>/eval.png)."
        )

    def execute(self) -> None:
        from optimum_llava_ov.bundle.card import update_card
        from optimum_llava_ov.evaluation.evaluate import evaluate
        from optimum_llava_ov.evaluation.metrics import table
        from optimum_llava_ov.evaluation.plot import plot

        args = self.args
        qualities = evaluate(
            args.bundles,
            args.reference,
            args.dataset,
            args.num_samples,
            args.max_new_tokens,
            args.work_dir,
            args.device,
        )
        print(table(qualities))
        plot_file = args.plot or args.bundles[0] / "eval.png"
        plot(qualities, plot_file)
        for bundle in args.bundles:
            update_card(bundle)
        print(f"\nWrote eval.json and the card of each bundle, and {plot_file}")


class PushCommand(Command):
    COMMAND = CommandInfo(name="push", help="Publish a bundle on the Hugging Face Hub, in one commit.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="Folder of the bundle.")
        parser.add_argument("repo_id", help="Repository on the Hub: owner/name. Created if it does not exist.")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Check the bundle and list what would be published. Does not use the network.",
        )
        parser.add_argument(
            "--private", action="store_true", default=None, help="Make a newly created repository private."
        )
        parser.add_argument("--revision", help="Branch to push to. Created if it does not exist (default: main).")
        parser.add_argument("--create-pr", action="store_true", help="Propose the bundle as a pull request.")
        parser.add_argument("--commit-message", help="Summary of the commit.")
        parser.add_argument(
            "--token", help="Token with write permission (default: the one of `hf auth login` or HF_TOKEN)."
        )

    def execute(self) -> None:
        from optimum_llava_ov.hub.push import plan_push, push_bundle

        args = self.args
        if args.dry_run:
            print(f"{plan_push(args.bundle, args.repo_id)}\nNothing was published (--dry-run).")
            return
        options = {
            name: getattr(args, name) for name in ("private", "revision", "create_pr", "commit_message", "token")
        }
        commit = push_bundle(args.bundle, args.repo_id, **options)
        print(f"Published: {commit.pr_url or commit}")


class LlavaOVCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="llava-ov", help="Tools for LLaVA bundles.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (
            EvalCommand,
            BenchCommand,
            PushCommand,
            ChatCommand,
            DemoCommand,
            ServeCommand,
            CaptionCommand,
        )
    )
