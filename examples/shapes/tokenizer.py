"""Build the tokenizer of the example model."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from optimum_llava_ov.samples.shapes import SYSTEM_TURN, conversation


END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
ADDED_TOKENS = ("<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>", "<im_end>")


def build_tokenizer(num_conversations: int = 2000) -> Tokenizer:
    """Train byte-level BPE as in GPT-NeoX on the vocabulary of the conversations. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [SYSTEM_TURN.removeprefix("<|im_start|>").removesuffix("<|im_end|>")] * 50
    for index in range(num_conversations):
        for turn in conversation(f"vocabulary/{index}"):
            texts += [f"user\n{turn.question}", f"assistant\n{turn.answer}"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS])
    return tokenizer
