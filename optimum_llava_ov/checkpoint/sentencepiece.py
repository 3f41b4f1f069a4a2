"""Build a fast tokenizer from `tokenizer.model`, with the ids that the original LLaVA code feeds to the model.

The original tokenizes each text between two images separately (`tokenizer_image_token` in `llava/mm_utils.py`). It
uses the slow tokenizer of transformers, or the fast one if the language model is Mistral. Each text then begins with
the dummy prefix of SentencePiece, a space. Here one tokenizer reads the whole prompt, and rules of its normalizer
write the prefixes and BOS into the text. So the ids do not depend on `add_special_tokens`, and `export/tokenizers.py`
can convert the rules to OpenVINO unchanged.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tokenizer import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


_SPACE = "▁"  # how SentencePiece writes a space
# transformers appends those that the vocabulary lacks, in this order
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_TOKENIZER_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type` of `sentencepiece_model.proto`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """
    Attributes:
        pieces (`list[Piece]`): the vocabulary; a piece's index is its id.
        add_dummy_prefix (`bool`): whether SentencePiece writes a space before each text.
    """

    pieces: list[Piece]
    add_dummy_prefix: bool

    @classmethod
    def read(cls, file: Path) -> SentencePieceModel:
        """Read `tokenizer.model`. The `sentencepiece` package is not needed.

        Raises:
            [`InvalidCheckpointError`]: the file is damaged, or is not a SentencePiece model.
            [`UnsupportedCheckpointError`]: the model is not BPE with bytes for unknown characters, or it changes the
                text before it splits it.
        """
        try:
            pieces: list[Piece] = []
            trainer: dict[int, Any] = {}
            normalizer: dict[int, Any] = {}
            for number, value in _fields(file.read_bytes()):
                if number == _MODEL_PIECES:
                    pieces.append(_piece(dict(_fields(value))))
                elif number == _MODEL_TRAINER:  # protobuf merges a message that occurs twice
                    trainer.update(_fields(value))
                elif number == _MODEL_NORMALIZER:
                    normalizer.update(_fields(value))
            _check_model(file, pieces, trainer, normalizer)
        except (ValueError, TypeError, AttributeError, KeyError, struct.error) as error:
            if isinstance(error, (InvalidCheckpointError, UnsupportedCheckpointError)):
                raise
            raise InvalidCheckpointError(
                f"{file} ({file.stat().st_size:,} bytes) is damaged, or is not a SentencePiece model ({error}). "
                "Expected the file that the checkpoint's own repository has under this name; download it again."
            ) from error
        return cls(pieces, bool(normalizer.get(_NORMALIZER_ADD_DUMMY_PREFIX, True)))

    def merges(self) -> list[tuple[str, str]]:
        """List the pairs of pieces that BPE joins. The pairs that make the piece with the highest score come first."""
        ids = {piece.text: index for index, piece in enumerate(self.pieces) if piece.type is PieceType.NORMAL}
        merges = []
        for text, index in ids.items():
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
            merges += [(-self.pieces[index].score, index, ids[left], ids[right], left, right) for left, right in known]
        return [(left, right) for *_, left, right in sorted(merges)]

    def texts(self, piece_type: PieceType) -> list[str]:
        return [piece.text for piece in self.pieces if piece.type is piece_type]


# Numbers of the fields in `sentencepiece_model.proto`
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_SUFFIX_SPACE, _TRAINER_BYTE_FALLBACK = 3, 24, 35
_NORMALIZER_CHARSMAP, _NORMALIZER_ADD_DUMMY_PREFIX, _NORMALIZER_REMOVE_SPACES, _NORMALIZER_ESCAPE_SPACES = 2, 3, 4, 5

_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of one protobuf message. Values that are not integers are `bytes`."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        value: int | bytes
        if wire_type == 0:
            integer, position = _varint(data, position)
            yield number, integer
        else:
            if wire_type == 2:
                size, position = _varint(data, position)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type} at byte {position}")
            if position + size > len(data):
                raise ValueError(f"it ends within a field of {size:,} bytes")
            value = data[position : position + size]
            position += size
            yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"no number at byte {position}")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _piece(fields: dict[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(_PIECE_SCORE, bytes(4)))
    return Piece(fields[_PIECE_TEXT].decode(), score, PieceType(fields.get(_PIECE_TYPE, PieceType.NORMAL)))


def _check_model(file: Path, pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any]) -> None:
    if not pieces:
        raise ValueError("it has no pieces")
    if not trainer or not normalizer:
        raise ValueError("it ends before it says how it was trained")
    texts = [piece.text for piece in pieces]
    if len(set(texts)) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"the piece {twice!r} is there twice")

    model_type = trainer.get(_TRAINER_MODEL_TYPE, 1)
    if (unknown := sum(piece.type is PieceType.UNKNOWN for piece in pieces)) != 1:
        raise ValueError(f"it has {unknown} pieces for what is unknown, expected 1")
    problems = []
    if model_type != _BPE:
        problems.append(f"it is a {_MODEL_TYPES.get(model_type, model_type)} model (supported: BPE)")
    if not trainer.get(_TRAINER_BYTE_FALLBACK):
        problems.append("it has no bytes for unknown characters (byte_fallback)")
    if trainer.get(_TRAINER_SUFFIX_SPACE):
        problems.append("it puts spaces at the end of words (treat_whitespace_as_suffix)")
    if normalizer.get(_NORMALIZER_CHARSMAP):
        problems.append("it changes characters (precompiled_charsmap; supported: the identity)")
    if normalizer.get(_NORMALIZER_REMOVE_SPACES, True):
        problems.append("it removes spaces (remove_extra_whitespaces)")
    if not normalizer.get(_NORMALIZER_ESCAPE_SPACES, True):
        problems.append("it does not write spaces as '▁' (escape_whitespaces)")
    if any(piece.type is PieceType.UNUSED for piece in pieces):
        problems.append("it has pieces that are not in use")
    if problems:
        raise UnsupportedCheckpointError(
            f"{file} is not a SentencePiece model as LLaMA, Vicuna, Mistral and Yi have it: {'; '.join(problems)}. "
            "Its ids would be wrong, so nothing was converted. If the checkpoint should be of that kind, take "
            "tokenizer.model from its language model."
        )


@dataclass(frozen=True)
class _Settings:
    """Settings in the JSON files beside `tokenizer.model`, with the defaults and the precedence of transformers 4.37.

    Attributes:
        special (`dict[str, str]`): texts of special tokens, by their names in transformers (`bos_token`, ...).
        additional (`list[str]`): special tokens without a name.
        added (`dict[int, AddedToken]`): tokens that the files give an id, by this id.
        legacy (`bool`): whether texts get a dummy prefix after special tokens as well.
        add_bos (`bool`): whether a prompt begins with BOS.
    """

    special: dict[str, str]
    additional: list[str]
    added: dict[int, AddedToken]
    legacy: bool
    add_bos: bool

    @property
    def all_special(self) -> list[str]:
        names = [self.special[name] for name in _SPECIAL_TOKENS if name in self.special]
        return list(dict.fromkeys(names + self.additional))

    @classmethod
    def read(cls, repository: Repository) -> _Settings:
        config = _read_json(repository, "tokenizer_config.json")
        if (name := config.get("tokenizer_class")) not in _TOKENIZER_CLASSES:
            raise UnsupportedCheckpointError(
                f"tokenizer_config.json of {repository.name!r} names the class {name!r}, expected LlamaTokenizer. If "
                "the language model is a LLaMA or Mistral, take the tokenizer's files from its own repository."
            )
        if config.get("add_eos_token"):
            raise UnsupportedCheckpointError(
                f"tokenizer_config.json of {repository.name!r} has add_eos_token=true, so that each prompt would end "
                "with the end of the text. Expected false: set it to false, it is a setting of training."
            )
        if "added_tokens_decoder" not in config:
            # Saved by transformers before 4.34: another file takes precedence
            config = {**config, **_read_json(repository, "special_tokens_map.json")}
        added = _read_added(repository, config)
        named = {name: config.get(name) or _DEFAULTS.get(name) for name in _SPECIAL_TOKENS}
        tokens = {name: token for name, token in named.items() if token is not None}
        additional = config.get("additional_special_tokens") or []
        for token in [*added.values(), *tokens.values(), *additional]:
            _check_token(repository, token)
        special = {name: _text(token) for name, token in tokens.items() if token is not None}
        additional = [_text(token) for token in additional]
        all_special = {*special.values(), *additional}
        return cls(
            special,
            additional,
            {
                token_id: _added(token["content"], token.get("special") or token["content"] in all_special)
                for token_id, token in added.items()
            },
            # transformers takes true if it is absent, and warns of "the default legacy behaviour"
            legacy=config.get("legacy") is not False,
            add_bos=config.get("add_bos_token") is not False,
        )


def _read_json(repository: Repository, name: str) -> dict[str, Any]:
    file = repository.get(name)
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidCheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise InvalidCheckpointError(
            f"{file} holds a {type(values).__name__}, expected a JSON object. Download it again."
        )
    return values


def _read_added(repository: Repository, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the descriptions of the tokens that a file gives an id, by this id."""
    try:
        if "added_tokens_decoder" in config:
            return {int(token_id): dict(token) for token_id, token in config["added_tokens_decoder"].items()}
        tokens = _read_json(repository, "added_tokens.json")
        return {int(token_id): {"content": text} for text, token_id in tokens.items()}
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidCheckpointError):
            raise
        raise InvalidCheckpointError(
            f"The added tokens of {repository.name!r} are not given as ids and tokens ({error}): "
            "`added_tokens_decoder` of tokenizer_config.json, or added_tokens.json. Download these files again."
        ) from error


def _check_token(repository: Repository, token: str | dict[str, Any]) -> None:
    if isinstance(token, str):
        return
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise InvalidCheckpointError(
            f"The tokenizer files of {repository.name!r} describe a token as {token!r}; expected a text, or an object "
            "with `content`. Download them again."
        )
    for option in ("lstrip", "rstrip", "single_word"):
        if token.get(option):
            raise UnsupportedCheckpointError(
                f"The token {token['content']!r} of {repository.name!r} has {option}=true (supported: false): "
                "prompts would get other ids than in the original."
            )


def _text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _added(text: str, special: bool = True) -> AddedToken:
    # `normalized=True`: the rules then see the whole text before it is split at these tokens
    return AddedToken(text, special=special, normalized=True)


def load_sentencepiece_tokenizer(
    repository: Repository, fast: bool = False, use_im_patch: bool = True, use_im_start_end: bool = False
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a LLaMA or Mistral checkpoint. `<image>` gets the first id after all others.

    The ids are those of the original's `tokenizer_image_token` on transformers 4.37, where `<image>` is -200. Both
    engines need two differences:

    - A text that begins with BOS does not get a second one.
    - A text that is exactly one special token does not get BOS: `encode("<image>")` is one id.

    Args:
        repository: folder or model id that has `tokenizer.model`. For an adapter, that of its base model.
        fast: whether the original uses the fast tokenizer, as it does for Mistral. The fast one ignores
            `legacy: false`.
        use_im_patch: `mm_use_im_patch_token` of the checkpoint (true if it is absent): adds `<im_patch>`.
        use_im_start_end: `mm_use_im_start_end`: adds `<im_start>` and `<im_end>`.

    Raises:
        [`InvalidCheckpointError`]: a file is missing or damaged, or the files do not fit each other.
        [`UnsupportedCheckpointError`]: the ids would not be the original's.
    """
    model = SentencePieceModel.read(
        repository.require("tokenizer.model", "it is the vocabulary of LLaMA and Mistral models")
    )
    settings = _Settings.read(repository)
    image_tokens = [IM_PATCH_TOKEN] * use_im_patch + [IM_START_TOKEN, IM_END_TOKEN] * use_im_start_end
    splits = _split_tokens(settings, image_tokens)

    tokenizer = Tokenizer(
        BPE(
            {piece.text: index for index, piece in enumerate(model.pieces)},
            model.merges(),
            unk_token=model.texts(PieceType.UNKNOWN)[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _add_tokens(repository, tokenizer, settings, splits, model.texts(PieceType.USER_DEFINED))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(pattern), content)
            for pattern, content in _rules(model, settings, list(splits), image_tokens, fast)
        ]
        + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: settings.special[name] for name in ("bos_token", "eos_token", "unk_token")},
        pad_token=settings.special.get("pad_token", settings.special["unk_token"]),
        # A decoder continues the last token of a sequence, so padding goes before the first.
        padding_side="left",
        truncation_side="left",
        # The original's value is a setting of training. The model's limit is `max_position_embeddings`.
        model_max_length=int(1e30),
        clean_up_tokenization_spaces=False,
    )


def _split_tokens(settings: _Settings, image_tokens: list[str]) -> dict[str, AddedToken]:
    """Return all tokens at which the original splits a text. Those not in the vocabulary get ids in this order."""
    tokens = {token.content: token for _, token in sorted(settings.added.items())}
    for text in [*settings.all_special, *image_tokens, IMAGE_TOKEN]:
        tokens.setdefault(text, _added(text))
    return tokens


def _add_tokens(
    repository: Repository,
    tokenizer: Tokenizer,
    settings: _Settings,
    splits: dict[str, AddedToken],
    user_defined: list[str],
) -> None:
    """Add the tokens: first those of the vocabulary, so that the others get the ids after it, and `<image>` last.

    Raises:
        [`InvalidCheckpointError`]: a token gets another id than the files give it.
        [`UnsupportedCheckpointError`]: the tokenizer already has `<image>`.
    """
    size = tokenizer.get_vocab_size()
    tokens = [token for text, token in splits.items() if text != IMAGE_TOKEN]
    tokenizer.add_tokens([_added(text, special=False) for text in user_defined if text not in splits])
    tokenizer.add_tokens(sorted(tokens, key=lambda token: tokenizer.token_to_id(token.content) is None))
    for token_id, token in settings.added.items():
        if token.content != IMAGE_TOKEN and (found := tokenizer.token_to_id(token.content)) != token_id:
            raise InvalidCheckpointError(
                f"The tokenizer files of {repository.name!r} give {token.content!r} the id {token_id}, but after the "
                f"{size:,} pieces of tokenizer.model it is {found}. These files are not of one checkpoint; download "
                "them again."
            )

    if tokenizer.token_to_id(IMAGE_TOKEN) is not None or IMAGE_TOKEN in {
        token.content for token in settings.added.values()
    }:
        raise UnsupportedCheckpointError(
            f"{IMAGE_TOKEN!r} is already a token of the tokenizer of {repository.name!r}, expected it to be free."
        )
    tokenizer.add_tokens([splits[IMAGE_TOKEN]])


def _rules(
    model: SentencePieceModel, settings: _Settings, splits: list[str], image_tokens: list[str], fast: bool
) -> list[tuple[str, str]]:
    """Return regular expressions without width, each with the text to write where it matches: BOS or a dummy prefix.

    The syntax is common to Oniguruma (`tokenizers`) and PCRE2 (OpenVINO). No rule matches a text that is exactly one
    token, because `tokenizers` normalizes the tokens themselves as well.
    """
    rules = []
    lone = rf"(?!(?:{_any_of([*splits, *model.texts(PieceType.USER_DEFINED)])})\z)"
    start = rf"\A{lone}"
    if settings.add_bos:
        bos = re.escape(settings.special["bos_token"])
        rules.append((rf"\A(?!{bos}){lone}", settings.special["bos_token"]))
        start = rf"(?<=\A{bos})"

    if fast or settings.legacy:
        # The original tokenizes each text between two tokens separately.
        # The fast tokenizer ignores `add_dummy_prefix` of the model.
        has_prefix, before, after = fast or model.add_dummy_prefix, splits, splits
    else:
        # The original tokenizes only the texts between two images separately. Added tokens that are not special get a
        # prefix as words do. A token for images is not special if a file gives it an id.
        saved = {token.content for token in settings.added.values()}
        special = [token for token in [*image_tokens, IMAGE_TOKEN] if token not in saved]
        has_prefix, before, after = True, [IMAGE_TOKEN], [*settings.all_special, *special]
    if has_prefix:
        rules.append((rf"(?:{start}|(?<={_any_of(before)}))(?!{_any_of(after)}|\z)", _SPACE))
    return rules


def _any_of(texts: list[str]) -> str:
    return "|".join(re.escape(text) for text in texts)
