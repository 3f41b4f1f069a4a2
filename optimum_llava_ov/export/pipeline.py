"""Run the whole export: checkpoint -> torch model -> parts -> bundle."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nncf
import openvino
import torch
from optimum.exporters.openvino import main_export as optimum_main_export
from optimum.exporters.openvino.convert import export
from optimum.exporters.openvino.convert import export_from_model as optimum_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.intel.openvino.configuration import OVConfig
from optimum.utils import DEFAULT_DUMMY_SHAPES
from tqdm.auto import tqdm
from transformers import LlavaProcessor

from optimum_llava_ov import host
from optimum_llava_ov.bundle.card import CARD, read_card, source_license, write_card
from optimum_llava_ov.bundle.example import save_example
from optimum_llava_ov.bundle.layout import LANGUAGE_MODEL, ONE_BILLION, PARTS, SMALL_PARTS
from optimum_llava_ov.bundle.licenses import check_license
from optimum_llava_ov.bundle.provenance import openvino_config
from optimum_llava_ov.bundle.settings import build_config, build_processor, save_settings
from optimum_llava_ov.bundle.staging import prepare_output, staged
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint, check_checkpoint_options
from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS, Repository
from optimum_llava_ov.checkpoint.tensors import map_files
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.export.calibration import calibration_dataset
from optimum_llava_ov.export.compression import compress
from optimum_llava_ov.export.configs import LlavaOpenVINOConfig
from optimum_llava_ov.export.finite import check_finite
from optimum_llava_ov.export.late_merge import LateMerge
from optimum_llava_ov.export.names import name_after_module
from optimum_llava_ov.export.recipes import (
    INT8_RECIPE,
    bytes_per_weight,
    needs_data,
    reads_each_weight,
    recipe_for_part,
    recipe_of,
)
from optimum_llava_ov.export.row_blocks import by_rows
from optimum_llava_ov.export.spill import Spill
from optimum_llava_ov.export.tokenizers import export_tokenizers
from optimum_llava_ov.models.llava import OriginalLlavaForConditionalGeneration
from optimum_llava_ov.options import check_options, names_of
from optimum_llava_ov.system.memory import free, move_to_disk, read_ahead
from optimum_llava_ov.units import readable_size


if TYPE_CHECKING:
    from collections.abc import Callable

    from optimum.intel.openvino.configuration import OVPipelineQuantizationConfig, OVWeightQuantizationConfig


logger = logging.getLogger(__name__)

TASK = "image-text-to-text"
LICENSE = "license"  # the key of --model-kwargs that is about the card and not about the checkpoint


def main_export(
    model_name_or_path: str | Path | Repository,
    output: str | Path,
    task: str = "auto",
    ov_config: OVConfig | None = None,
    stateful: bool = True,
    convert_tokenizer: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> None:
    """Export an original LLaVA checkpoint to a bundle. Takes the arguments of Optimum's `main_export`.

    No code of the checkpoint is executed, so `trust_remote_code` has no effect.

    Args:
        model_name_or_path: folder or model id of the checkpoint, or its [`Repository`].
        output: folder of the bundle. An existing bundle is replaced when the new one is complete.
        task: `auto` or `image-text-to-text`, the only supported task.
        ov_config: `OVConfig(dtype="fp16")` or `"fp32"`, or `OVConfig(quantization_config=...)`. If not given, weights
            keep the precision of the checkpoint. Language models of a billion parameters or more are compressed to 8
            bits, as Optimum does with all models.
        stateful: whether the language model keeps its cache inside. Only `True` is supported.
        convert_tokenizer: whether to write the tokenizer as OpenVINO models, which GenAI needs.
        model_kwargs: `{"vision_tower": <folder or model id>}` overrides `mm_vision_tower` of the checkpoint,
            `{"conversation": <name>}` the conversation that is chosen for it, `{"tokenizer": <folder or model id>}`
            its own tokenizer. `{"base_model": <folder or model id>}` is the base model of a fine-tune, `{"adapters":
            [<folder or model id>, ...]}` are merged into the model.
            `{"image_tokens": <number>}` reduces the patches of an image to fewer tokens; `{"image_token_method":
            <name>}` says how (see [`~optimum_llava_ov.checkpoint.image_tokens.ImageTokens`]).
            `{"license": <id>}` is the license in the card, such as "apache-2.0", if the checkpoint's card names none.
        kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`. Other options of
            Optimum's `main_export`, such as `trust_remote_code` and shapes for tracing, are accepted and have no
            effect.

    Raises:
        `TypeError`: an option is unknown; suggests the nearest known name.
        `ValueError`: an argument is not supported for LLaVA.
        [`UnsupportedCheckpointError`], [`InvalidCheckpointError`], [`BundleError`]: see their documentation. If
            possible, they are raised before weights are downloaded. The output is then unchanged.
    """
    # The default shapes are Optimum's `kwargs_shapes`
    check_options(
        "main_export", kwargs, names_of(main_export) | names_of(optimum_main_export) | DEFAULT_DUMMY_SHAPES.keys()
    )
    _check_arguments(task, stateful, model_kwargs, kwargs)
    output = prepare_output(output)
    parts, license_id = _split_license(model_kwargs)
    checkpoint = OriginalCheckpoint.open(model_name_or_path, **parts, **kwargs)
    _export(checkpoint, None, output, ov_config, convert_tokenizer, license_id)


def export_from_model(
    model: OriginalLlavaForConditionalGeneration,
    output: str | Path,
    task: str | None = None,
    ov_config: OVConfig | None = None,
    stateful: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> list[str]:
    """Export a torch model to a bundle. Takes the arguments of Optimum's `export_from_model`.

    The weights are those of the model, in its precision. Everything else comes from the checkpoint that the model was
    loaded from.

    Args:
        model: model from [`OriginalLlavaForConditionalGeneration.from_pretrained`]. It can be used after the export.
        output, task, ov_config, stateful, model_kwargs: as for [`main_export`].
        kwargs: `subfolder`, `revision`, ... of the checkpoint. Other options of Optimum's function have no effect.

    Returns:
        The file names of the graphs in `output`.

    Raises:
        As [`main_export`].
    """
    known = (
        names_of(export_from_model)
        | names_of(optimum_export_from_model)
        | {*HUB_OPTIONS}
        | DEFAULT_DUMMY_SHAPES.keys()
    )
    check_options("export_from_model", kwargs, known)
    _check_arguments(task or "auto", stateful, model_kwargs, kwargs)
    output = prepare_output(output)
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    parts, license_id = _split_license(model_kwargs)
    checkpoint = OriginalCheckpoint.open(model.config.name_or_path, **parts, **options)
    _export(checkpoint, model, output, ov_config, convert_tokenizer=True, license_id=license_id)
    return list(PARTS.values())


def _export(
    checkpoint: OriginalCheckpoint,
    model: OriginalLlavaForConditionalGeneration | None,
    output: Path,
    ov_config: OVConfig | None,
    convert_tokenizer: bool,
    license_id: str | None,
) -> None:
    """Export `model`. If it is `None`, load the model of the checkpoint, and free each part after it is written."""
    logger.info("Conversation: %s. %s", checkpoint.choice.conversation.name, checkpoint.choice.reason)
    place = checkpoint.tokenizer_place
    logger.info("Tokenizer: %s. %s", place.repository.name, place.reason)
    previous_card = read_card(output / CARD)
    license_id = license_id or source_license(checkpoint)
    recipe = _requested_recipe(ov_config)
    is_ours, part_config = model is None, ov_config
    if model is None:
        read_ahead([*checkpoint.vision_weight_files, *checkpoint.weight_files])

    with staged(output, tokenizers=convert_tokenizer) as folder:
        late_merge = None
        if model is None:
            checkpoint = checkpoint.working_in(folder, _merge_dtype(ov_config) if checkpoint.lineage.steps else None)
            if ov_config is None or (
                recipe is not None and reads_each_weight(recipe_for_part(recipe, LANGUAGE_MODEL))
            ):
                model, late_merge = _load_without_lora(checkpoint)
            model = model or _load(checkpoint, _load_dtype(ov_config), folder)
        processor = build_processor(checkpoint)
        if ov_config is None and sum(weight.numel() for weight in model.language_model.parameters()) >= ONE_BILLION:
            recipe = recipe_of({"quantization_configs": {LANGUAGE_MODEL: INT8_RECIPE}})
        _check_free_space(model, ov_config, recipe, folder)
        if ov_config is not None and ov_config.dtype == "fp16":
            model = model if is_ours else _sharing_weights(model)
            # Only the weights. OpenVINO would also round constants, such as the frequencies of rotary embeddings.
            others = [weight for weight in model.parameters() if weight.dtype != torch.float16]
            size = sum(2 * weight.numel() for weight in others)
            if size:
                _check_free(size, "Until the export ends, the weights in fp16 need", folder)
            move_to_disk(others, folder, torch.float16)
            part_config = None
        newline = None if model.image_newline is None else model.image_newline.detach().float()
        save_settings(checkpoint, processor, model.generation_config, newline, folder)
        if convert_tokenizer:
            export_tokenizers(processor, folder)  # before the parts, because it may fail
        _export_parts(model, processor, folder, part_config, recipe, late_merge, free if is_ours else None)
        openvino_config(ov_config, recipe, build_config(checkpoint).converted_from).save_pretrained(folder)
        save_example(folder)
        write_card(folder, license_id, previous_card)
        # Close the mapped files
        del model, checkpoint, late_merge
        gc.collect()


def _load(
    checkpoint: OriginalCheckpoint, dtype: torch.dtype | None, folder: Path
) -> OriginalLlavaForConditionalGeneration:
    """Load a model. What a fine-tune changes is merged into its weights first."""
    if checkpoint.lineage.steps:
        size = sum(file.stat().st_size for file in checkpoint.weight_files)
        _check_free(size, "Until the export ends, the merged weights need", folder)
    return OriginalLlavaForConditionalGeneration.from_checkpoint(checkpoint, dtype=dtype)


def _load_without_lora(
    checkpoint: OriginalCheckpoint,
) -> tuple[OriginalLlavaForConditionalGeneration | None, LateMerge | None]:
    """Load a model without the LoRA of its language model, if it can be merged later."""
    if checkpoint.has_separate_lora or not checkpoint.separate_lora:
        return None, None
    # Those in bf16 are written to the disk in fp16 anyway, for which there must be room
    if any(tensor.dtype == torch.bfloat16 for tensor in map_files(checkpoint.weight_files).values()):
        return None, None
    base = checkpoint.without_lora()
    tensors = base.tensors()
    if any(tensors[name].dtype != torch.float16 for name in checkpoint.separate_lora):
        return None, None
    model = OriginalLlavaForConditionalGeneration.from_checkpoint(base)
    late_merge = LateMerge(tensors, checkpoint.separate_lora)
    if not late_merge.is_possible(model.parameters()):
        return None, None
    logger.info("LoRA of %s tensors is merged while the weights are written.", len(checkpoint.separate_lora))
    return model, late_merge


def _sharing_weights(model: OriginalLlavaForConditionalGeneration) -> OriginalLlavaForConditionalGeneration:
    """Copy a model, but not its weights. Those of the copy can be replaced, and the model keeps its own."""
    weights = {id(weight): torch.nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, weights)


def _check_arguments(task: str, stateful: bool, model_kwargs: dict | None, kwargs: dict) -> None:
    if TasksManager.map_from_synonym(task.removesuffix("-with-past")) not in ("auto", TASK):
        raise ValueError(f"LLaVA is exported for the task {TASK!r}, not {task!r}. Leave --task out.")
    if not stateful:
        raise ValueError(
            "--disable-stateful is not supported for LLaVA: OVModelForLlava, optimum-intel, GenAI and Model "
            "Server need a language model that keeps its cache inside. Leave the option out."
        )
    check_checkpoint_options(model_kwargs, more=(LICENSE,))
    if license_id := (model_kwargs or {}).get(LICENSE):
        check_license(license_id)
    for name in ("variant", "custom_export_configs", "fn_get_submodels"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported for LLaVA checkpoints. Leave it out.")


def _split_license(model_kwargs: dict[str, Any] | None) -> tuple[dict[str, Any], str | None]:
    """Return the options of the checkpoint, and the license for the card."""
    parts = dict(model_kwargs or {})
    return parts, parts.pop(LICENSE, None)


def _merge_dtype(ov_config: OVConfig | None) -> torch.dtype | None:
    """Return the dtype of merged weights (see [`merge`]): exact for a bundle in float32, else the original's."""
    return None if ov_config is None else {"fp32": torch.float32, "fp16": torch.float16}.get(ov_config.dtype)


def _load_dtype(ov_config: OVConfig | None) -> torch.dtype | None:
    """Return the dtype to load the weights in. `None` keeps the stored dtypes, which needs no memory.

    NNCF compresses weights of any stored dtype. For fp16, they are converted on disk.
    """
    return torch.float32 if ov_config is not None and ov_config.dtype == "fp32" else None


def _requested_recipe(ov_config: OVConfig | None) -> OVPipelineQuantizationConfig | None:
    if ov_config is None or ov_config.quantization_config is None:
        return None
    return recipe_of(ov_config.quantization_config)


def _check_free_space(
    model: OriginalLlavaForConditionalGeneration,
    ov_config: OVConfig | None,
    recipe: OVPipelineQuantizationConfig | None,
    folder: Path,
) -> None:
    config = LlavaOpenVINOConfig(model.config)
    needed = 0.0
    for behavior, part in _PART_NAMES.items():
        part_recipe = recipe_for_part(recipe, part) if recipe else None
        float_bytes = {"fp16": 2, "fp32": 4}.get(ov_config.dtype) if ov_config is not None else None
        for weight in config.get_model_for_behavior(model, behavior).parameters():
            needed += weight.numel() * (
                bytes_per_weight(part_recipe) if part_recipe else float_bytes or weight.element_size()
            )
    _check_free(needed, "The bundle needs", folder)


def _check_free(needed: float, what: str, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    logger.info("%s %s of disk; %s are free.", what, readable_size(needed), readable_size(free))
    if needed > free:
        raise BundleError(
            f"{what} {readable_size(needed)} of disk, but only {readable_size(free)} are free in {folder.parent}. "
            "Free some space, or write to another disk."
        )


# Behavior of the export configuration -> Optimum's name of the part, in the order of export. The language model comes
# last, because its calibration uses the other parts.
_PART_NAMES = {"vision_embeddings": SMALL_PARTS[1], "text_embeddings": SMALL_PARTS[0], "language": LANGUAGE_MODEL}


def _export_parts(
    model: OriginalLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    ov_config: OVConfig | None,
    recipe: OVPipelineQuantizationConfig | None,
    late_merge: LateMerge | None,
    release: Callable[[torch.nn.Module], None] | None,
) -> None:
    """Trace, compress and write one part after the other.

    No part is written to disk uncompressed, and no two parts are in memory at the same time.

    Args:
        late_merge: LoRA of the language model that its weights do not have yet.
        release: function that is called with each part after it is written.
    """
    config_class = TasksManager.get_exporter_config_constructor(
        model=model, task=TASK, exporter="openvino", library_name="transformers"
    )
    config = config_class(model.config)
    progress = tqdm(_PART_NAMES.items(), unit="part")
    checker = ThreadPoolExecutor(1, "check-weights")
    for behavior, name in progress:
        part, part_config = config.get_model_for_behavior(model, behavior), config.with_behavior(behavior)
        part_recipe = recipe_for_part(recipe, name) if recipe else None
        dataset = None
        if behavior == "language" and part_recipe is not None:
            del part_config.runtime_options["KV_CACHE_PRECISION"]
            if needs_data(part_recipe):
                dataset = calibration_dataset(part_recipe.dataset, part_recipe.num_samples, processor, folder)
        progress.set_description(f"Tracing {name}")
        spill = Spill(folder / ".weights")
        own = {id(weight) for weight in part.parameters()}
        weights = {name: weight for name, weight in model.named_parameters() if id(weight) in own}
        check = checker.submit(check_finite, weights)
        finish = partial(
            _finish,
            check=check,
            config=part_recipe,
            dataset=dataset,
            spill=spill,
            late_merge=late_merge if behavior == "language" else None,
            name=name,
            progress=progress,
        )
        with warnings.catch_warnings(), host.exporting(finish, spill.save):
            # Torch warns of sizes that become constants. Here, these are constant, or Optimum's patches keep them
            # symbolic.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            export(
                model=part,
                config=part_config,
                output=folder / PARTS[f"{behavior}_model"],
                # One image is enough for tracing; more would only need more memory
                input_shapes={"batch_size": 1} if behavior == "vision_embeddings" else None,
                ov_config=ov_config,
                stateful=getattr(part_config, "use_past", False),
                # Put the 16-bit weights of linear layers and embeddings into the graph without a conversion or a copy
                patch_16bit_model=any(
                    parameter.dtype in (torch.float16, torch.bfloat16) for parameter in part.parameters()
                ),
                library_name="transformers",
            )
        if release is not None:
            release(part)


def _finish(
    graph: openvino.Model,
    check: Future,
    config: OVWeightQuantizationConfig | None,
    dataset: nncf.Dataset | None,
    spill: Spill,
    late_merge: LateMerge | None,
    name: str,
    progress: tqdm,
) -> openvino.Model:
    """Check, rename, compress and merge a traced graph before it is written."""
    check.result()
    if name == LANGUAGE_MODEL:
        name_after_module(graph, "language_model")
    with ExitStack() as stack:
        read = {}
        if late_merge is not None:
            stack.callback(late_merge.close)
            read = {"value": late_merge.tensor}
        if config is not None:
            progress.set_description(f"Compressing {name}")
            with host.compressing(spill.constant, by_rows, **read):
                graph = compress(graph, config, dataset)
        if late_merge is not None:
            late_merge.replace_rest(graph, spill)
    progress.set_description(f"Writing {name}")
    return graph
