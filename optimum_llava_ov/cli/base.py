"""The base class of the commands `optimum-cli llava-ov ...`. Must be fast to import."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand

from optimum_llava_ov.cli.exit import VERBOSE_HELP, exit_status


class Command(BaseOptimumCLICommand):
    """Run a command and end it with [`exit_status`]. Subclasses implement `add_arguments` and `execute`."""

    @classmethod
    def parse_args(cls, parser: ArgumentParser) -> None:
        cls.add_arguments(parser)
        parser.add_argument("--verbose", action="store_true", help=VERBOSE_HELP)

    def run(self) -> None:
        with exit_status(self.args.verbose, getattr(self.args, "token", None)):
            self.execute()

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the command's own arguments."""
        raise NotImplementedError

    def execute(self) -> None:
        """Execute the command with `self.args`."""
        raise NotImplementedError
