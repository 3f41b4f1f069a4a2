"""Interrupt the replacement of a bundle at every system call that writes, and count lost files.

A process replaces a bundle by another one. strace kills it at the first call of a kind, at the second, and so on. Or
it lets that call fail, alone or with all later calls of this kind. After each interruption, and after the next export,
the user's files and the bundle are compared with the earlier ones. A bundle that was interrupted in the middle is also
loaded.

Needs Linux and strace, and root for the mount point and the full disk.

    python benchmarks/interruptions.py BUNDLE ANOTHER_BUNDLE
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, PARTS
from optimum_llava_ov.bundle.staging import staged


CALLS = ("mkdir", "flock", "sendfile", "copy_file_range", "write", "rename", "unlink", "unlinkat", "rmdir")
ACTIONS = {"killed": "signal=KILL:when={}", "no space": "error=ENOSPC:when={}+", "one error": "error=EIO:when={}"}
REPLACE = """
import shutil, sys
from optimum_llava_ov.bundle.staging import staged
with staged(sys.argv[2]) as folder:
    shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
"""


def digests(folder: Path) -> dict[str, bytes]:
    """Return hashes of the bundle's files in `folder`."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).digest()
        for name in (*FILES, *EXTRA_FILES)
        if (folder / name).exists()
    }


def user_files(folder: Path) -> dict[str, bytes]:
    """Return all files except those of the bundle and of an export."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b""
        for file in folder.rglob("*")
        if file.name not in (*FILES, *EXTRA_FILES) and ".optimum-llava-ov" not in file.parts
    }


def replace(bundle: Path, output: Path) -> None:
    with staged(output) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)


def replace_until(action: str, call: str, number: int, bundle: Path, output: Path) -> bool:
    """Replace a bundle in a process, and interrupt it at call `number` of a kind. Return whether it got so far."""
    inject = f"inject={call}:{ACTIONS[action].format(number)}"
    command = ["strace", "-f", "-qq", "-e", f"trace={call}", "-e", inject]
    result = subprocess.run(
        [*command, sys.executable, "-c", REPLACE, bundle, output], capture_output=True, env=ENVIRONMENT
    )
    return result.returncode != 0 or b"INJECTED" in result.stderr


ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def place(name: str, folder: Path) -> Iterator[Path]:
    """Make an output folder of one kind, with hidden files of the user."""
    output, is_mounted = folder / "out", name in ("mount point", "full disk")
    output.mkdir()
    if is_mounted:
        size = "16m" if name == "full disk" else "256m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", output], check=True)
    if name != "plain":
        subprocess.run(["git", "init", "--quiet", output], check=True)
        (output / ".gitattributes").write_text("*.bin filter=lfs\n")
    if name == "symlink":
        (folder / "link").symlink_to(output)
    try:
        yield folder / "link" if name == "symlink" else output
    finally:
        if is_mounted:
            subprocess.run(["umount", output], check=True)


def count(place_name: str, action: str, old: Path, new: Path) -> tuple[int, int, int, int]:
    """Count interruptions: all, in the middle of the replacement, with lost user files, with unusable bundles."""
    tried = middle = lost = unusable = 0
    expected = digests(old), digests(new)
    with tempfile.TemporaryDirectory(prefix="interruptions-") as folder, place(place_name, Path(folder)) as output:
        replace(old, output)
        before = user_files(output)
        for call in CALLS:
            for number in itertools.count(1):
                if not replace_until(action, call, number, new, output):
                    break
                tried += 1
                if (found := digests(output)) not in expected:
                    middle += 1
                    assert PARTS["language_model"] not in found, "other engines would load this mixture"
                    OVModelForLlavaMPT.from_pretrained(output, compile=False)
                unusable += digests(output) not in expected
                lost += user_files(output) != before
                replace(old, output)
                unusable += digests(output) != expected[0]
                lost += user_files(output) != before
    return tried, middle, lost, unusable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="BUNDLE")
    parser.add_argument("new", type=Path, metavar="ANOTHER_BUNDLE")
    parser.add_argument("--places", nargs="+", default=["plain", "git", "symlink", "mount point", "full disk"])
    parser.add_argument("--actions", nargs="+", default=list(ACTIONS), choices=list(ACTIONS))
    args = parser.parse_args()
    print(
        "| output | stopped by | tried | in the middle | user's files lost | bundles unusable |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for name, action in itertools.product(args.places, args.actions):
        if name in ("mount point", "full disk") and os.geteuid() != 0:
            print(f"| {name} | only root can mount | | | | |")
            continue
        print(f"| {name} | {action} | {' | '.join(map(str, count(name, action, args.old, args.new)))} |", flush=True)


if __name__ == "__main__":
    main()
