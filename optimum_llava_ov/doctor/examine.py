"""Examine packages, the machine and a model, and report what is found. `optimum-cli llava-ov doctor` calls this."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_llava_ov.doctor.packages import DISTRIBUTION, Package, installed, package_problems, read_packages
from optimum_llava_ov.doctor.problem import Problem
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_size


if TYPE_CHECKING:
    from optimum_llava_ov.doctor.computer import Computer
    from optimum_llava_ov.doctor.needs import Plan


@dataclass
class Diagnosis:
    """Hold what was found.

    Attributes:
        packages (`list[Package]`): Versions, and those that are supported.
        computer ([`Computer`] or `None`): The machine; `None` if torch or OpenVINO does not import.
        plan ([`Plan`] or `None`): What would be chosen for the model; `None` without a model, or if it cannot be read.
        problems (`list[Problem]`): What is wrong, and how to fix it.
    """

    packages: list[Package]
    computer: Computer | None = None
    plan: Plan | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Return whether nothing was found that stops commands."""
        return not any(problem.stops for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        return {"version": installed(DISTRIBUTION), "python": platform.python_version(), **asdict(self)}


def examine(model: str | None = None) -> Diagnosis:
    """Examine packages first, then the machine, then the model. Later steps need the earlier ones.

    Args:
        model: Folder or model id of a checkpoint or a bundle.
    """
    packages = read_packages()
    diagnosis = Diagnosis(packages, problems=list(package_problems(packages)))
    try:
        from optimum_llava_ov.doctor.computer import describe_computer

        diagnosis.computer = computer = describe_computer()
    except (ImportError, OSError, RuntimeError) as error:
        diagnosis.problems.append(
            Problem(f"torch and OpenVINO do not work: {error}", "Fix the packages above, then run doctor again.")
        )
        return diagnosis
    if computer.missing_kernel is not None:
        diagnosis.problems.append(
            Problem(
                f"Compressed models run slower than they could: {computer.missing_kernel}.",
                "Install the package's wheel for Linux; or a C++ compiler, and then the package again.",
                stops=False,
            )
        )
    if model is not None:
        diagnosis.problems += _examine_model(diagnosis, model, computer)
    return diagnosis


def _examine_model(diagnosis: Diagnosis, model: str, computer: Computer) -> list[Problem]:
    try:
        from optimum_llava_ov.doctor.needs import make_plan
    except (ImportError, OSError, RuntimeError) as error:
        return [Problem(f"transformers or Optimum does not import: {error}", "Fix the packages above.")]
    try:
        diagnosis.plan = plan = make_plan(model, computer.memory, computer.memory_bandwidth)
    except ValueError as error:
        return [Problem(str(error), f"Correct or replace {model}.")]
    problems = []
    smallest = min(plan.needs, key=lambda needs: needs.memory)
    if not smallest.fits:
        needed, memory = readable_size(smallest.memory), readable_size(computer.memory)
        problems.append(
            Problem(
                f"{model} needs {needed} of memory, and this machine has {memory}.",
                "Use a smaller model, --context-window, or a machine with more memory.",
            )
        )
    elif smallest.memory > computer.free_memory:
        needed, free = readable_size(smallest.memory), readable_size(computer.free_memory)
        problems.append(
            Problem(
                f"{model} needs {needed} of memory, and {free} are free now.", "Close other programs.", stops=False
            )
        )
    smallest_on_disk = min(needs.disk for needs in plan.needs)
    if plan.kind == "checkpoint" and (free_here := computer.disks[str(Path.cwd())]) < smallest_on_disk:
        problems.append(
            Problem(
                f"The bundle needs {readable_size(smallest_on_disk)} of disk, and {readable_size(free_here)} are free "
                "here.",
                "Free some space, or export to another disk.",
            )
        )
    return problems


def report(diagnosis: Diagnosis) -> str:
    """Return what was found as text."""
    lines = [
        f"{DISTRIBUTION} {installed(DISTRIBUTION)}, Python {platform.python_version()}",
        "",
        *_packages(diagnosis),
    ]
    if (computer := diagnosis.computer) is not None:
        lines += ["", *_computer(computer)]
    if diagnosis.plan is not None:
        from optimum_llava_ov.doctor.needs import plan_lines

        lines += ["", *plan_lines(diagnosis.plan)]
    lines.append("")
    if not diagnosis.problems:
        lines.append("Nothing is wrong.")
    for problem in diagnosis.problems:
        lines += [f"{'Wrong' if problem.stops else 'Note'}: {problem.found}", f"  To fix it: {problem.fix}"]
    return "\n".join(lines)


def _packages(diagnosis: Diagnosis) -> list[str]:
    extras: dict[tuple[str, str], list[str]] = {}  # of a package and the versions that they ask for
    for package in diagnosis.packages:
        extras.setdefault((package.name, package.required), []).extend([package.extra] if package.extra else [])
    rows = {("package", "installed", "supported", ""): None}
    for package in diagnosis.packages:
        names = extras[package.name, package.required]
        needed = f"for [{','.join(names)}]" if package.extra else ""
        note = needed if package.is_supported else f"{needed} WRONG".strip()
        rows[package.name, package.version or "-", package.required or "any", note] = None
    return table_lines(list(rows), "<<<<")


def _computer(computer: Computer) -> list[str]:
    cpu = computer.cpu
    disks = [f"disk: {readable_size(free)} free for {folder}" for folder, free in computer.disks.items()]
    return [
        f"processor: {cpu['name']}, {cpu['cores']} cores ({', '.join(cpu['features'])}); computes in "
        f"{computer.precision} by default, compressed weights with the {computer.matmul_kernel} kernel",
        "devices: " + ", ".join(f"{name} ({full})" for name, full in computer.devices.items()),
        f"memory: {readable_size(computer.free_memory)} free of {readable_size(computer.memory)}, read at "
        f"{readable_size(computer.memory_bandwidth)} per second",
        *disks,
    ]
