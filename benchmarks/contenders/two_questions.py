"""Ask one contender two questions about the same image, and print times to the first token as JSON in the last line.

    cd benchmarks && python -m contenders.two_questions JOB.json

`JOB.json` holds a [`Job`], and in `questions` the two prompts. `prompt` is a text without an image. It is answered
first, so that kernels and weights are prepared.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from contenders import MODULES, Job
from contenders.__main__ import random_image


def main() -> None:
    """Run the command."""
    values = json.loads(Path(sys.argv[1]).read_text())
    questions, job = values.pop("questions"), Job(**values)
    contender = importlib.import_module(f"contenders.{MODULES[job.contender]}").load(job)
    if job.contender == "ours":
        contender.model.generate(**contender.processor(text=job.prompt, return_tensors="pt"), max_new_tokens=2)
    else:
        contender.pipeline.generate(job.prompt, max_new_tokens=2, apply_chat_template=False)
    image = random_image(0, job.image_size)
    answers = []
    for question in questions:
        answers.append(contender.answer(question, [image], job.new_tokens))
        print(f"first token after {answers[-1].first_token_seconds:.2f} s", file=sys.stderr, flush=True)
    first, second = answers
    token_seconds = (first.seconds - first.first_token_seconds) / (job.new_tokens - 1)
    print(
        json.dumps(
            {
                "first": first.first_token_seconds,
                "second": second.first_token_seconds,
                "token_ms": 1000 * token_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
