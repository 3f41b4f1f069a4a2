"""LLaVA's half of an original `config.json`: tower, projector and images. The language model's half is a family's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

# Not from `transformers`: this module may be imported while `transformers` itself still is
from transformers.configuration_utils import PretrainedConfig

from optimum_llava_ov.checkpoint.image_tokens import ImageTokens
from optimum_llava_ov.checkpoint.options import Rule, broken_rules, flag, integer, one_of, optional, text
from optimum_llava_ov.checkpoint.tiling import ANYRES, TILING_OPTIONS, tiling_problems


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from optimum_llava_ov.checkpoint.repository import Repository

# Larger than in any known model. A model of this size is still built in a second.
MAX_LAYERS = 512
MAX_PROJECTOR_LAYERS = 16
MAX_WIDTH = 65_536
MAX_HEADS = 1_024
MAX_VOCABULARY = 1 << 22

_DTYPES = ("float16", "bfloat16", "float32")
_PROJECTORS = ("linear", "identity", *(f"mlp{depth}x_gelu" for depth in range(MAX_PROJECTOR_LAYERS + 1)))

# LLaVA's options that are read, and the values for which our graph computes what the original does
_OPTIONS = {
    # The architecture says what the model is. Published checkpoints have several types.
    "model_type": Rule(
        lambda value: value is None or (isinstance(value, str) and len(value) <= 64),
        "absent, a name of up to 64 characters",
    ),
    "vocab_size": integer(1, MAX_VOCABULARY),
    "sep_image_conv_front": one_of(None, False),
    "use_mm_proj": one_of(None, True),
    "mm_vision_tower": optional(text()),
    "mm_hidden_size": optional(integer(1, MAX_WIDTH)),
    "mm_projector_type": Rule(
        lambda value: value is None or value in _PROJECTORS,
        f"absent, linear, identity, mlp<N>x_gelu with N up to {MAX_PROJECTOR_LAYERS}",
    ),
    "mm_resampler_type": one_of(None),
    "mm_vision_select_layer": optional(integer(-MAX_LAYERS, MAX_LAYERS)),
    "mm_vision_select_feature": one_of(None, "patch", "cls_patch"),
    "mm_use_im_start_end": optional(flag()),
    "mm_use_im_patch_token": optional(flag()),
    "image_aspect_ratio": one_of(None, "square", "pad", ANYRES),
    "unfreeze_mm_vision_tower": optional(flag()),
    "s2": one_of(None, False),  # a tower at several scales
}


class OriginalLlavaConfig(PretrainedConfig):
    """Configuration of an original LLaVA checkpoint, flat as it is on disk.

    The names are those of the original code: `mm_vision_tower`, `mm_projector_type`, `mm_vision_select_layer`, ...
    `docs/checkpoints.md` explains them. A family of language models is a subclass. It adds the names of its own
    options, and says what is true of its language models only.

    Args:
        vision_config (`CLIPVisionConfig`, *optional*):
            The vision tower's own configuration. It is in another repository, and is filled in when that is read.
        im_start_token_id, im_end_token_id (`int`, *optional*):
            Ids of `<im_start>` and `<im_end>` in the tokenizer, if the checkpoint puts them around an image.
        eos_token_id (`list[int]`, *optional*):
            Ids that end an answer: those of the conversation and the checkpoint's own end of text.
        image_token_id (`int`, *optional*):
            Id of `<image>`. The original writes -200, and its tokenizers do not have this token.
        padded_vocab_size (`int`, *optional*):
            Number of rows of the checkpoint's embedding table. `vocab_size` counts the used ones, and `<image>`.
        image_tokens (`int`, *optional*), image_token_method (`str`, *optional*):
            How the patches of an image are reduced (see [`ImageTokens`]). The original keeps them all.

    Class attributes that a family sets:
        family (`str`): name of the family in messages.
        text_model_type (`str`): type of the language model in transformers.
        original_architectures (`tuple[str, ...]`): names in `architectures` of `config.json`.
        base_architectures (`tuple[str, ...]`): the same for the language model alone.
        prefix (`str`): what the names of the language model's tensors begin with, on disk and in torch.
        table (`str`): name of the embedding table after this prefix.
        required (`tuple[str, ...]`): options that must be there.
        options (`dict[str, Rule]`): options that are read, with the values that are computed.
        vocabulary (`str`): name of the tokenizer's file with the vocabulary.
        torch_class (`str`): name of the class in `models/llava.py` that the Auto classes of transformers take.
    """

    family: ClassVar[str] = "LLaVA"
    text_model_type: ClassVar[str] = ""
    original_architectures: ClassVar[tuple[str, ...]] = ()
    base_architectures: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = "model."
    table: ClassVar[str] = "embed_tokens.weight"
    vocabulary: ClassVar[str] = "tokenizer.model"
    required: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[dict[str, Rule]] = {}
    torch_class: ClassVar[str] = "OriginalLlavaForConditionalGeneration"

    # Defaults of the original code, for options that a checkpoint may leave out
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str | None = None
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: list | str | None = None
    mm_patch_merge_type: str | None = None
    unfreeze_mm_vision_tower: bool = False
    vision_config: Any = None
    im_start_token_id: int | None = None
    im_end_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    image_token_id: int | None = None
    padded_vocab_size: int | None = None
    image_tokens: int | None = None
    image_token_method: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> OriginalLlavaConfig:
        """Take the known options of a `config.json`. Drop all others: some choose code (`_attn_implementation`)."""
        known = cls.known_options(config_dict)
        # The dtype that the Auto classes load by default. They would look up any other name in torch.
        known |= {name: config_dict[name] for name in ("dtype", "torch_dtype") if config_dict.get(name) in _DTYPES}
        return super().from_dict(known, **kwargs)

    @classmethod
    def known_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the known options of a `config.json`."""
        names = [name for name in (*_OPTIONS, *TILING_OPTIONS, *cls.options) if name != "model_type"]
        return {name: values[name] for name in names if values.get(name) is not None}

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """Describe each option of a `config.json` that is missing, or whose value our graph does not compute."""
        missing = [f"{name} is missing" for name in cls.required if values.get(name) is None]
        if missing:
            return missing
        problems = broken_rules(values, _OPTIONS | cls.options) + tiling_problems(values) + cls.nested_problems(values)
        return problems or cls.contradictions(values)  # each value is valid: check them together

    @classmethod
    def nested_problems(cls, values: dict[str, Any]) -> list[str]:  # noqa: ARG003  families read it
        """Describe values inside of options."""
        return []

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[str]:  # noqa: ARG003  families read it
        """Describe valid values that contradict each other."""
        return []

    @property
    def text_config(self) -> PretrainedConfig:
        """Configuration of the language model, with the names and defaults of transformers."""
        raise NotImplementedError

    def bundle_text_config(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the language model's half of a bundle's `config.json`, from what transformers saves."""
        return values

    def load_tokenizer(self, repository: Repository) -> PreTrainedTokenizerFast:
        """Load the tokenizer, with `<image>` as its last token.

        Raises:
            [`InvalidCheckpointError`]: a file is missing or damaged.
            [`UnsupportedCheckpointError`]: the ids would not be those of the original.
        """
        raise NotImplementedError

    @property
    def select_feature(self) -> str:
        return self.mm_vision_select_feature or "patch"

    @property
    def projector_type(self) -> str:
        return self.mm_projector_type or "linear"

    @property
    def projector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the projector, by its name after `mm_projector.`."""
        inner, outer = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.projector_type == "identity":
            return {}
        if self.projector_type == "linear":
            return {"weight": (outer, inner), "bias": (outer,)}
        depth = int(self.projector_type.removeprefix("mlp").removesuffix("x_gelu"))
        layers = {2 * index: (outer, outer if index else inner) for index in range(max(depth, 1))}
        return {f"{index}.weight": shape for index, shape in layers.items()} | {
            f"{index}.bias": shape[:1] for index, shape in layers.items()
        }

    @property
    def num_border_tokens(self) -> int:
        """Number of embeddings around the patches of one image: 2 for `<im_start>` and `<im_end>`, or 0."""
        return 2 if self.mm_use_im_start_end else 0

    @property
    def num_patches(self) -> int:
        """Number of patches that the vision tower cuts an image into."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def reduction(self) -> ImageTokens | None:
        """How the patches of an image are reduced; `None` if they are not."""
        if self.image_tokens is None or self.image_token_method is None:
            return None
        return ImageTokens(self.image_tokens, self.image_token_method)

    @property
    def num_additional_image_tokens(self) -> int:
        """Number of embeddings of one image beyond its patches: the class token if it is kept, and the borders.

        It is less than 0 if the patches are reduced: readers of bundles compute the sum.
        """
        removed = self.num_patches - self.reduction.count if self.reduction else 0
        return self.num_border_tokens + (1 if self.select_feature == "cls_patch" else 0) - removed

    @property
    def num_known_tokens(self) -> int:
        """Number of tokens that the checkpoint has an embedding for. The others get ids after these."""
        assert self.padded_vocab_size is not None  # filled in with the tokenizer
        assert self.image_token_id is not None
        return min(self.padded_vocab_size, self.image_token_id)
