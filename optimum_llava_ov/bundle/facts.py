"""Read the data of a bundle's card from the files of the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult
from transformers import AutoConfig, PretrainedConfig

from optimum_llava_ov.bundle.check import check_settings, read_graph
from optimum_llava_ov.bundle.example import QUESTION
from optimum_llava_ov.bundle.layout import PARTS, part_sizes
from optimum_llava_ov.bundle.precision import WeightShare, precision_of, weight_shares
from optimum_llava_ov.bundle.reproduce import export_command, export_snippet, part_recipes
from optimum_llava_ov.bundle.settings import context_length
from optimum_llava_ov.bundle.terms import notes_about
from optimum_llava_ov.checkpoint.conversation import CONVERSATIONS
from optimum_llava_ov.checkpoint.families import FAMILIES
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.models.image_layout import ImageLayout
from optimum_llava_ov.units import readable_rate, readable_size


_TITLES = {
    "language_model": "language model",
    "text_embeddings_model": "text embeddings",
    "vision_embeddings_model": "image encoder",
}
_ENGINE_NAMES = {"genai": "OpenVINO GenAI", "openvino": "optimum-llava-ov"}
_RECIPE_PARTS = {"lm_model": "language model", **_TITLES}
_FAMILY_NAMES = {family.text_model_type: family.family for family in FAMILIES}
# Name in eval.json -> title, format, name of the metric on the Hub
_METRICS = {
    "kl_mean": ("KL divergence from the reference, mean, nats per token", "{:.5f}", "kl_divergence"),
    "kl_p95": ("KL divergence, 95th percentile", "{:.5f}", None),
    "top1_agreement": ("same most likely token", "{:.1%}", "top1_agreement"),
    "identical": ("same greedy answer", "{:.1%}", "identical_answers"),
    "first_divergence": ("first token that differs, mean over answers that do", "{:.1f}", None),
    "accuracy": ("exact answers", "{:.1%}", "accuracy"),
    "reference_accuracy": ("exact answers of the reference", "{:.1%}", None),
}


@dataclass(frozen=True)
class BundleFacts:
    """Hold the data of a bundle's card.

    Attributes:
        config, generation_config, preprocessor_config, openvino_config (`dict`): content of these files.
        evaluation (`dict` or `None`): content of `eval.json`, if quality was measured.
        benchmark (`dict` or `None`): content of `bench.json`, if speed was measured for the card.
        shares (`dict[str, list[WeightShare]]`): weights of each part by precision.
        sizes (`dict[str, int]`): bytes of each part's weights.
        has_chart (`bool`): whether the bundle has `eval.png`.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    openvino_config: dict[str, Any]
    evaluation: dict[str, Any] | None
    benchmark: dict[str, Any] | None
    shares: dict[str, list[WeightShare]]
    sizes: dict[str, int]
    has_chart: bool

    @classmethod
    def read(cls, folder: Path) -> BundleFacts:
        """Read the facts from the files of a bundle.

        Raises:
            [`BundleError`]: a file is damaged or does not belong to a bundle; names it.
        """
        return cls(
            config=check_settings(folder),
            generation_config=_read_optional(folder / "generation_config.json") or {},
            preprocessor_config=_read_optional(folder / "preprocessor_config.json") or {},
            openvino_config=read_json(folder / "openvino_config.json", error_class=BundleError),
            evaluation=_read_optional(folder / "eval.json"),
            benchmark=_read_optional(folder / "bench.json"),
            shares={part: weight_shares(read_graph(folder / file)) for part, file in PARTS.items()},
            sizes=part_sizes(folder),
            has_chart=(folder / "eval.png").is_file(),
        )

    @property
    def _converted_from(self) -> dict[str, Any]:
        return {"model": "a local checkpoint"} | self.config.get("converted_from", {})

    @cached_property
    def text_config(self) -> PretrainedConfig:
        """Return the configuration of the language model."""
        return AutoConfig.for_model(**self.config["text_config"])

    @property
    def family(self) -> str:
        """Return the name of the family of the language model, such as "LLaMA"."""
        return _FAMILY_NAMES.get(self.text_config.model_type, self.text_config.model_type)

    @property
    def kind(self) -> str:
        """Return the name of this kind of LLaVA in tags and paths, such as "llava-llama"."""
        return f"llava-{self.text_config.model_type}"

    @property
    def source(self) -> str:
        """Return the model id of the checkpoint, or the name of its folder."""
        return self._converted_from["model"]

    @property
    def source_url(self) -> str | None:
        """Return the address of the checkpoint on the Hub; `None` if it is a local folder."""
        return f"https://huggingface.co/{self.source}" if self._converted_from.get("revision") else None

    @property
    def base_models(self) -> list[str]:
        """Return the model ids of the checkpoint, and of the models that it was merged from."""
        converted_from = self._converted_from
        parts = [converted_from, *(converted_from.get("adapters") or ())]
        named = [part["model"] for part in parts if part.get("revision")]
        if converted_from.get("base_model_revision"):
            named.append(converted_from["base_model"])
        return list(dict.fromkeys(named))

    @property
    def compressed(self) -> bool:
        """Return whether any weights are compressed."""
        return any(not share.mode.startswith(("fp", "bf")) for shares in self.shares.values() for share in shares)

    @property
    def precision(self) -> str:
        """Return the precision of the language model (see [`precision_of`])."""
        return precision_of(self.shares["language_model"])

    @cached_property
    def _parameters(self) -> int:
        return sum(share.parameters for share in self.shares["language_model"])

    def values(self) -> dict[str, Any]:
        """Return the variables of the card's template."""
        config, converted_from = self.config, self._converted_from
        pads = converted_from.get("image_aspect_ratio") == "pad"
        recipes = part_recipes(self.openvino_config)
        recorded = {**self.openvino_config, "converted_from": converted_from}
        command = export_command(recorded, self._parameters, self.source.split("/")[-1] + "-ov")
        datasets = [recipe["dataset"] for recipe in recipes.values() if isinstance(recipe.get("dataset"), list)]
        versions = self.openvino_config.get("versions") or {}
        return {
            "source": self.source,
            "source_url": self.source_url,
            "revision": converted_from.get("revision"),
            "family": self.family,
            "kind": self.kind,
            "vision_tower": converted_from.get("vision_tower"),
            "own_tower": converted_from.get("unfreeze_mm_vision_tower"),
            "conversation": converted_from.get("conversation"),
            "prompt": self._prompt(),
            "stop_strings": self.generation_config.get("stop_strings"),
            "precision": self.precision,
            "size": readable_size(sum(self.sizes.values())),
            "layers": self.text_config.num_hidden_layers,
            "width": self.text_config.hidden_size,
            "compressed": self.compressed,
            "recipes": {_RECIPE_PARTS[part]: recipe for part, recipe in recipes.items()},
            "weights": self._weight_rows(),
            "versions": versions,
            "openvino_version": ".".join(versions.get("openvino", "2026.2").split(".")[:2]),
            "command": command,
            "snippet": None if command else export_snippet(recorded, self.source.split("/")[-1] + "-ov"),
            "data_aware": datasets[0][0] if datasets else None,
            "image_seq_length": config["image_seq_length"],
            "image_tokens": converted_from.get("image_tokens"),
            "num_patches": (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2,
            "tiling": ImageLayout.of_bundle(AutoConfig.for_model(**config)).tiling,
            "image_size": config["vision_config"]["image_size"],
            "pads": pads,
            # As the original computes it: cut off, not rounded
            "pad_colour": tuple(int(255 * mean) for mean in self.preprocessor_config["image_mean"]) if pads else None,
            "max_seq_len": context_length(self.text_config),
            "notes": notes_about(self.source, self.text_config.model_type),
            "quality": self._quality(),
            "speed": self._speed(),
            "question": QUESTION,
            "merged": self._merged(),
            "quantized_training": converted_from.get("quantized_training", False),
            "separate_lora": converted_from.get("lora") == "separate",
        }

    def _prompt(self) -> str | None:
        """Return a prompt with an image and a question, as the conversation of the bundle writes it."""
        conversation = CONVERSATIONS.get(self._converted_from.get("conversation") or "")
        if conversation is None:
            return None
        question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(conversation.chat_template)
        return template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)

    def _merged(self) -> list[dict[str, Any]]:
        """Return what the model was merged from: the base model and fine-tunes, with revisions and licenses."""
        source = self._converted_from
        if not source.get("adapters"):
            return []
        names = ("revision", "license")
        base = {"model": source["base_model"], "what": "base model"}
        rows = [base | {name: source.get(f"base_model_{name}") for name in names}]
        for adapter in source["adapters"]:
            rank = f", rank {adapter['rank']}, alpha {adapter['alpha']}" if adapter.get("rank") else ""
            rows.append({**adapter, "what": f"{adapter['kind']}{rank}"})
        return rows

    def _weight_rows(self) -> list[dict[str, Any]]:
        rows = []
        for part, shares in self.shares.items():
            total, layers = sum(share.parameters for share in shares), sum(share.layers for share in shares)
            for index, share in enumerate(shares):
                percent = 100 * share.parameters / total
                rows.append(
                    {
                        "part": _TITLES[part] if index == 0 else "",
                        "mode": share.mode,
                        "share": f"{percent:.0f}" if percent >= 1 else "< 1",
                        "layers": share.layers,
                        "all_layers": layers,
                        "size": readable_size(self.sizes[part]) if index == 0 else "",
                    }
                )
        return rows

    def _quality(self) -> dict[str, Any] | None:
        if self.evaluation is None:
            return None
        settings = self.evaluation.get("settings", {})
        versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
        rows = [
            (title, form.format(self.evaluation[name]))
            for name, (title, form, _) in _METRICS.items()
            if self.evaluation.get(name) is not None
        ]
        return {
            "reference": settings.get("reference", self.source),
            "dataset": settings.get("dataset", "its samples"),
            "num_samples": self.evaluation["num_samples"],
            "num_tokens": self.evaluation["num_tokens"],
            "versions": versions,
            "reading": self._reading(),
            "rows": rows,
            "chart": self.has_chart,
        }

    def _reading(self) -> list[str]:
        """Return what the numbers mean, as sentences."""
        found = self.evaluation or {}
        samples = found["num_samples"]
        same = round(found["identical"] * samples)
        changed = "All answers are" if same == samples else f"{same} answers are"
        sentences = [
            f"The model and its reference were asked {samples} questions. {changed} the same, word for word.",
            f"At {found['top1_agreement']:.1%} of the tokens (words and parts of words), "
            "both find the same next token most likely.",
        ]
        if found.get("accuracy") is not None:
            sentences.append(
                f"{found['accuracy']:.1%} of the model's answers are exactly right, and "
                f"{found['reference_accuracy']:.1%} of the reference's."
            )
        return sentences

    def _speed(self) -> dict[str, Any] | None:
        if self.benchmark is None:
            return None
        found = self.benchmark
        cpu, engine = found["cpu"], found["engine"]
        tools = ("openvino", "openvino-genai") if engine == "genai" else ("openvino", "optimum-intel", "transformers")
        return {
            "machine": f"{cpu['name']} ({', '.join(cpu['features'])}), {cpu['cores']} cores",
            "device": found["device"],
            "engine": _ENGINE_NAMES.get(engine, engine),
            "versions": ", ".join(f"{name} {found['versions'][name]}" for name in tools),
            "rows": [
                (
                    f"{speed['prompt_tokens']:,} tokens",
                    f"{speed['time_to_first_token']:.2f} s",
                    readable_rate(speed["tokens_per_second"]),
                )
                for speed in found["speeds"]
            ],
            "load": f"{found['load_seconds']:.1f} s",
            "memory": readable_size(found["peak_rss"]),
        }

    def eval_results(self) -> list[EvalResult] | None:
        """Return the measured quality for the Hub's `model-index`; `None` if it was not measured."""
        if self.evaluation is None:
            return None
        dataset = self.evaluation.get("settings", {}).get("dataset", "samples")
        results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset.lower().replace(" ", "-").replace("(", "").replace(")", ""),
                dataset_name=dataset,
                metric_type=metric,
                metric_value=round(self.evaluation[name], 6),
                metric_name=title,
            )
            for name, (title, _, metric) in _METRICS.items()
            if metric and self.evaluation.get(name) is not None
        ]
        return results or None


def _read_optional(file: Path) -> dict[str, Any] | None:
    """Read a JSON file; return `None` if it does not exist."""
    return read_json(file, error_class=BundleError) if file.is_file() else None
