"""`OVModelForLlava`: a bundle in transformers code. Load it, compress it, save it, publish it and talk with it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import openvino
from huggingface_hub import CommitInfo, constants
from optimum.intel import OVConfig
from optimum.intel.openvino.modeling_base import OVBaseModel
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.bundle.check import check_is_llava_mpt, check_readable, load_processor, naming_damage
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, LANGUAGE_MODEL, PARTS, TOKENIZERS
from optimum_llava_ov.bundle.precision import weight_shares
from optimum_llava_ov.bundle.provenance import openvino_config
from optimum_llava_ov.bundle.staging import complete_replacement, staged
from optimum_llava_ov.chat.openvino_engine import OpenVINOEngine
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS, Repository, repository_of_snapshot
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.export.calibration import calibration_dataset
from optimum_llava_ov.export.compression import compress
from optimum_llava_ov.export.pipeline import main_export
from optimum_llava_ov.export.recipes import needs_data, recipe_for_part, recipe_of
from optimum_llava_ov.hub.push import push_bundle
from optimum_llava_ov.options import check_options, names_of
from optimum_llava_ov.runtime.language_model import PA
from optimum_llava_ov.runtime.modeling import ATTENTION_BACKEND, OVLlavaModel


class OVModelForLlava(OVLlavaModel):
    """A LLaVA on OpenVINO, with the interface of transformers.

    [`generate`] takes what transformers' `generate` takes. Calls from several threads are served one after the other.

    Example:
        model = OVModelForLlava.from_pretrained("llava-mpt-ov")
        processor = AutoProcessor.from_pretrained("llava-mpt-ov")
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=200)
    """

    _support_new_processing = True  # the host's word for prompts that say `<image>` once for each of its features

    @classmethod
    def from_pretrained(
        cls, model_id: str | Path, *args, vision_tower: str | None = None, **kwargs
    ) -> OVModelForLlava:
        """Load a bundle, or convert an original checkpoint on the fly.

        A conversion lives in a temporary folder beside the Hub's cache; keep it with [`save_pretrained`].

        Args:
            model_id: folder or model id of a bundle, or of an original LLaVA-MPT checkpoint.
            vision_tower: of an original checkpoint, where its vision tower is, if not where it says.
            kwargs: those of [`OVModelForVisualCausalLM.from_pretrained`]: `device`, `ov_config`, `compile`, `cache_dir`, `token`,
                `revision`, `subfolder`, `local_files_only`, ... `ov_config` may also have GenAI's `ATTENTION_BACKEND`: `"PA"`, paged
                attention, which is used on CPU unless it is `"SDPA"`.

        Raises:
            [`BundleError`]: `model_id` is a model, but not a LLaVA-MPT, or a file of it is missing or damaged.
            [`HubError`]: the Hub does not know `model_id`, refuses it, or cannot be reached.
        """
        complete_replacement(model_id)
        if holds_original_checkpoint(model_id, **kwargs):
            return cls._export(model_id, vision_tower=vision_tower, **kwargs)
        folder = _download(model_id, kwargs)
        if kwargs.get("compile_only") and kwargs.get("ov_config"):  # the host gives all of it to OpenVINO
            kwargs["ov_config"] = {**kwargs["ov_config"]}
            kwargs["attention_backend"] = kwargs["ov_config"].pop(ATTENTION_BACKEND, PA)
        with naming_damage(folder):
            # Past the host's method of this name, which looks for a folder in the Hub's cache where there is no network
            return super(OVBaseModel, cls).from_pretrained(folder, *args, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        quantization_config: Any = None,
        load_in_8bit: bool | None = None,
        compile: bool = True,
        compile_only: bool = False,
        **kwargs,
    ) -> OVModelForLlava:
        """What the host does for each class, for this one: it would look the class up by the model's type, which is not ours alone."""
        check_is_llava_mpt(model_id, config.to_dict())
        folder = Path(model_id)
        device, ov_config = kwargs.get("device", "CPU"), kwargs.get("ov_config")
        parts = [
            cls._compile_model(folder / file, device, ov_config, folder)
            if compile_only
            else cls.load_model(folder / file)
            for file in PARTS.values()
        ]
        if (folder / "generation_config.json").exists():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
        quantization_config = quantization_config or ({"bits": 8} if load_in_8bit else None)
        model = cls(
            *parts,
            config,
            model_save_dir=folder,
            compile=compile and not quantization_config,
            compile_only=compile_only,
            **kwargs,
        )
        if quantization_config:
            model._apply_quantization(quantization_config, compile_only, compile, str(model_id))
        return model

    @classmethod
    def _export(cls, model_id: str | Path, config=None, vision_tower: str | None = None, **kwargs) -> OVModelForLlava:
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        kwargs.pop("export", None)
        quantization_config, load_in_8bit = kwargs.pop("quantization_config", None), kwargs.pop("load_in_8bit", None)
        if load_in_8bit and not quantization_config:
            quantization_config = {"bits": 8}
        # As in Optimum: `load_in_8bit=False` also keeps large models as they are
        # (and `{"bits": 4}` stands for the recipe only until OVConfig makes it something else)
        recipe = recipe_of(quantization_config) if quantization_config else None
        ov_config = OVConfig(quantization_config=recipe) if recipe or load_in_8bit is False else None
        folder = _temporary_folder("export-")
        model_kwargs = {"vision_tower": vision_tower} if vision_tower else None
        main_export(model_id, folder.name, ov_config=ov_config, model_kwargs=model_kwargs, **options)
        model = cls.from_pretrained(folder.name, **kwargs)
        model._exported_to = folder  # deleted with the model
        return model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As [`~transformers.PreTrainedModel.num_parameters`], of matrix multiplications, convolutions and embedding tables.

        Norms, biases and position embeddings, less than a thousandth at 7B, are not counted. Compressed weights count as what they
        stand for.

        Args:
            only_trainable: count what can be trained, which is nothing.
            exclude_embeddings: leave the embedding table out.
        """
        files = [PARTS["language_model"], PARTS["vision_embeddings_model"]]
        files += [] if exclude_embeddings else [PARTS["text_embeddings_model"]]
        graphs = [openvino.Core().read_model(Path(self.model_save_dir) / file) for file in files]
        return 0 if only_trainable else sum(share.parameters for graph in graphs for share in weight_shares(graph))

    def chat(self, processor: Any, **kwargs) -> ChatSession:
        """Begin a conversation that keeps the cache of its earlier turns. Any number of them share this model's weights.

        Args:
            processor: the bundle's.
            kwargs: those of [`~optimum_llava_ov.chat.session.ChatSession`]: `system`, `messages`, `context_window`, `when_full`,
                and options of `generate`.
        """
        return ChatSession(OpenVINOEngine(self, processor), processor, self.config, **kwargs)

    @staticmethod
    def _resolve_default_quantization_config(model_name_or_path: str, quantization_config):
        """The host looks recipes up by the model's name; ours are the same for every LLaVA-MPT."""
        return recipe_of(quantization_config)

    def _apply_quantization(
        self, quantization_config, compile_only: bool, compile_model: bool, model_name_or_path: str, *args, **kwargs
    ) -> None:
        """Compress the loaded parts in memory, just as the export compresses them."""
        if compile_only:
            raise ValueError("A model loaded with compile_only=True cannot be compressed. Load it without.")
        recipe = recipe_of(self._quantization_config or quantization_config)
        for part, ov_model in self.ov_models.items():
            config, dataset = recipe_for_part(recipe, part), None
            if config is None:
                continue
            if part == LANGUAGE_MODEL and needs_data(config):
                processor = load_processor(self.model_save_dir)
                dataset = calibration_dataset(config.dataset, config.num_samples, processor, Path(self.model_save_dir))
            compress(ov_model, config, dataset)
        self._differs_from_files = True
        self.clear_requests()
        self._openvino_config = openvino_config(None, recipe, getattr(self.config, "converted_from", {}))
        self._set_ov_config_parameters()
        if compile_model:
            self.compile()

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> CommitInfo | None:
        """Write the whole bundle, processor, tokenizers and card included. An existing bundle stays until the new one is whole.

        Parts that were not changed are copied, so loading and saving again gives the same bytes.

        Args:
            push_to_hub: also publish it, as `repo_id`, or by the folder's name.
            kwargs: those of [`push_to_hub`].

        Raises:
            [`BundleError`]: `save_directory` holds something else.
            `TypeError`: there is no such option; suggests the nearest.
        """
        check_options(
            "save_pretrained",
            kwargs,
            names_of(self.save_pretrained) | names_of(self.push_to_hub) | _options_of_transformers(),
        )
        source = self._whole_source()
        with staged(save_directory, tokenizers=(source / TOKENIZERS[0]).exists()) as folder:
            if self._differs_from_files:
                self._save_pretrained(folder)
            self.generation_config.save_pretrained(folder)
            for name in FILES if self._differs_from_files else (*FILES, *EXTRA_FILES):  # quality is that of the files
                if (source / name).exists() and not (folder / name).exists():
                    shutil.copyfile(source / name, folder / name)
            if self._differs_from_files:
                update_card(folder)
        if push_to_hub:
            kwargs.setdefault("repo_id", kwargs.pop("repository_id", None) or Path(save_directory).resolve().name)
            return self._push(save_directory, **kwargs)
        return None

    def push_to_hub(
        self,
        repo_id: str | Path | None = None,
        repository_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        save_directory: str | Path | None = None,
        **kwargs,
    ) -> CommitInfo:
        """Publish the bundle in one commit. Arguments are those of transformers.

        Optimum's older `push_to_hub(save_directory, repository_id)` publishes the bundle in that folder, and writes it if it is not there.

        Args:
            repo_id: `owner/name`; just `name` is yours. Created if it does not exist.
            private: whether a repository that is created is private.
            token: with write permission; that of `hf auth login` or HF_TOKEN if not given.
            revision: branch, created if it does not exist.
            create_pr: propose it as a pull request.
            tags: more tags for the card.

        Raises:
            [`HubError`]: the Hub refused, or could not be reached; nothing is published then.
            `TypeError`: there is no such option; suggests the nearest.
        """
        check_options("push_to_hub", kwargs, names_of(self.push_to_hub) | _options_of_transformers())
        options = {"private": private, "token": token, "commit_message": commit_message, "revision": revision}
        options |= {"commit_description": commit_description, "create_pr": create_pr, "tags": tags}
        if repository_id is not None:
            folder = Path(save_directory or repo_id)
            if not (folder / "config.json").exists():
                self.save_pretrained(folder)
            return self._push(folder, repo_id=repository_id, **options)
        with _temporary_folder("push-") as folder:
            self.save_pretrained(Path(folder) / "bundle")
            return self._push(Path(folder) / "bundle", repo_id=str(repo_id), **options)

    @staticmethod
    def _push(folder: str | Path, repo_id: str, **options) -> CommitInfo:
        known = names_of(push_bundle)
        return push_bundle(folder, repo_id, **{name: value for name, value in options.items() if name in known})

    def _whole_source(self) -> Path:
        """Folder of the files this model was loaded from, with those that running it did not need."""
        source = Path(self.model_save_dir)
        if all((source / name).exists() for name in FILES):
            return source
        repository = repository_of_snapshot(source)
        return repository.download((*FILES, *EXTRA_FILES)) if repository else source

    def half(self) -> OVModelForLlava:
        self._differs_from_files = True
        return super().half()


class OVModelForLlavaMPT(OVModelForLlava):
    """[`OVModelForLlava`] around an MPT, and nothing else."""


def _download(model_id: str | Path, kwargs: dict[str, Any]) -> Path:
    """Folder of a bundle's files: all of them, so that it can be saved and published, and no others.

    What was said about the Hub is taken out of `kwargs`, for it has been heeded.
    """
    options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    repository = Repository(str(model_id), **{name: value for name, value in options.items() if value is not None})
    folder = repository.folder
    if not repository.is_local:
        config = repository.require("config.json", "it says what the model is")
        check_is_llava_mpt(model_id, read_json(config, error_class=BundleError))
        folder = repository.download((*FILES, *EXTRA_FILES))
    check_readable(folder)
    return folder


def _options_of_transformers() -> set[str]:
    """Options that code for transformers passes on when it saves or publishes: about shards, which a bundle does not have."""
    return names_of(PreTrainedModel.save_pretrained) | names_of(PreTrainedModel.push_to_hub) | {"safe_serialization"}


def _temporary_folder(prefix: str) -> tempfile.TemporaryDirectory:
    """Beside the Hub's cache: /tmp is memory on many systems, and a 7B model does not fit there twice."""
    parent = Path(constants.HF_ASSETS_CACHE) / "optimum-llava-ov"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
