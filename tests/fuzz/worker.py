"""The process that tries things. It says on a pipe what it is about to do, so that whoever watches it knows what ended it.

    python -m fuzz.worker <descriptor of the pipe> <seed> <folder> <bundle>

It reads lines of `target number` from standard input, and writes lines of JSON.
"""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

from fuzz.rule import BrokenRuleError
from fuzz.targets import make_targets


def main() -> None:
    pipe, seed, folder, bundle = sys.argv[1:]
    stream = os.fdopen(int(pipe), "w", buffering=1)

    def tell(**what):
        stream.write(json.dumps(what) + "\n")

    targets = make_targets(Path(folder), Path(bundle))
    tell(ready=True)
    for line in sys.stdin:
        name, number = line.split()
        counts: Counter = Counter()

        def note(what: str, counts: Counter = counts) -> None:
            counts["tried"] += 1
            tell(trying=what)

        try:
            targets[name].run(int(number), seed, note, counts)
            finding = None
        except BrokenRuleError as error:
            finding = "".join(traceback.format_exception(error))
        except Exception:  # in the campaign itself, or an answer that is not as it should be
            finding = traceback.format_exc()
        tell(counts=counts, finding=finding)


if __name__ == "__main__":
    main()
