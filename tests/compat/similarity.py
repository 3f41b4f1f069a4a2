"""who_what_benchmark on the shapes questions. Prints similarities as JSON.

    python similarity.py <checkpoint> <bundle in fp32> <bundle> ...

Its own questions and its text encoder are on the Hub. So the questions are ours, and the encoder is one that counts words.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import BoW
from transformers import AutoProcessor, AutoTokenizer
from whowhatbench import VisualTextEvaluator
from whowhatbench.model_loaders import load_model
from whowhatbench.wwb import genai_gen_visual_text

import optimum_llava_ov  # noqa: F401


PICTURES = Path(__file__).parent.parent.parent / "examples" / "shapes" / "pictures"
checkpoint, reference, *bundles = sys.argv[1:]
single = [case for case in json.loads((PICTURES / "questions.json").read_text()) if len(case["images"]) == 1]
questions = {
    "prompts": [case["question"] for case in single],
    "images": [Image.open(PICTURES / case["images"][0]).convert("RGB") for case in single],
    "videos": [None] * len(single),
}

with tempfile.TemporaryDirectory() as encoder:
    words = sorted(
        {word.strip(".,?") for case in single for word in f"{case['question']} {case['answer']}".lower().split()}
    )
    SentenceTransformer(modules=[BoW(vocab=words)]).save(encoder)
    AutoTokenizer.from_pretrained(reference).save_pretrained(encoder)
    evaluator = VisualTextEvaluator(
        base_model=load_model("visual-text", reference),
        tokenizer=AutoTokenizer.from_pretrained(reference),
        processor=AutoProcessor.from_pretrained(reference),
        test_data=questions,
        similarity_model_id=encoder,
        max_new_tokens=24,
        seqs_per_request=1,
    )

contenders = {"torch": (checkpoint, {"use_hf": True})}
for bundle in (reference, *bundles):
    contenders[f"GenAI, {Path(bundle).name}"] = (bundle, {"use_genai": True})
for bundle in bundles:
    contenders[f"Optimum, {Path(bundle).name}"] = (bundle, {})
similarities = {}
for name, (model, options) in contenders.items():
    generate = genai_gen_visual_text if "use_genai" in options else None
    _, metrics = evaluator.score(load_model("visual-text", model, **options), generate)
    similarities[name] = float(metrics["similarity"].iloc[0])
print(json.dumps(similarities))
