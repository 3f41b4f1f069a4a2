"""Estimate what a model needs on this machine: disk, memory and seconds.

The constants are from `docs/performance.md`: 7B and 1.3B in int4 take 5.7 and 2.0 GB of memory, with bundles of 4.70
and 1.26 GB. Their exports take 1.1 GB in fp16, and 2.4 and 1.4 GB in int4. Seconds are of two cores with AVX-512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from optimum.intel.openvino.configuration import OVPipelineQuantizationConfig
from transformers import AutoConfig, PretrainedConfig

from optimum_llava_ov.bundle.check import check_loads, check_settings
from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, ONE_BILLION, check_bundle, part_sizes
from optimum_llava_ov.bundle.settings import context_length
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, holds_original_checkpoint
from optimum_llava_ov.export.recipes import bytes_per_weight, default_recipe, recipe_for_part, recipe_of
from optimum_llava_ov.loading import OPENVINO, bundle_folder, choose_engine, located
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.table import table_lines
from optimum_llava_ov.units import readable_size


BASE_MEMORY = 0.7e9  # bytes of Python, torch, OpenVINO and buffers
COPIED = 1.05  # weights in the layout of the kernels, divided by the weights on disk
LOAD_SECONDS_PER_BYTE = 3.5e-9
TOKEN_SECONDS = 0.9e-3  # of Python and transformers between two tokens
EXPORT_MEMORY, EXPORT_MEMORY_PER_WEIGHT = 1.1e9, 0.19  # bytes; the second only if weights are compressed
EXPORT_SECONDS, EXPORT_SECONDS_PER_WEIGHT = 5, 15e-9
FORMATS = ("fp16", "int8", "int4")
RECOMMENDED = "int4"


@dataclass(frozen=True)
class Needs:
    """Estimate what a bundle needs.

    Attributes:
        weight_format (`str` or `None`): Value of `--weight-format`; `None` for a bundle that exists.
        disk (`int`): Bytes of its weights.
        memory (`int`): Bytes of memory to run it, with a cache for the whole context.
        load_seconds (`float`): Seconds to load it, first answer included.
        token_seconds (`float`): Seconds per token, if other programs are idle: each token reads all weights of the
            language model from memory once.
        export_memory, export_seconds (`int`, `float`, `None`): Memory and seconds of the export.
        fits (`bool`): Whether the memory of this machine suffices to run it.
    """

    weight_format: str | None
    disk: int
    memory: int
    load_seconds: float
    token_seconds: float
    export_memory: int | None
    export_seconds: float | None
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Say what would be chosen for a checkpoint or a bundle.

    Attributes:
        name (`str`): Folder or model id.
        kind (`str`): "bundle" or "checkpoint".
        family (`str`): Type of the language model in transformers.
        parameters (`int` or `None`): Number of weights; `None` for a bundle.
        context (`int`): Tokens that the model was trained on at a time.
        engine (`str`): What `chat` and `demo` run it with.
        conversation (`str` or `None`): How prompts are written, and why.
        recipe (`str` or `None`): What an export without `--weight-format` does.
        needs (`list[Needs]`): One for each format, or the one of the bundle.
    """

    name: str
    kind: str
    family: str
    parameters: int | None
    context: int
    engine: str
    conversation: str | None
    recipe: str | None
    needs: list[Needs]


def make_plan(name: str, memory: int, bandwidth: float) -> Plan:
    """Plan for a checkpoint or a bundle.

    Args:
        name: Folder or model id. Of a checkpoint, no weights are downloaded. A bundle is downloaded.
        memory: Bytes of memory of the machine.
        bandwidth: Bytes of memory that the machine reads in a second.

    Raises:
        `ValueError`: It is neither, or it is damaged; says what is wrong.
    """
    repository = located(name)
    if holds_original_checkpoint(repository):
        return _plan_checkpoint(name, OriginalCheckpoint.open(repository), memory, bandwidth)
    folder = bundle_folder(repository, "Expected an original LLaVA checkpoint or a bundle.")
    check_bundle(folder, tokenizers=False)
    config = check_settings(folder)
    check_loads(folder)
    text_config = AutoConfig.for_model(**config["text_config"])
    sizes = part_sizes(folder)
    needs = _needs(None, sum(sizes.values()), sizes["language_model"], text_config, True, memory, bandwidth)
    source: dict[str, Any] = config.get("converted_from") or {}
    return Plan(
        name=name,
        kind="bundle",
        family=text_config.model_type,
        parameters=None,
        context=context_length(text_config),
        engine=choose_engine(repository),
        conversation=source.get("conversation"),
        recipe=None,
        needs=[needs],
    )


def _plan_checkpoint(name: str, checkpoint: OriginalCheckpoint, memory: int, bandwidth: float) -> Plan:
    with torch.device("meta"):
        model = OriginalLlavaForConditionalGeneration(checkpoint.config)
    counts = {
        "lm_model": _count(model.language_model),
        "text_embeddings_model": _count(model.embed_tokens),
        "vision_embeddings_model": _count(model.image_encoder),
    }
    text_config, needs = checkpoint.config.text_config, []
    for weight_format in FORMATS:
        recipe = None if weight_format == "fp16" else recipe_of(default_recipe(weight_format))
        sizes = {part: int(count * _bytes(recipe, part)) for part, count in counts.items()}
        language = sizes[LANGUAGE_MODEL]
        is_compressed = recipe is not None
        found = _needs(weight_format, sum(sizes.values()), language, text_config, is_compressed, memory, bandwidth)
        total = sum(counts.values())
        extra = EXPORT_MEMORY_PER_WEIGHT * total if is_compressed else 0
        export_seconds = EXPORT_SECONDS + EXPORT_SECONDS_PER_WEIGHT * total
        needs.append(
            Needs(**{**vars(found), "export_memory": int(EXPORT_MEMORY + extra), "export_seconds": export_seconds})
        )
    is_large = counts[LANGUAGE_MODEL] >= ONE_BILLION
    return Plan(
        name=name,
        kind="checkpoint",
        family=text_config.model_type,
        parameters=sum(counts.values()),
        context=context_length(text_config),
        engine=OPENVINO,
        conversation=f"{checkpoint.choice.conversation.name} ({checkpoint.choice.reason})",
        recipe="int8 for the language model" if is_large else "not compressed",
        needs=needs,
    )


def _bytes(recipe: OVPipelineQuantizationConfig | None, part: str) -> float:
    """Return the bytes of a weight by a recipe. Without one, weights have 16 bits."""
    config = None if recipe is None else recipe_for_part(recipe, part)
    return 2 if config is None else bytes_per_weight(config)


def _needs(
    weight_format: str | None,
    disk: int,
    language_model: int,
    text_config: PretrainedConfig,
    is_compressed: bool,
    memory: int,
    bandwidth: float,
) -> Needs:
    cache = context_length(text_config) * _cache_bytes_per_token(text_config, 1 if is_compressed else 2)
    needed = int(BASE_MEMORY + COPIED * disk + cache)
    return Needs(
        weight_format=weight_format,
        disk=disk,
        memory=needed,
        load_seconds=1 + LOAD_SECONDS_PER_BYTE * disk,
        token_seconds=TOKEN_SECONDS + language_model / bandwidth,
        export_memory=None,
        export_seconds=None,
        fits=needed <= memory,
    )


def _cache_bytes_per_token(text_config: PretrainedConfig, bytes_per_value: int) -> int:
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return 2 * text_config.num_hidden_layers * text_config.hidden_size * kv_heads // heads * bytes_per_value


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _count_of(weights: int) -> str:
    return f"{weights / 1e9:.3g} billion" if weights >= ONE_BILLION else f"{weights / 1e6:.3g} million"


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    size = "" if plan.parameters is None else f", {_count_of(plan.parameters)} weights"
    lines = [
        f"{plan.name}: a {plan.kind} with a language model of type {plan.family}{size}",
        f"  engine of chat and demo: {plan.engine}",
        f"  context: {plan.context:,} tokens",
    ]
    if plan.conversation:
        lines.append(f"  conversation: {plan.conversation}")
    if plan.recipe:
        lines.append(f"  export without --weight-format: {plan.recipe}; recommended: --weight-format {RECOMMENDED}")
    header = ("", "disk", "memory to run", "load", "per token, about", "export", "memory to export", "")
    rows = [header, *(_row(needs) for needs in plan.needs)]
    used = [column for column in zip(*rows) if any(column[1:])]  # a bundle has no export
    aligned = "<" + ">" * (len(used) - 2) + "<" if len(used) > 2 else "<" * len(used)
    return [*lines, "", *(f"  {line}" for line in table_lines(list(zip(*used)), aligned))]


def _row(needs: Needs) -> tuple[str, ...]:
    return (
        needs.weight_format or "this bundle",
        readable_size(needs.disk),
        readable_size(needs.memory),
        f"{needs.load_seconds:.0f} s",
        f"{1000 * needs.token_seconds:.3g} ms",
        "" if needs.export_seconds is None else f"{needs.export_seconds:.0f} s",
        "" if needs.export_memory is None else readable_size(needs.export_memory),
        "fits" if needs.fits else "does not fit into memory",
    )
