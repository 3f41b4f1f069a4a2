"""What pyproject.toml cannot say. Everything else is there."""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    """Does not list `optimum` among the names that belong to this package.

    One file of this package is in `optimum.commands.register`. Libraries that look up which distribution a name is of,
    as diffusers does for the version of `optimum`, would take the version of this package for Optimum's.
    """

    def run(self):
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("optimum_llava_ov\n")


setup(cmdclass={"egg_info": EggInfo})
