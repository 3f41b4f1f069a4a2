"""Settings that pyproject.toml cannot express. All others are there."""

import os
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info


HERE = Path(__file__).parent
# CI knows where the repository is. The package index needs absolute links, and GitHub shows relative ones.
REPOSITORY = "/".join(filter(None, (os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY"))))
REVISION = os.environ.get("GITHUB_REF_NAME", "main")


class EggInfo(egg_info):
    """Do not list `optimum` among the top-level names of this package.

    One file of this package is in `optimum.commands.register`. Some libraries look up the distribution of a name:
    diffusers does so for the version of `optimum`. They would take the version of this package for Optimum's.
    """

    def run(self):
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("optimum_llava_ov\n")


class BuildExt(build_ext):
    """Build a library that OpenVINO loads. It does not depend on the version of Python, and neither does its name."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"


class BdistWheel(bdist_wheel):
    """Make one wheel for all versions of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """Return the kernel for processors with AVX2. Where it cannot be built, the package works without it."""
    openvino = find_spec("openvino")
    if sys.platform != "linux" or platform.machine() != "x86_64" or openvino is None or openvino.origin is None:
        return []
    return [
        Extension(
            "optimum_llava_ov.kernels.matmul",
            ["optimum_llava_ov/kernels/matmul.cpp"],
            include_dirs=[str(Path(openvino.origin).parent / "include")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-mavx2",
                "-mfma",
                "-mf16c",
                "-fvisibility=hidden",
                "-Wno-attributes",
                "-Wno-ignored-attributes",
            ],
            extra_link_args=["-s"],
            language="c++",
            optional=True,
        )
    ]


def readme() -> str:
    """Return the README, with absolute links if the address of the repository is known."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text

    def absolute(match: re.Match) -> str:
        view = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({REPOSITORY}/{view}/{REVISION}/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", absolute, text)


def urls() -> dict[str, str]:
    """Return the addresses that the package index shows."""
    if not REPOSITORY:
        return {}
    return {
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/{REVISION}/docs",
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/{REVISION}/CHANGELOG.md",
    }


setup(
    cmdclass={"egg_info": EggInfo, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
    ext_modules=extensions(),
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
)
