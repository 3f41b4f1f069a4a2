"""The checkpoint's tokenizer, with the one token it lacks: `<image>`."""

from __future__ import annotations

import json

from transformers import AddedToken, PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.config import LlavaMptConfig
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


IMAGE_TOKEN = "<image>"
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"
# ChatML's, with which a turn begins and ends
TURN_START_TOKEN, TURN_END_TOKEN = "<|im_start|>", "<|im_end|>"


def load_tokenizer(repository: Repository, config: LlavaMptConfig) -> PreTrainedTokenizerFast:
    """Tokenizer that knows `<image>`, under the first id after those of the checkpoint.

    The original splits the prompt at `<image>` and writes -200 between the pieces. A special token splits a prompt in just the
    same way. `image_token_id`, `im_start_token_id`, `im_end_token_id` and `eos_token_id` of `config` are filled in.

    A vocabulary padded past the tokenizer is cut to it, as the original does when it loads a checkpoint (`llava/model/builder.py`:
    `resize_token_embeddings(len(tokenizer))`): `vocab_size` becomes the tokenizer's, `<image>` included; `padded_vocab_size` the
    checkpoint's.
    """
    tokenizer_file = repository.require("tokenizer.json", "original LLaVA-MPT checkpoints ship a fast tokenizer")
    config_file = repository.get("tokenizer_config.json")
    settings = json.loads(config_file.read_text()) if config_file else {}
    eos_token = _text(settings.get("eos_token")) or "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=_text(settings.get("bos_token")) or eos_token,
        eos_token=eos_token,
        unk_token=_text(settings.get("unk_token")) or eos_token,
        pad_token=_text(settings.get("pad_token")) or eos_token,
        # A decoder continues the last token of a row, so padding goes before the first.
        padding_side="left",
        truncation_side="left",
        # 2048 in the original, and not a limit here: ALiBi is computed for any length.
        model_max_length=int(1e30),
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    _check_special_tokens(repository, tokenizer, config)
    if config.mm_use_im_start_end:
        config.im_start_token_id, config.im_end_token_id = tokenizer.convert_tokens_to_ids([IM_START_TOKEN, IM_END_TOKEN])

    if len(tokenizer) > config.vocab_size:
        raise InvalidCheckpointError(
            f"The tokenizer of {repository.name!r} has {len(tokenizer)} tokens, the model only {config.vocab_size} (vocab_size): "
            "these files are not of one checkpoint."
        )
    num_tokens = len(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if config.image_token_id != num_tokens:
        raise UnsupportedCheckpointError(
            f"{IMAGE_TOKEN!r} is already a token of this tokenizer (id {config.image_token_id}), expected it to be free."
        )
    config.padded_vocab_size, config.vocab_size = config.vocab_size, len(tokenizer)
    # An answer ends with the turn. Some loaders of a bundle read only the tokenizer's one end, which must be this one.
    config.eos_token_id = [tokenizer.convert_tokens_to_ids(TURN_END_TOKEN), tokenizer.eos_token_id]
    tokenizer.eos_token = TURN_END_TOKEN
    return tokenizer


def _check_special_tokens(repository: Repository, tokenizer: PreTrainedTokenizerFast, config: LlavaMptConfig) -> None:
    needed = [TURN_START_TOKEN, TURN_END_TOKEN] + ([IM_START_TOKEN, IM_END_TOKEN] if config.mm_use_im_start_end else [])
    for token in needed:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise InvalidCheckpointError(
                f"{token!r} is not a token of the tokenizer of {repository.name!r}, but its prompts are written with it. Take "
                "tokenizer.json from the checkpoint's own repository."
            )


def _text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
