"""Count exact answers of the example model in held-out conversations.

    python examples/shapes/evaluate.py --num 400

Every answer is generated greedily, in a conversation that contains the model's own earlier answers. It counts if it is
exactly the right answer.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.models.llava import LlavaMptForConditionalGeneration
from optimum_llava_ov.samples.shapes import KINDS, SYSTEM_TURN, assistant_turn, held_out, user_turn


class TorchChat:
    """Chat with a checkpoint in torch.

    Args:
        folder: Folder of an original checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.model = LlavaMptForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        checkpoint = OriginalCheckpoint.open(folder)
        self.tokenizer = checkpoint.tokenizer
        self.processor = CLIPImageProcessorPil(**checkpoint.image_processor)
        vision = checkpoint.config.vision_config
        self.image_length = (vision.image_size // vision.patch_size) ** 2 + checkpoint.config.num_border_tokens
        self.start()

    def start(self) -> None:
        """Begin a new conversation."""
        self.text, self.pixel_values = SYSTEM_TURN, []

    def ask(self, question: str, images: list[Image.Image]) -> str:
        self.text += user_turn(question, len(images))
        # One by one, because images have different sizes
        self.pixel_values += [self.processor(image, return_tensors="pt")["pixel_values"] for image in images]
        inputs = self.tokenizer(self.text.replace("<image>", "<image>" * self.image_length), return_tensors="pt")
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=torch.cat(self.pixel_values) if self.pixel_values else None,
            do_sample=False,
            max_new_tokens=32,
        )
        answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.text += assistant_turn(answer)
        return answer


def evaluate(chat: TorchChat, num: int, seed: int = 0) -> tuple[Counter, Counter, list[tuple[str, str, str]]]:
    """Ask all questions of `num` held-out conversations.

    Returns:
        The number of questions and of right answers by kind, and question, answer and right answer if these differ.
    """
    asked, right, wrong = Counter(), Counter(), []
    for turns in tqdm(held_out(num, seed), total=num):
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
    parser.add_argument(
        "--model", type=Path, default=Path(__file__).parent / "checkpoint", help="folder of the checkpoint"
    )
    parser.add_argument(
        "--num",
        type=int,
        default=400,
        help="number of conversations, with three questions on average (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print up to N wrong answers")
    args = parser.parse_args()

    start = time.time()
    asked, right, wrong = evaluate(TorchChat(args.model), args.num, args.seed)
    print("| kind | questions | exact answers |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {asked[kind]} | {right[kind] / max(1, asked[kind]):.1%} |")
    print(f"| **all** | {asked.total()} | {right.total() / asked.total():.1%} |")
    print(f"\n{time.time() - start:.0f} s")
    for question, answer, expected in wrong[: args.show_wrong]:
        print(f"{question}  {answer}  [{expected}]")


if __name__ == "__main__":
    main()
