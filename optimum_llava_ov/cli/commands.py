"""The commands `eval` and `push`, and the group `llava-ov`. Heavy modules are imported when a command runs."""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_llava_ov.cli.base import Command
from optimum_llava_ov.cli.bench import BenchCommand
from optimum_llava_ov.cli.caption import CaptionCommand
from optimum_llava_ov.cli.chat import ChatCommand, DemoCommand
from optimum_llava_ov.cli.doctor import DoctorCommand
from optimum_llava_ov.cli.serve import ServeCommand


WORTH_A_PLOT = 3  # bundles; two points say less than the table


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentTypeError(f'{text} is not a JSON object. Expected for example \'{{"base_model": "vicuna"}}\'.')
    return values


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
            help="Folder or model id of the original checkpoint or fine-tune, which runs in torch, or another bundle.",
        )
        parser.add_argument(
            "--model-kwargs",
            type=_json_object,
            help='Options of the reference, as for the export: \'{"base_model": "<folder or model id>"}\'.',
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
            "--plot",
            type=Path,
            help="File for a plot of quality against size, or against the number of tokens of an image if it differs "
            "(default for three bundles or more: <first bundle>/eval.png).",
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
            args.model_kwargs,
        )
        print(table(qualities))
        plot_file = args.bundles[0] / "eval.png"
        plot_file.unlink(missing_ok=True)  # of an earlier evaluation
        if args.plot or len(args.bundles) >= WORTH_A_PLOT:
            plot_file = args.plot or plot_file
            plot(qualities, plot_file)
        for bundle in args.bundles:
            update_card(bundle)
        plotted = f", and {plot_file}" if plot_file.exists() else ""
        print(f"\nWrote eval.json and the card of each bundle{plotted}")


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
            "--license",
            help="License in the card, as the Hub calls it, such as apache-2.0 (default: that of the checkpoint).",
        )
        parser.add_argument(
            "--base-model",
            help="Model id in the card of the model that the bundle was made from (default: that of the checkpoint).",
        )
        parser.add_argument(
            "--token", help="Token with write permission (default: the one of `hf auth login` or HF_TOKEN)."
        )

    def execute(self) -> None:
        from optimum_llava_ov.hub.push import plan_push, push_bundle

        args = self.args
        if args.dry_run:
            plan = plan_push(args.bundle, args.repo_id, args.license, args.base_model)
            print(f"{plan}\nNothing was published (--dry-run).")
            return
        options = {
            name: getattr(args, name) for name in ("private", "revision", "create_pr", "commit_message", "token")
        }
        options |= {"license_id": args.license, "base_model": args.base_model}
        commit = push_bundle(args.bundle, args.repo_id, **options)
        print(f"Published: {commit.pr_url or commit}")


class AdapterCommand(Command):
    COMMAND = CommandInfo(name="adapter", help="Write the LoRA of a fine-tune to a file for OpenVINO GenAI.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("fine_tune", metavar="fine-tune", help="Folder or model id of the fine-tune.")
        parser.add_argument("output", type=Path, help="File to write, such as task.safetensors. It must not exist.")
        parser.add_argument(
            "--model-kwargs",
            type=_json_object,
            help='Options of the fine-tune, as for the export: \'{"base_model": "<folder or model id>"}\'.',
        )

    def execute(self) -> None:
        from optimum_llava_ov.export.adapter import export_adapter

        layers = export_adapter(self.args.fine_tune, self.args.output, self.args.model_kwargs)
        kwargs = shlex.quote(json.dumps({**(self.args.model_kwargs or {}), "lora": "separate"}))
        print(
            f"Wrote {self.args.output}: LoRA of {layers} layers, with its scale, so its weight is 1.\n"
            "It belongs to the bundle that holds all else that was trained:\n"
            f"optimum-cli export openvino --model {shlex.quote(self.args.fine_tune)} --model-kwargs {kwargs} base-ov"
        )


THE_WAY = """\
the way from a checkpoint to a published model:
  optimum-cli llava-ov doctor
  optimum-cli export openvino --model examples/shapes/checkpoint --weight-format int4 shapes-int4-ov
  optimum-cli llava-ov chat shapes-int4-ov --image examples/shapes/pictures/a.png -p "What colour is the circle?"
  optimum-cli llava-ov eval shapes-int4-ov --reference examples/shapes/checkpoint --num-samples 4
  optimum-cli llava-ov bench shapes-int4-ov --prompt-tokens 100 --new-tokens 16
  optimum-cli llava-ov push shapes-int4-ov me/shapes-int4-ov --dry-run

The folder `examples` is part of the repository. --model takes any other folder, or a model id of the Hub, such as
liuhaotian/llava-v1.5-7b. `chat` without -p is a conversation. `demo` is a page in the browser. To see the options of
a command: optimum-cli llava-ov COMMAND --help"""


class LlavaOVCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="llava-ov", help="Tools for LLaVA bundles.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = "Run, measure and publish LLaVA models on OpenVINO."
        parser.epilog = THE_WAY

    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (
            DoctorCommand,  # in the order in which people need them
            ChatCommand,
            DemoCommand,
            EvalCommand,
            BenchCommand,
            PushCommand,
            AdapterCommand,
            ServeCommand,
            CaptionCommand,
        )
    )
