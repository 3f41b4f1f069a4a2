"""The command `optimum-cli llava-ov doctor`. Must be fast to import."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout

from optimum.commands.base import CommandInfo

from optimum_llava_ov.cli.base import Command
from optimum_llava_ov.cli.exit import FAILED
from optimum_llava_ov.doctor.examine import examine, report


class DoctorCommand(Command):
    COMMAND = CommandInfo(name="doctor", help="Check the installation, and say what a model needs on this machine.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "model",
            nargs="?",
            help="Folder or model id of a checkpoint or a bundle. No weights of a checkpoint are downloaded.",
        )
        parser.add_argument("--json", action="store_true", help="Print only JSON.")

    def execute(self) -> None:
        with redirect_stdout(sys.stderr):  # messages of libraries are not part of the result
            diagnosis = examine(self.args.model)
        print(json.dumps(diagnosis.to_dict(), indent=2) if self.args.json else report(diagnosis))
        if not diagnosis.works:
            raise SystemExit(FAILED)
