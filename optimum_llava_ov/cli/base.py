"""What all commands of `optimum-cli llava-ov` have in common. Light to import, as all of this folder."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand

from optimum_llava_ov.cli.exit import VERBOSE_HELP, exit_status


class Command(BaseOptimumCLICommand):
    """A command that ends as [`exit_status`] says. Subclasses have `add_arguments` and `execute`."""

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
        """Do what the command is for, with `self.args`."""
        raise NotImplementedError
