"""Count exact answers of an example model in held-out conversations.

    python examples/shapes/evaluate.py --family llama --num 400

Every answer is generated greedily, in a conversation that contains the model's own earlier answers. It counts if it is
exactly the right answer.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from families import FAMILIES, HERE
from PIL import Image
from tqdm import tqdm

from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.samples.shapes import KINDS, held_out


class TorchChat:
    """Chat with a checkpoint in torch.

    Args:
        folder: Folder of an original checkpoint.
        options: Options of [`OriginalCheckpoint.open`].
    """

    def __init__(self, folder: str | Path, **options):
        checkpoint = OriginalCheckpoint.open(folder, **options)
        self.model = OriginalLlavaForConditionalGeneration.from_checkpoint(checkpoint, dtype=torch.float32)
        self.processor = build_processor(checkpoint)
        self.start()

    def start(self) -> None:
        """Begin a new conversation."""
        self.messages, self.images = [], []

    def ask(self, question: str, images: list[Image.Image]) -> str:
        self.images += images
        self._add("user", [{"type": "image"} for _ in images], question)
        prompt = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=self.images or None, return_tensors="pt")
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=48)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self._add("assistant", [], answer)
        return answer

    def _add(self, role: str, images: list[dict], text: str) -> None:
        self.messages.append({"role": role, "content": [*images, {"type": "text", "text": text}]})


def evaluate(
    chat: TorchChat, conversations: Iterator[list[dict]], num: int
) -> tuple[Counter, Counter, list[tuple[str, str, str]]]:
    """Ask all questions of held-out conversations, of which there are `num`.

    Returns:
        The number of questions and of right answers by kind, and question, answer and right answer if these differ.
    """
    asked, right, wrong = Counter(), Counter(), []
    for turns in tqdm(conversations, total=num):
        chat.start()
        for turn in turns:
            answer = chat.ask(turn["question"], turn["images"])
            asked[turn["kind"]] += 1
            right[turn["kind"]] += answer == turn["answer"]
            if answer != turn["answer"]:
                wrong.append((turn["question"], answer, turn["answer"]))
    return asked, right, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="mpt", help="language model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=HERE, help="where train.py wrote the model (default: here)")
    parser.add_argument(
        "--num",
        type=int,
        default=400,
        help="number of conversations, with three questions on average (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print up to N wrong answers")
    args = parser.parse_args()

    start, family = time.time(), FAMILIES[args.family]
    asked, right, wrong = evaluate(
        TorchChat(args.folder / family.checkpoint), held_out(args.num, args.seed, family.held_out_scene), args.num
    )
    print("| kind | questions | exact answers |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {asked[kind]} | {right[kind] / max(1, asked[kind]):.1%} |")
    print(f"| **all** | {asked.total()} | {right.total() / asked.total():.1%} |")
    print(f"\n{time.time() - start:.0f} s")
    for question, answer, expected in wrong[: args.show_wrong]:
        print(f"{question}  {answer}  [{expected}]")


if __name__ == "__main__":
    main()
