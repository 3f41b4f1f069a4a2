"""The process that watches: it hands out numbered attempts, and notices when the worker hangs or dies."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


START_SECONDS = 300  # for imports and the first model
HANG_SECONDS = 60  # without a sign; what works is stopped by the rule's own limit long before
# OpenVINO's own files are a program to OpenVINO, which may crash on them: docs/security.md says so
NATIVE = ("bundle-bytes", "openvino_")
MAX_FINDINGS = 100  # after which nobody reads on
# How many rounds of each target make one round of the campaign, by what an attempt costs
ROUNDS = {
    "checkpoint-bytes": 24,
    "checkpoint-json": 1,
    "bundle-bytes": 19,
    "bundle-json": 1,
    "images": 4,
    "saved-conversations": 2,
    "chat-openvino": 3,
    "chat-genai": 3,
    "export": 1,
}


@dataclass
class Report:
    """What was tried, by target, and what was found."""

    counts: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in ROUNDS})
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        rows = [
            "| what | tried | right answer | refused by our errors | OpenVINO crashed | findings |",
            "| --- |" + " --- |" * 5,
        ]
        total: Counter = Counter()
        for name, counts in self.counts.items():
            total += counts
            rows.append(_row(name, counts))
        return "\n".join([*rows, _row("together", total)])


def _row(name: str, counts: Counter) -> str:
    return (
        f"| {name} | "
        + " | ".join(f"{counts[key]:,}" for key in ("tried", "right", "refused", "crashed", "findings"))
        + " |"
    )


class Worker:
    """A process that can be asked to try something."""

    def __init__(self, seed: str, folder: Path, bundle: Path):
        reader, writer = os.pipe()
        folder = Path(tempfile.mkdtemp(dir=folder))
        self.log = folder / "worker.log"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-X",
                    "faulthandler",
                    "-m",
                    "fuzz.worker",
                    str(writer),
                    seed,
                    str(folder),
                    str(bundle),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                env=environment,
                text=True,
            )
        os.close(writer)
        self._reader = reader
        self._pending = b""
        self._tell(START_SECONDS)

    def do(self, target: str, number: int) -> tuple[Counter, str | None]:
        """What was counted, and a finding if there is one. After a hang or a crash the worker is gone."""
        print(target, number, file=self.process.stdin, flush=True)
        tried, trying = 0, "nothing yet"
        while True:
            said = self._tell(HANG_SECONDS)
            if "trying" in said:
                tried, trying = tried + 1, said["trying"]
            elif "counts" in said:
                finding = said["finding"]
                return Counter(said["counts"]), finding and f"{trying}\n{finding}"
            else:
                self.process.wait()
                if (target, trying[: len(NATIVE[1])]) == NATIVE and said["end"] == "died":
                    return Counter(tried=tried, crashed=1), None
                log = self.log.read_text(errors="replace")[-5000:]
                return Counter(
                    tried=tried
                ), f"{trying}\nThe worker {said['end']} (status {self.process.returncode}):\n{log}"

    def _tell(self, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while b"\n" not in self._pending:
            if not select.select([self._reader], [], [], max(end - time.monotonic(), 0))[0]:
                self.process.send_signal(signal.SIGABRT)  # faulthandler then says where it is
                return {"end": "hung"}
            if not (data := os.read(self._reader, 1 << 16)):
                return {"end": "died"}
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        os.close(self._reader)


def run(tasks: Iterator[tuple[str, int]], seed: str, folder: Path, bundle: Path) -> Report:
    """Try what `tasks` says."""
    report, worker, begun = Report(), None, time.monotonic()
    for target, number in tasks:
        worker = worker or Worker(seed, folder, bundle)
        counts, finding = worker.do(target, number)
        if finding is not None:
            counts["findings"] += 1
            command = f"PYTHONPATH=tests python -m fuzz --seed {seed} --only {target} --number {number}"
            report.findings.append(f"{target} {number}: {finding.rstrip()}\nAgain: {command}")
            print(report.findings[-1], file=sys.stderr, flush=True)
        report.counts[target] += counts
        if worker.process.poll() is not None:
            worker.stop()
            worker = None
        if len(report.findings) == MAX_FINDINGS:
            break
    if worker is not None:
        worker.stop()
    report.seconds = time.monotonic() - begun
    return report


def rounds(names: list[str], count: int | None, seconds: float | None, first: int = 0) -> Iterator[tuple[str, int]]:
    """The attempts of a number of rounds, or of a time."""
    begun, turn = time.monotonic(), first
    while count is None or turn < first + count:
        for name in names:
            for number in range(turn * ROUNDS[name], (turn + 1) * ROUNDS[name]):
                if seconds is not None and time.monotonic() - begun > seconds:
                    return
                yield name, number
        turn += 1
