"""Find the vision tower of a checkpoint, which has its own repository, and read its configuration."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPVisionConfig

from optimum_llava_ov.checkpoint.config import MAX_HEADS, MAX_LAYERS, MAX_WIDTH
from optimum_llava_ov.checkpoint.image_processor import MAX_SIDE
from optimum_llava_ov.checkpoint.options import broken_rules, integer, number, one_of, positive, read_json, shown
from optimum_llava_ov.checkpoint.related import find_related
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


_OVERRIDE = (
    'Name its location: `--model-kwargs \'{"vision_tower": "<folder or model id>"}\'` on the command line, '
    '`model_kwargs={"vision_tower": ...}` in `main_export`, `vision_tower=` in `from_pretrained`.'
)


# Options that are read from the tower's configuration. The last four have no effect, and are copied into the bundle.
_OPTIONS = {
    "hidden_size": integer(1, MAX_WIDTH),
    "intermediate_size": integer(1, MAX_WIDTH),
    "num_hidden_layers": integer(1, MAX_LAYERS),
    "num_attention_heads": integer(1, MAX_HEADS),
    "num_channels": one_of(3),
    "image_size": integer(1, MAX_SIDE),
    "patch_size": integer(1, MAX_SIDE),
    "hidden_act": one_of("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "layer_norm_eps": positive(1),
    "projection_dim": integer(1, MAX_WIDTH),
    "attention_dropout": number(0, 1),
    "initializer_range": number(0, 1000),
    "initializer_factor": number(0, 1000),
}


def find_vision_tower(repository: Repository, named: str | None, chosen: str | None = None) -> Repository:
    """Return the repository of the vision tower (see [`find_related`]).

    Args:
        repository: repository of the checkpoint.
        named: absolute path, path relative to the checkpoint, or model id, from the checkpoint's configuration.
        chosen: the same from the user. It replaces `named`.

    Raises:
        [`InvalidCheckpointError`]: no vision tower is named, or it is not found.
    """
    vision_tower = chosen or named
    if not vision_tower:
        raise InvalidCheckpointError(
            f"config.json of {repository.name!r} does not name a vision tower (mm_vision_tower). {_OVERRIDE}"
        )

    what = f"The vision tower {shown(vision_tower)}" + (
        "" if chosen else f", mm_vision_tower in config.json of {repository.name!r},"
    )
    return find_related(repository, vision_tower, what, _OVERRIDE, chosen=bool(chosen))


def read_vision_config(file: Path) -> CLIPVisionConfig:
    """Read the configuration of a CLIP tower from the `config.json` of the tower or of a whole CLIP model.

    Only known options are read. Old configurations also hold all defaults of old versions of transformers.

    Raises:
        [`InvalidCheckpointError`]: the file is not a JSON object.
        [`UnsupportedCheckpointError`]: it describes another kind of model, or a model that cannot be built.
    """
    values = read_json(file)
    if values.get("model_type") not in ("clip", "clip_vision_model"):
        raise UnsupportedCheckpointError(
            f"The vision tower in {file} is a {shown(values.get('model_type'))} model; only CLIP towers are supported."
        )
    if values["model_type"] == "clip":
        values = values.get("vision_config") or {}
        if not isinstance(values, dict):
            raise InvalidCheckpointError(
                f"{file} has vision_config={shown(values)}, expected an object. Download it again."
            )
    # Absent options have the defaults of the class: CLIP's first towers were published like this
    known = {name: values[name] for name in _OPTIONS if values.get(name) is not None}
    problems = broken_rules(known, {name: _OPTIONS[name] for name in known})
    if not problems:  # each value is valid; check combinations of values
        size, heads, image_size, patch_size = (
            known.get(name, getattr(CLIPVisionConfig, name))
            for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size")
        )
        if size % heads:
            problems.append(f"hidden_size={size} is not a multiple of num_attention_heads={heads}")
        if image_size < patch_size:
            problems.append(f"image_size={image_size} is less than patch_size={patch_size}")
    if problems:
        raise UnsupportedCheckpointError(
            f"{file} describes a vision tower that cannot be built: {'; '.join(problems)}."
        )
    return CLIPVisionConfig(**known)
