"""Read a LoRA adapter as PEFT saves it: `adapter_config.json`, and `adapter_model.safetensors` or `.bin`.

The `peft` package is not needed. The tensors of the file say which modules were trained; of the configuration only the
scale and what changes the arithmetic is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_llava_ov.checkpoint.merge import LowRank, Overlay, Replacement, Update
from optimum_llava_ov.checkpoint.names import without_peft
from optimum_llava_ov.checkpoint.options import (
    Rule,
    broken_rules,
    either,
    integer,
    list_of,
    number,
    one_of,
    optional,
    positive,
    read_json,
    shown,
    text,
)
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_tensors
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order of preference
MAX_RANK = 65_536
MAX_ALPHA = 1_000_000
_MAX_PATTERNS, _MAX_PATTERN_LENGTH = 4_096, 200
_END_OF_NAME = r"(.*\.)?({})$"  # how PEFT finds the pattern of a module


def _patterns(rule: Rule) -> Rule:
    return Rule(
        lambda value: isinstance(value, dict)
        and len(value) <= _MAX_PATTERNS
        and all(_is_pattern(name) and rule.accepts(item) for name, item in value.items()),
        f"an object of up to {_MAX_PATTERNS:,} module names or expressions, each with {rule.text}",
    )


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _MAX_PATTERN_LENGTH:
        return False
    try:
        re.compile(_END_OF_NAME.format(value))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_RANK, _ALPHA = integer(1, MAX_RANK), positive(MAX_ALPHA)
_OFF = one_of(None, False)
_NAMES = optional(either(text(), list_of(text())))

# Options that change what is merged, and the values with which the merge is what PEFT computes
_OPTIONS = {
    "peft_type": one_of("LORA"),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "use_rslora": one_of(None, False, True),
    "rank_pattern": optional(_patterns(_RANK)),
    "alpha_pattern": optional(_patterns(_ALPHA)),
    "bias": one_of(None, "none", "lora_only", "all"),
    "use_dora": _OFF,
    "use_qalora": _OFF,
    "lora_bias": _OFF,
    # The others of PEFT (pissa, olora, corda, loftq, ...) also change the base
    "init_lora_weights": one_of(None, True, False, "gaussian", "eva", "orthogonal"),
    "base_model_name_or_path": optional(text()),
    "revision": optional(text()),
    "target_modules": _NAMES,
    "modules_to_save": _NAMES,
    "lora_dropout": optional(number(0, 1)),
}
# Options that training or PEFT's own loading reads. The tensors in the file show their effect.
_NO_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip

# `.default.` and the like: the adapter's name, which PEFT leaves out of its files
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$|\d)[^.]+)?(?=\.)|\.base_layer(?=\.)")
_ORIGINAL = re.compile(r"\.original_module\.")


@dataclass(frozen=True)
class AdapterConfig:
    """
    Attributes:
        rank (`int`): columns of the matrices, unless `rank_pattern` has another number for a module.
        alpha (`float`): the scale is `alpha / rank`, unless `alpha_pattern` has another alpha for a module.
        use_rslora (`bool`): whether the scale is `alpha / sqrt(rank)`.
        rank_pattern, alpha_pattern (`dict`): by the name of a module, or an expression for the end of its name.
        base_model (`str`, *optional*): folder or model id of the base that the adapter was trained on.
        base_revision (`str`, *optional*): its revision.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None
    base_revision: str | None

    @classmethod
    def read(cls, file: Path) -> AdapterConfig:
        """Read `adapter_config.json`.

        Raises:
            [`InvalidCheckpointError`]: the file is not a JSON object, or says no scale.
            [`UnsupportedCheckpointError`]: the adapter is of another kind than LoRA, or a variant of LoRA that is
                computed in another way; names the option.
        """
        values = read_json(file)
        if values.get("peft_type") == "LORA":
            missing = [name for name in ("r", "lora_alpha") if values.get(name) is None]
            if missing:
                raise InvalidCheckpointError(
                    f"{file} has no {' and no '.join(missing)}, so the scale of the adapter (lora_alpha / r) is not "
                    "known. Take the file from the folder that the training has written."
                )
        problems = broken_rules(values, _OPTIONS)
        problems += [
            f"{name}={shown(value)} (supported: absent)"
            for name, value in values.items()
            if value and name not in _OPTIONS and name not in _NO_EFFECT
        ]
        if problems:
            raise UnsupportedCheckpointError(
                f"{file} asks for what optimum-llava-ov does not merge, and a conversion would give wrong text: "
                f"{'; '.join(problems)}. Merge the adapter with PEFT (`merge_and_unload`), and convert the result. "
                "Nothing was converted."
            )
        return cls(
            rank=values["r"],
            alpha=values["lora_alpha"],
            use_rslora=bool(values.get("use_rslora")),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            base_model=values.get("base_model_name_or_path") or None,
            base_revision=values.get("revision") or None,
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return _of_module(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of the product of a module's matrices."""
        rank = self.rank_of(module)
        return _of_module(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _of_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look up a module as PEFT does: the first expression counts that matches the end of its name."""
    for name, value in pattern.items():
        if re.match(_END_OF_NAME.format(name), module):
            return value
    return default


def adapter_file(repository: Repository) -> Path:
    """Return the path of the adapter's tensors. Download the file if necessary.

    Raises:
        [`InvalidCheckpointError`]: there is none.
    """
    for name in ADAPTER_FILES:
        if (file := repository.get(name)) is not None:
            return file
    raise InvalidCheckpointError(
        f"{repository.name!r} has {ADAPTER_CONFIG}, but none of {', '.join(ADAPTER_FILES)}: the adapter's weights are "
        "not there."
    )


def read_adapter(file: Path, config: AdapterConfig) -> list[Overlay]:
    """Map the tensors of an adapter.

    Returns:
        Two overlays: modules that were trained as a whole (`modules_to_save`, embeddings, biases), and low-rank
        updates, which are added to the first.

    Raises:
        [`InvalidCheckpointError`]: the file is damaged, a matrix has no partner, or its rank is not the
            configuration's.
        [`UnsupportedCheckpointError`]: a tensor is of a variant of LoRA that is not supported; names it.
    """
    sides: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    saved: dict[str, Update] = {}
    for key, tensor in map_tensors(file).items():
        name = without_peft(key)
        match = _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match is not None:
            pair = sides.setdefault((match["module"], match.re is _EMBEDDING), {})
            if match["side"] in pair:
                raise UnsupportedCheckpointError(
                    f"{file} has lora_{match['side']} of {match['module']} twice, expected one adapter in a file. "
                    "Save them to folders of their own, and merge them with --model-kwargs "
                    '\'{"adapters": ["<first>", "<second>"]}\'.'
                )
            pair[match["side"]] = tensor
        elif "lora_" in name:
            raise UnsupportedCheckpointError(
                f"{file} has the tensor {shown(name)}, expected lora_A, lora_B, lora_embedding_A and "
                "lora_embedding_B: it is a variant of LoRA that optimum-llava-ov does not merge. Merge the adapter "
                "with PEFT (`merge_and_unload`), and convert the result."
            )
        elif not _ORIGINAL.search(name):  # the base's own tensor beside a trained one
            saved[_SAVED.sub("", name)] = Replacement(tensor)
    updates: dict[str, Update] = {
        f"{module}.weight": _low_rank(file, config, module, pair, transposed)
        for (module, transposed), pair in sides.items()
    }
    if not updates and not saved:
        raise InvalidCheckpointError(f"{file} has no tensors. The training has saved an empty adapter.")
    return [Overlay(str(file), saved), Overlay(str(file), updates)]


def _low_rank(
    file: Path, config: AdapterConfig, module: str, pair: Mapping[str, torch.Tensor], transposed: bool
) -> LowRank:
    if len(pair) != 2:
        raise InvalidCheckpointError(
            f"{file} has only lora_{next(iter(pair))} of {module}, expected lora_A and lora_B. The file is not "
            "complete."
        )
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise UnsupportedCheckpointError(
            f"{file} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {module}, expected two matrices: only "
            "linear layers and embeddings are merged."
        )
    if a.numel() == 0:
        raise InvalidCheckpointError(
            f"{file} has an empty lora_A of {module}. DeepSpeed ZeRO-3 saves this if the parameters are not gathered "
            "first. Save the adapter again with `stage3_gather_16bit_weights_on_model_save`."
        )
    if a.shape[0] != config.rank_of(module):
        raise InvalidCheckpointError(
            f"{file} has lora_A of {module} with {a.shape[0]} rows, but {ADAPTER_CONFIG} says that its rank is "
            f"{config.rank_of(module)}. These files are not of one adapter."
        )
    return LowRank(a, b, config.scale_of(module), transposed)
