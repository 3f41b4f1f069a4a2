"""Ask a bundle of the shapes model about an image: `python examples/quickstart.py BUNDLE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlava


IMAGES = Path(__file__).parent / "shapes" / "pictures"


def main(bundle: str) -> int:
    """Print an answer to each of the sample questions. Return the number of wrong answers."""
    model = OVModelForLlava.from_pretrained(bundle)
    processor = AutoProcessor.from_pretrained(bundle)
    wrong = 0
    for sample in json.loads((IMAGES / "questions.json").read_text()):
        images = [Image.open(IMAGES / name) for name in sample["images"]]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": sample["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=30)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wrong += answer != sample["answer"]
        print(f"{', '.join(sample['images'])}: {sample['question']}  ->  {answer}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
