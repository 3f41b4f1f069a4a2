"""Load the checkpoint's tokenizer, and add the one token that it lacks: `<image>`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.options import MAX_INDEX_BYTES, MAX_TOKENIZER_BYTES, read_json, shown
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


IMAGE_TOKEN = "<image>"
IM_PATCH_TOKEN = "<im_patch>"
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"
# A turn begins and ends with these tokens of ChatML
TURN_START_TOKEN, TURN_END_TOKEN = "<|im_start|>", "<|im_end|>"


def load_bpe_tokenizer(repository: Repository, use_im_start_end: bool = False) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer, `tokenizer.json`, and give `<image>` the first id after those of the checkpoint.

    The original splits the prompt at `<image>` and writes -200 between the pieces. A special token splits a prompt in
    the same way.

    Args:
        repository: repository of the checkpoint.
        use_im_start_end: whether `<im_start>` and `<im_end>` must be tokens.

    Raises:
        [`InvalidCheckpointError`]: a file is missing or damaged, or the tokenizer lacks a token.
        [`UnsupportedCheckpointError`]: the tokenizer is of another type, or already has `<image>`.
    """
    tokenizer_file = repository.require("tokenizer.json", "original LLaVA-MPT checkpoints ship a fast tokenizer")
    config_file = repository.get("tokenizer_config.json")
    values = read_json(tokenizer_file, MAX_TOKENIZER_BYTES)
    tokenizer = _read_tokenizer(tokenizer_file, values, _special_tokens(config_file) if config_file else {})
    _check_special_tokens(repository, tokenizer, use_im_start_end)
    _check_ids(tokenizer_file, values, tokenizer)
    num_tokens = len(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id != num_tokens:
        raise UnsupportedCheckpointError(
            f"{IMAGE_TOKEN!r} is already a token of this tokenizer (id {image_token_id}), expected it to be free."
        )
    return tokenizer


def fill_in_token_ids(repository: Repository, config: OriginalLlavaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the ids of the tokenizer into a configuration, and check that both are of one checkpoint.

    A vocabulary that is padded to more than the tokenizer's length is cut to this length, as the original does when it
    loads a checkpoint (`llava/model/builder.py`: `resize_token_embeddings(len(tokenizer))`). `vocab_size` becomes the
    number of the tokenizer's tokens, `<image>` included. `padded_vocab_size` becomes the checkpoint's `vocab_size`.

    Raises:
        [`InvalidCheckpointError`]: the tokenizer has tokens without an embedding. `<im_patch>`, which no prompt has,
            may be one.
    """
    vocabulary = tokenizer.get_vocab()
    config.image_token_id = vocabulary[IMAGE_TOKEN]
    if config.mm_use_im_start_end:
        config.im_start_token_id, config.im_end_token_id = vocabulary[IM_START_TOKEN], vocabulary[IM_END_TOKEN]
    config.padded_vocab_size, config.vocab_size = config.vocab_size, len(tokenizer)
    unknown = {token for token, index in vocabulary.items() if config.padded_vocab_size <= index}
    if unknown - {IMAGE_TOKEN, IM_PATCH_TOKEN}:
        raise InvalidCheckpointError(
            f"The tokenizer of {repository.name!r} has {len(tokenizer) - 1} tokens, the model only "
            f"{config.padded_vocab_size} (vocab_size): these files are not of one checkpoint."
        )


def _check_special_tokens(repository: Repository, tokenizer: PreTrainedTokenizerFast, use_im_start_end: bool) -> None:
    needed = [TURN_START_TOKEN, TURN_END_TOKEN] + ([IM_START_TOKEN, IM_END_TOKEN] if use_im_start_end else [])
    for token in needed:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise InvalidCheckpointError(
                f"{token!r} is not a token of the tokenizer of {repository.name!r}, but its prompts are written with "
                "it. Take tokenizer.json from the checkpoint's own repository."
            )


def _check_ids(file: Path, values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Check the ids of added tokens. The library numbers them after the vocabulary and ignores the ids in the file."""
    for token in values.get("added_tokens") or ():
        if tokenizer.convert_tokens_to_ids(token["content"]) != token["id"]:
            raise InvalidCheckpointError(
                f"{file} gives the added token {shown(token['content'])} the id {token['id']}, but the tokens before "
                "it are not all there. Take it from the checkpoint's own repository."
            )


def _special_tokens(config_file: Path) -> dict[str, str]:
    """Read only the special tokens of `tokenizer_config.json`: it may name code (`auto_map`, `tokenizer_class`)."""
    settings = read_json(config_file, MAX_INDEX_BYTES)
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not (isinstance(text, str) and _is_unicode(text)):
            raise InvalidCheckpointError(
                f"{config_file} has {name}={shown(token)}, expected the text of a token. Take it from the "
                "checkpoint's own repository."
            )
        if text:
            tokens[name] = text
    return tokens


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates. JSON allows them, but files and tokenizers do not."""
    return not re.search("[\ud800-\udfff]", text)


def _read_tokenizer(file: Path, values: dict[str, Any], tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """
    Raises:
        [`InvalidCheckpointError`]: the file does not load, or does not have all of `tokens`.
        [`UnsupportedCheckpointError`]: the tokenizer is not byte-pair encoding (BPE), as GPT-NeoX's is.
    """
    model = values.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in (None, "BPE"):  # `None`: an old file, from when BPE was the only type
        raise UnsupportedCheckpointError(
            f"{file} is a tokenizer of the type {shown(kind)}, expected 'BPE', as the original LLaVA-MPT has."
        )
    eos_token = tokens.get("eos_token", "<|endoftext|>")
    tokens = dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), eos_token) | tokens
    try:
        vocabulary = Tokenizer.from_file(str(file))
        for name, token in tokens.items():
            if vocabulary.token_to_id(token) is None:
                raise InvalidCheckpointError(
                    f"{file} does not know the token {shown(token)}, which tokenizer_config.json names as {name}. "
                    "Take both files from the checkpoint's own repository."
                )
        return PreTrainedTokenizerFast(
            tokenizer_object=vocabulary,
            **tokens,
            # A decoder continues the last token of a sequence, so padding goes before the first.
            padding_side="left",
            truncation_side="left",
            # The original says 2048. It is not a limit here: ALiBi is computed for any length.
            model_max_length=int(1e30),
            clean_up_tokenization_spaces=False,
            add_prefix_space=False,
        )
    except (InvalidCheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is not an `Exception`
        raise InvalidCheckpointError(
            f"{file} is not a tokenizer that loads ({error}). Take it from the checkpoint's own repository, or "
            "download it again."
        ) from error
