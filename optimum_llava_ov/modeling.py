"""`OVModelForLlava`: load, compress, save and publish a bundle in transformers code, and chat with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo, constants
from optimum.intel import OVConfig
from optimum.intel.openvino.modeling_base import OVBaseModel
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.bundle.check import check_is_llava, check_readable, load_processor, naming_damage, read_graph
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, LANGUAGE_MODEL, PARTS, TOKENIZERS
from optimum_llava_ov.bundle.precision import weight_shares
from optimum_llava_ov.bundle.provenance import openvino_config
from optimum_llava_ov.bundle.staging import complete_replacement, staged
from optimum_llava_ov.chat.openvino_engine import OpenVINOEngine
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.checkpoint.reader import CHECKPOINT_OPTIONS, find_original
from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS, Repository, repository_of_snapshot
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.export.calibration import calibration_dataset
from optimum_llava_ov.export.compression import compress
from optimum_llava_ov.export.pipeline import main_export
from optimum_llava_ov.export.recipes import needs_data, recipe_for_part, recipe_of
from optimum_llava_ov.hub.push import push_bundle
from optimum_llava_ov.kernels.extension import AUTO, MATMUL_KERNEL
from optimum_llava_ov.options import check_options, names_of
from optimum_llava_ov.runtime.language_model import PA
from optimum_llava_ov.runtime.modeling import ATTENTION_BACKEND, OVLlavaModel


class OVModelForLlava(OVLlavaModel):
    """Run a LLaVA on OpenVINO with the interface of transformers.

    [`generate`] takes the arguments of transformers' `generate`. Calls from several threads run one after the
    other, unless each has its own cache ([`new_cache`]).

    ```python
    model = OVModelForLlava.from_pretrained("llava-1.5-ov")
    processor = AutoProcessor.from_pretrained("llava-1.5-ov")
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=200)
    ```
    """

    _support_new_processing = True  # Optimum's name for prompts that repeat `<image>` once for each of its features

    _text_model_type: ClassVar[str | None] = None  # the only type of language model that the class loads

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path | Repository,
        *args,
        vision_tower: str | None = None,
        conversation: str | None = None,
        tokenizer: str | None = None,
        base_model: str | None = None,
        adapters: Sequence[str] = (),
        **kwargs,
    ) -> OVModelForLlava:
        """Load a bundle, or convert an original checkpoint on the fly.

        The converted bundle is written to a temporary folder next to the Hub's cache. Keep it with
        [`save_pretrained`].

        Args:
            model_id: Folder or model id of a bundle, or of an original LLaVA checkpoint. Bundles with a LLaVA that
                Optimum exported from transformers' format are loaded too.
            vision_tower: Folder or model id of an original checkpoint's vision tower. Default: the one that its
                config.json names.
            conversation: How an original checkpoint's prompts are written, such as "vicuna_v1". Default: chosen from
                its files and names; see docs/checkpoints.md.
            tokenizer: Folder or model id of an original checkpoint's tokenizer. Default: its own.
            base_model: Folder or model id of the base model of a LoRA adapter, a projector or delta weights. Default:
                the one that these name; see docs/fine-tunes.md.
            adapters: Folders or model ids of LoRA adapters or projectors to merge into an original checkpoint.
            kwargs: Arguments of [`OVModelForVisualCausalLM.from_pretrained`]: `device`, `ov_config`, `compile`,
                `cache_dir`, `token`, `revision`, `subfolder`, `local_files_only`, ... `ov_config` may also have
                GenAI's `ATTENTION_BACKEND`: `"PA"` (paged attention, the default on CPU) or `"SDPA"`; and
                `MATMUL_KERNEL`: what multiplies compressed weights: `"avx2"` (this package's), `"openvino"`, or
                `"auto"` (the faster one on this processor).

        Raises:
            [`BundleError`]: `model_id` is not a LLaVA of this class, or one of its files is missing or damaged.
            [`HubError`]: The Hub does not know `model_id`, refuses access to it, or cannot be reached.
        """
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        repository = Repository.of(model_id, **options)
        complete_replacement(repository.name)
        repository = repository.at_one_commit("config.json")
        original = find_original(repository, base_model=base_model)
        if original is not None:
            own = {"vision_tower": vision_tower, "conversation": conversation, "tokenizer": tokenizer}
            return cls._export(original, **own, base_model=base_model, adapters=adapters or None, **kwargs)
        folder = _download(repository, cls._text_model_type)
        if kwargs.get("compile_only") and kwargs.get("ov_config"):  # Optimum passes all of it to OpenVINO
            kwargs["ov_config"] = {**kwargs["ov_config"]}
            kwargs["attention_backend"] = kwargs["ov_config"].pop(ATTENTION_BACKEND, PA)
            kwargs["matmul_kernel"] = kwargs["ov_config"].pop(MATMUL_KERNEL, AUTO)
        with naming_damage(folder):
            # Skip Optimum's method of this name: without a network it looks for the folder in the Hub's cache
            return super(OVBaseModel, cls).from_pretrained(folder, *args, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        quantization_config: Any = None,
        load_in_8bit: bool | None = None,
        compile: bool = True,  # noqa: A002  Optimum's name
        compile_only: bool = False,
        **kwargs,
    ) -> OVModelForLlava:
        """Load the parts of a bundle into this class.

        Optimum's method would choose the class by the model type, which other models share.
        """
        check_is_llava(model_id, config.to_dict(), cls._text_model_type)
        folder = Path(model_id)
        device, ov_config = kwargs.get("device", "CPU"), kwargs.get("ov_config")
        language_model, text_embeddings, vision_embeddings = (
            cls._compile_model(folder / file, device, ov_config, folder)
            if compile_only
            else cls.load_model(folder / file)
            for file in PARTS.values()
        )
        if (folder / "generation_config.json").exists():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
        quantization_config = quantization_config or ({"bits": 8} if load_in_8bit else None)
        model = cls(
            language_model,
            text_embeddings,
            vision_embeddings,
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
    def _export(
        cls,
        model_id: str | Path | Repository,
        config=None,  # noqa: ARG003  Optimum passes it
        **kwargs,
    ) -> OVModelForLlava:
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        model_kwargs = {name: value for name in CHECKPOINT_OPTIONS if (value := kwargs.pop(name, None)) is not None}
        kwargs.pop("export", None)
        quantization_config, load_in_8bit = kwargs.pop("quantization_config", None), kwargs.pop("load_in_8bit", None)
        if load_in_8bit and not quantization_config:
            quantization_config = {"bits": 8}
        # As in Optimum, `load_in_8bit=False` also leaves large models uncompressed.
        # `{"bits": 4}` must become our recipe before OVConfig turns it into another one.
        recipe = recipe_of(quantization_config) if quantization_config else None
        ov_config = OVConfig(quantization_config=recipe) if recipe or load_in_8bit is False else None
        folder = _temporary_folder("export-")
        main_export(model_id, folder.name, ov_config=ov_config, model_kwargs=model_kwargs, **options)
        model = cls.from_pretrained(folder.name, **kwargs)
        model._exported_to = folder  # deleted with the model
        return model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters of matrix multiplications, convolutions and embedding tables.

        The interface is that of [`~transformers.PreTrainedModel.num_parameters`]. Norms, biases and position
        embeddings are not counted; they are less than a thousandth at 7B. A compressed weight counts as the original
        weights that it stores.

        Args:
            only_trainable: Count trainable parameters only. There are none.
            exclude_embeddings: Leave out the embedding table.
        """
        if only_trainable:
            return 0
        files = [PARTS["language_model"], PARTS["vision_embeddings_model"]]
        files += [] if exclude_embeddings else [PARTS["text_embeddings_model"]]
        graphs = [read_graph(Path(self.model_save_dir) / file) for file in files]
        return sum(share.parameters for graph in graphs for share in weight_shares(graph))

    def chat(self, processor: Any, **kwargs) -> ChatSession:
        """Begin a conversation that keeps the cache of its earlier turns.

        Any number of conversations share this model's weights.

        Args:
            processor: Processor of the bundle.
            kwargs: Arguments of [`~optimum_llava_ov.chat.session.ChatSession`]: `system`, `messages`,
                `context_window`, `when_full`, and options of `generate`.
        """
        return ChatSession(OpenVINOEngine(self, processor), **kwargs)

    @staticmethod
    def _resolve_default_quantization_config(
        model_name_or_path: str,  # noqa: ARG004  Optimum passes it
        quantization_config,
    ):
        """Return the recipe. Optimum chooses it by the model's name; ours is the same for every LLaVA."""
        return recipe_of(quantization_config)

    def _apply_quantization(
        self, quantization_config, compile_only: bool, compile_model: bool, model_name_or_path: str, *args, **kwargs
    ) -> None:
        """Compress the loaded parts in memory, as the export does."""
        if compile_only:
            raise ValueError(
                "A model loaded with compile_only=True cannot be compressed. Load it without compile_only."
            )
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
        """Write the complete bundle, with processor, tokenizers and card.

        An existing bundle is replaced only when the new one is complete. Unchanged parts are copied, so that a bundle
        that is loaded and saved again has the same bytes.

        Args:
            push_to_hub: Also publish the bundle, as `repo_id`. Default of `repo_id`: the folder's name.
            kwargs: Arguments of [`push_to_hub`].

        Raises:
            [`BundleError`]: `save_directory` holds files that are not part of a bundle.
            `TypeError`: An option does not exist. The message suggests the most similar one.
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
            # Measured quality (in the extra files) is true of unchanged files only
            for name in FILES if self._differs_from_files else (*FILES, *EXTRA_FILES):
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
        """Publish the bundle in one commit. The arguments are those of transformers.

        Optimum's older form `push_to_hub(save_directory, repository_id)` publishes the bundle in that folder. It
        writes the bundle first if the folder does not have one.

        Args:
            repo_id: `owner/name`, or `name` for a repository of your own. Created if it does not exist.
            private: Whether a newly created repository is private.
            token: Token with write permission. Default: the one of `hf auth login` or HF_TOKEN.
            revision: Branch to push to. Created if it does not exist.
            create_pr: Propose the bundle as a pull request.
            tags: Additional tags for the card.

        Raises:
            [`HubError`]: The Hub refused, or could not be reached. Nothing was published.
            `TypeError`: An option does not exist. The message suggests the most similar one.
        """
        check_options("push_to_hub", kwargs, names_of(self.push_to_hub) | _options_of_transformers())
        options: dict[str, Any] = {
            "private": private,
            "token": token,
            "commit_message": commit_message,
            "commit_description": commit_description,
            "revision": revision,
            "create_pr": create_pr,
            "tags": tags,
        }
        if repository_id is not None:
            directory = save_directory or repo_id
            if directory is None:
                raise TypeError("push_to_hub(repository_id=...) also needs save_directory. Or give repo_id alone.")
            if not (Path(directory) / "config.json").exists():
                self.save_pretrained(directory)
            return self._push(directory, repo_id=repository_id, **options)
        with _temporary_folder("push-") as temporary:
            self.save_pretrained(Path(temporary) / "bundle")
            return self._push(Path(temporary) / "bundle", repo_id=str(repo_id), **options)

    @staticmethod
    def _push(folder: str | Path, repo_id: str, **options) -> CommitInfo:
        known = names_of(push_bundle)
        return push_bundle(folder, repo_id, **{name: value for name, value in options.items() if name in known})

    def _whole_source(self) -> Path:
        """Return the folder that this model was loaded from. Download files that are missing there if possible."""
        source = Path(self.model_save_dir)
        if all((source / name).exists() for name in FILES):
            return source
        repository = repository_of_snapshot(source)
        return repository.download((*FILES, *EXTRA_FILES)) if repository else source

    def half(self) -> OVModelForLlava:
        self._differs_from_files = True
        return super().half()


class OVModelForLlavaMPT(OVModelForLlava):
    """Run a LLaVA whose language model is an MPT. See [`OVModelForLlava`]."""

    _text_model_type = "mpt"


def _download(repository: Repository, text_model_type: str | None) -> Path:
    """Download all files of a bundle and no others, so that it can be saved and published. Return their folder."""
    folder = repository.folder
    if not repository.is_local:
        config = repository.require("config.json", "it says what the model is")
        check_is_llava(repository.name, read_json(config, error_class=BundleError), text_model_type)
        folder = repository.download((*FILES, *EXTRA_FILES))
    check_readable(folder)
    return folder


def _options_of_transformers() -> set[str]:
    """Return options that code written for transformers passes when it saves or publishes.

    They are accepted and ignored. Most are about shards, which a bundle does not have.
    """
    return names_of(PreTrainedModel.save_pretrained) | names_of(PreTrainedModel.push_to_hub) | {"safe_serialization"}


def _temporary_folder(prefix: str) -> tempfile.TemporaryDirectory:
    """Make a temporary folder next to the Hub's cache.

    /tmp is in memory on many systems, and a 7B model does not fit there twice.
    """
    parent = Path(constants.HF_ASSETS_CACHE) / "optimum-llava-ov"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
