"""Check the versions of packages. Imports none of them, so that it works when they are broken."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from optimum_llava_ov.doctor.problem import Problem


DISTRIBUTION = "optimum-llava-ov"
DEVELOPMENT = ("test", "quality", "docs")  # extras that users do not install
IMPORT_SECONDS = 120  # after which the import of a package counts as failed


@dataclass(frozen=True)
class Package:
    """Describe a package that this one needs.

    Attributes:
        name (`str`): Name of the package.
        version (`str` or `None`): Installed version; `None` if it is not installed.
        required (`str`): Versions that are supported, such as `>=2026.4,<2026.5`; empty for all versions.
        extra (`str` or `None`): Extra of this package that needs it; `None` if this package always needs it.
    """

    name: str
    version: str | None
    required: str
    extra: str | None

    @property
    def is_supported(self) -> bool:
        """Return whether the version is supported. A package of an extra may also be missing."""
        if self.version is None:
            return self.extra is not None
        return SpecifierSet(self.required).contains(self.version, prereleases=True)


def read_packages() -> list[Package]:
    """Return the packages that the metadata of this package names, without those of its development."""
    packages = []
    for requirement in map(Requirement, requires(DISTRIBUTION) or []):
        extra = match[1] if (match := re.search(r'extra == "(\w+)"', str(requirement.marker or ""))) else None
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        if applies and extra not in DEVELOPMENT and requirement.name != DISTRIBUTION:  # an extra may name other extras
            found, required = installed(requirement.name), _ordered(requirement.specifier)
            packages.append(Package(requirement.name, found, required, extra))
    return sorted(packages, key=lambda package: (package.extra or "", package.name))


def _ordered(specifiers: SpecifierSet) -> str:
    """Return versions as people write them: the lowest first."""
    return ",".join(sorted(map(str, specifiers), key=lambda text: not text.startswith((">", "~", "="))))


def installed(name: str) -> str | None:
    """Return the installed version of a package; `None` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_problems(packages: list[Package]) -> Iterator[Problem]:
    """Yield what is wrong with the installed packages."""
    yield from _python_problems()
    for package in packages:
        if not package.is_supported:
            found = "is not installed" if package.version is None else f"{package.version} is not supported"
            versions = f" (supported: {package.required})" if package.required else ""
            yield Problem(f"{package.name} {found}{versions}.", f'pip install "{package.name}{package.required}"')
    yield from _torchvision_problems()
    yield from _cuda_problems()


def _python_problems() -> Iterator[Problem]:
    required = metadata(DISTRIBUTION)["Requires-Python"]
    if required and not SpecifierSet(required).contains(platform.python_version(), prereleases=True):
        yield Problem(f"Python is {platform.python_version()}, expected {required}.", "Install a newer Python.")


def _torchvision_problems() -> Iterator[Problem]:
    """Yield a problem if torchvision does not import. Then transformers does not import either."""
    if (found := installed("torchvision")) is None:
        return
    try:
        result = subprocess.run(
            [sys.executable, "-c", "import torchvision"], capture_output=True, timeout=IMPORT_SECONDS, check=False
        )
        failed = result.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        yield Problem(
            f"torchvision {found} does not work with torch {installed('torch')}, so that `import transformers` fails.",
            "pip uninstall torchvision   (this package does not need it)",
        )


def _cuda_problems() -> Iterator[Problem]:
    """Yield a note if torch was built for NVIDIA GPUs and there is none."""
    cuda = torch_cuda()
    has_gpu = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if cuda is not None and not has_gpu:
        yield Problem(
            f"torch {installed('torch')} was built for CUDA {cuda}, which takes gigabytes of disk, but there is no "
            "NVIDIA GPU.",
            "pip install --force-reinstall --no-deps torch torchvision --index-url https://download.pytorch.org/whl/cpu",
            stops=False,
        )


def torch_cuda() -> str | None:
    """Return the version of CUDA that torch was built for; `None` if it was built without, or is not installed."""
    try:
        file = Path(str(distribution("torch").locate_file("torch/version.py")))
        match = re.search(r"""^cuda\b[^=\n]*=\s*['"]([\d.]+)['"]""", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (PackageNotFoundError, OSError):
        return None
    return match[1] if match else None
