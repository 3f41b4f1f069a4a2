"""Train the vocabularies of the example models. They ship with the checkpoints, so training does not need this.

pip install sentencepiece
python examples/shapes/tokenizer.py OUTPUT
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from optimum_llava_ov.checkpoint.conversation import MPT, VICUNA_V1
from optimum_llava_ov.samples.shapes import conversation


def build_bpe() -> Tokenizer:
    """Train byte-level BPE as in GPT-NeoX on the vocabulary of the conversations. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(f"system\n{MPT.system}", 50, "user\n", "assistant\n"), trainer)
    added = ("<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>", "<im_end>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return tokenizer


def write_sentencepiece(file: Path) -> None:
    """Train BPE as in LLaMA, with bytes for unknown characters and without a normalization."""
    import sentencepiece

    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_texts(VICUNA_V1.system, 60, "USER: ", "ASSISTANT: "),
            model_writer=stream,
            model_type="bpe",
            vocab_size=640,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=1,
        )


def _texts(system: str, repeat: int, user: str, assistant: str) -> Iterator[str]:
    """Yield the texts to train on: a system text, and the turns of conversations after the names of the roles."""
    yield from [system] * repeat
    for index in range(2000):
        for turn in conversation(f"vocabulary/{index}"):
            yield from (f"{user}{turn.question}", f"{assistant}{turn.answer}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    build_bpe().save(str(folder / "tokenizer.json"))
    write_sentencepiece(folder / "tokenizer.model")
