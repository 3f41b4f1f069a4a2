"""Settings that pyproject.toml cannot express. All others are there."""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    """Do not list `optimum` among the top-level names of this package.

    One file of this package is in `optimum.commands.register`. Some libraries look up the distribution of a name:
    diffusers does so for the version of `optimum`. They would take the version of this package for Optimum's.
    """

    def run(self):
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("optimum_llava_ov\n")


setup(cmdclass={"egg_info": EggInfo})
