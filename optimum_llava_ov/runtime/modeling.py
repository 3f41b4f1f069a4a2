"""`OVModelForLlavaMPT`: a bundle in transformers code."""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import torch
from huggingface_hub import CommitInfo, constants
from optimum.intel import OVConfig, OVModelForVisualCausalLM
from optimum.intel.openvino.modeling_base import OVBaseModel
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.bundle.check import check_is_llava_mpt, check_readable, load_processor, naming_damage
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, LANGUAGE_MODEL, PARTS, TOKENIZERS, weights_file
from optimum_llava_ov.bundle.staging import complete_replacement, staged
from optimum_llava_ov.bundle.weights import weight_shares
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS, Repository, repository_of_snapshot
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.export.calibration import calibration_dataset
from optimum_llava_ov.export.compression import compress
from optimum_llava_ov.export.recipes import needs_data, recipe_for_part, recipe_of
from optimum_llava_ov.export.record import openvino_config
from optimum_llava_ov.models.generation import ImageGenerationMixin
from optimum_llava_ov.models.merge import check_token_ids, merge_image_features
from optimum_llava_ov.options import check_options, names_of
from optimum_llava_ov.runtime.cache import DecoderCache
from optimum_llava_ov.runtime.language_model import PA, LanguageModel
from optimum_llava_ov.runtime.mapped import read_once
from optimum_llava_ov.runtime.prompts import ORIGINAL_IMAGE_TOKEN_ID, canonical_prompts
from optimum_llava_ov.runtime.threads import one_torch_thread
from optimum_llava_ov.samples import question_inputs


if TYPE_CHECKING:
    from optimum_llava_ov.chat.session import ChatSession

ATTENTION_BACKEND = "ATTENTION_BACKEND"  # GenAI's name


def _one_at_a_time(method):
    """Let calls that use the same cache wait for each other. Calls with caches of their own run in parallel."""

    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        with (cache if isinstance(cache, DecoderCache) else self.language_model.cache).lock:
            return method(self, *args, **kwargs)

    return locked


class OVModelForLlavaMPT(ImageGenerationMixin, OVModelForVisualCausalLM):
    """LLaVA-MPT on OpenVINO, with the interface of transformers.

    [`generate`] takes what transformers' `generate` takes. Calls from several threads are served one after the other.

    Example:
        model = OVModelForLlavaMPT.from_pretrained("llava-mpt-ov")
        processor = AutoProcessor.from_pretrained("llava-mpt-ov")
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=200)
    """

    _support_new_processing = True  # the host's word for prompts that say `<image>` once for each of its features

    def __init__(
        self,
        language_model: openvino.Model,
        text_embeddings: openvino.Model,
        vision_embeddings: openvino.Model,
        config: PretrainedConfig,
        device: str = "CPU",
        compile: bool = True,
        **kwargs,
    ):
        self._parts_lock = threading.Lock()  # the encoder and the embedding table have one request each
        self._differs_from_files = False
        self.name_or_path = getattr(config, "name_or_path", None)
        # As the caller gave it. The host looks a default up by the model's name, and what it finds then is not ours.
        self._quantization_config = kwargs.get("quantization_config")
        ov_config = {**(kwargs.pop("ov_config", None) or {})}
        attention_backend = kwargs.pop("attention_backend", None) or ov_config.pop(ATTENTION_BACKEND, PA)
        super().__init__(
            language_model, text_embeddings, vision_embeddings, config, device, compile=False, ov_config=ov_config, **kwargs
        )
        # In place of the host's, before anything is compiled
        self.language_model = LanguageModel(
            language_model,
            text_embeddings,
            config=config,
            device=device,
            ov_config=ov_config,
            model_save_dir=self.model_save_dir,
            quantization_config=kwargs.get("quantization_config"),
            compile=self._compile_only,
            compile_only=self._compile_only,
            attention_backend=attention_backend,
        )
        if compile and not self._compile_only:
            self.compile()

    def compile(self) -> None:
        """Compile all parts and run each once, so that the first picture and the first token wait for nothing but themselves."""
        is_new = self.vision_embeddings.request is None
        super().compile()
        if is_new:
            size = self.config.vision_config.image_size
            with read_once(weights_file(self.model_save_dir, "vision_embeddings_model")):
                self.get_image_features(torch.zeros(1, 3, size, size))

    @classmethod
    def from_pretrained(cls, model_id: str | Path, *args, vision_tower: str | None = None, **kwargs) -> OVModelForLlavaMPT:
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
    ) -> OVModelForLlavaMPT:
        """What the host does for each class, for this one: it would look the class up by the model's type, which is not ours alone."""
        check_is_llava_mpt(model_id, config.to_dict())
        folder = Path(model_id)
        device, ov_config = kwargs.get("device", "CPU"), kwargs.get("ov_config")
        parts = [
            cls._compile_model(folder / file, device, ov_config, folder) if compile_only else cls.load_model(folder / file)
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
    def _export(cls, model_id: str | Path, config=None, vision_tower: str | None = None, **kwargs) -> OVModelForLlavaMPT:
        from optimum_llava_ov.export.main import main_export

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

    @_one_at_a_time
    @one_torch_thread()
    def generate(self, inputs: torch.LongTensor | None = None, *args, images: Any = None, **kwargs):
        """As [`~transformers.GenerationMixin.generate`]; code written for the original LLaVA or the OpenVINO notebook runs too.

        Args:
            inputs, input_ids: `(batch, tokens)`. Images may be spelled as the processor does, or as -200, one each.
            pixel_values, images: `(images, 3, height, width)`, the images of all rows in order.
            past_key_values: of the last call with `return_dict_in_generate=True`, if no other call came since. `inputs` are the whole
                conversation, as in transformers.

        Returns:
            As transformers: the prompt, as it was given, and what was generated.

        Raises:
            `ValueError`: another number of images than the prompts have places for; an id that is not in the table; `past_key_values`
                of an earlier call than the last; the model itself as `assistant_model`.
        """
        if kwargs.get("assistant_model") is self:
            raise ValueError(
                "assistant_model is the model itself, which has one cache. Load the assistant as a model of its own."
            )
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("pixel_values") is None and images is not None:
            kwargs["pixel_values"] = _stack(images)
        if prompt is None or kwargs.get("inputs_embeds") is not None:
            return super().generate(prompt, *args, **kwargs)

        check_token_ids(prompt, self._num_embeddings, others=(ORIGINAL_IMAGE_TOKEN_ID,))
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(prompt) if mask is None else mask
        if mask.shape != prompt.shape:  # with `past_key_values`, `input_ids` may be the new tokens alone
            return super().generate(prompt, *args, attention_mask=mask, **kwargs)
        canonical, mask = self._canonical_prompts(prompt, mask)
        output = super().generate(canonical, *args, attention_mask=mask, **kwargs)
        return output if canonical is prompt else _with_prompt(output, prompt, canonical.shape[1])

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
        from optimum_llava_ov.chat.openvino_engine import OpenVINOEngine
        from optimum_llava_ov.chat.session import ChatSession

        return ChatSession(OpenVINOEngine(self, processor), processor, self.config, **kwargs)

    def new_cache(self) -> DecoderCache:
        """An empty cache for `past_key_values` of [`generate`] and [`forward`], beside the model's own.

        Calls with different caches run in parallel. A call continues after the tokens that are in its cache.

        Example:
            cache = model.new_cache()
            output = model.generate(**inputs, past_key_values=cache)
            # The next call takes the whole conversation, and computes only what is new
        """
        return self.language_model.new_cache()

    @property
    def attention_backend(self) -> str:
        """The attention that runs: `"PA"`, paged attention, or `"SDPA"`, that of the bundle's graph. Compiles the model."""
        return self.language_model.attention_backend

    def _reorder_cache(self, past_key_values: DecoderCache, beam_idx: torch.LongTensor) -> DecoderCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _canonical_prompts(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor):
        config = self.config
        borders = (getattr(config, "im_start_token_id", None), getattr(config, "im_end_token_id", None))
        ids, mask = canonical_prompts(
            input_ids,
            attention_mask,
            config.image_token_index,
            config.image_seq_length,
            None if None in borders else borders,
            self.generation_config.pad_token_id or 0,
        )
        unchanged = ids.shape == input_ids.shape and torch.equal(ids * mask, input_ids * attention_mask)
        return (input_ids, attention_mask) if unchanged else (ids, mask)

    @_one_at_a_time
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: `(batch, tokens)`; with a cache, the new tokens only.
            pixel_values: `(images, 3, height, width)`, the images of all rows in order; only with the prompt.
            attention_mask: `(batch, past + tokens)`, 0 for padding, which has no place in the row: what follows it is as near to
                what is before it as if it were not there. All ones if not given.
            past_key_values: what the last call returned, or [`new_cache`]; `None` begins a new batch in the model's own cache.
            inputs_embeds: `(batch, tokens, d_model)`, instead of `input_ids` and images.
            image_features: `(images, image_seq_length, d_model)`, instead of `pixel_values`.
            position_ids: ignored, as ALiBi counts distances.
            logits_to_keep: return logits of so many last positions only; 0 for all.

        Returns:
            `logits`: `(batch, tokens or logits_to_keep, vocab_size)` float32.

        Raises:
            `ValueError`: an id is not in the table, or there is another number of images than `input_ids` has places for.
        """
        if inputs_embeds is None:
            check_token_ids(input_ids, self._num_embeddings)
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values)
            inputs_embeds = self._embed(input_ids, image_features)
        inputs_embeds = inputs_embeds.detach().float()
        return self.language_model.forward(inputs_embeds, attention_mask, past_key_values, logits_to_keep)

    @property
    def _num_embeddings(self) -> int:
        """Rows of the embedding table. The last one is `<image>`, unless a table that somebody else made is larger."""
        return max(self.config.image_token_index + 1, self.config.text_config.vocab_size)

    def _embed(self, input_ids: torch.LongTensor, image_features: torch.Tensor | None) -> torch.Tensor:
        if input_ids.shape[1] == 1 and (inputs_embeds := self.language_model.look_up(input_ids)) is not None:
            return inputs_embeds
        with self._parts_lock:
            inputs_embeds = torch.from_numpy(np.array(self.get_text_embeddings(input_ids)))
        image_token_id = self.config.image_token_index
        if image_features is None:
            if input_ids.shape[1] == 1 or not (input_ids == image_token_id).any():
                return inputs_embeds
            image_features = inputs_embeds.new_empty(0, self.config.image_seq_length, inputs_embeds.shape[-1])
        return merge_image_features(input_ids, inputs_embeds, image_features, image_token_id)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, height, width)` -> `(images, image_seq_length, d_model)` float32, borders included.

        Images that are equal, as in a batch of questions about one picture, are encoded once.
        """
        pixel_values = pixel_values.float()
        places: dict[bytes, list[int]] = {}
        for place, image in enumerate(pixel_values):
            places.setdefault(image.numpy().tobytes(), []).append(place)
        with self._parts_lock:
            features = self.vision_embeddings(pixel_values[[same[0] for same in places.values()]]).last_hidden_state
            repeated = np.empty((len(pixel_values), *features.shape[1:]), dtype=np.float32)
            for same, image_features in zip(places.values(), features):
                repeated[same] = image_features
        return torch.from_numpy(repeated)

    def get_vision_embeddings(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """The host's name of [`get_image_features`]."""
        return self.get_image_features(torch.as_tensor(pixel_values))

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        logits_to_keep=None,
        is_first_iteration=False,
        **kwargs,
    ) -> dict[str, Any]:
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        if logits_to_keep is not None:
            inputs["logits_to_keep"] = logits_to_keep
        if past_length and (input_ids.shape[1] == 0 or attention_mask.shape[1] <= past_length):
            raise ValueError(
                f"past_key_values have {past_length} tokens, and no new ones follow: attention_mask has {attention_mask.shape[1]}, "
                f"input_ids {input_ids.shape[1]}. Give input_ids and attention_mask of the whole conversation."
            )
        if inputs_embeds is not None and not past_length:
            return {**inputs, "inputs_embeds": inputs_embeds}
        num_new_tokens = attention_mask.shape[1] - past_length
        if is_first_iteration or not past_length:
            for name in ("pixel_values", "image_features"):
                if kwargs.get(name) is not None:
                    images = self._images_of_new_tokens(kwargs[name], input_ids, num_new_tokens)
                    inputs[name] = images if len(images) else None
        return {**inputs, "input_ids": input_ids[:, -num_new_tokens:]}

    def _images_of_new_tokens(self, images: torch.Tensor, input_ids: torch.LongTensor, num_new_tokens: int) -> torch.Tensor:
        """Leave out images whose tokens are in the cache, unless only the new images were given."""
        is_image = input_ids == self.config.image_token_index
        totals = is_image.sum(dim=1) // self.config.image_seq_length
        if len(images) != totals.sum():
            return images
        new = is_image[:, -num_new_tokens:].sum(dim=1) // self.config.image_seq_length
        keep = [number >= total - count for total, count in zip(totals.tolist(), new.tolist()) for number in range(total)]
        return images[keep]

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Those of transformers. Guidance runs the model a second time at each step, so it gets a cache of its own."""
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.unconditional_context.update(use_cache=True, past_key_values=self.new_cache())
        return processors

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
            "save_pretrained", kwargs, names_of(self.save_pretrained) | names_of(self.push_to_hub) | _options_of_transformers()
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
        from optimum_llava_ov.hub.push import push_bundle

        known = names_of(push_bundle)
        return push_bundle(folder, repo_id, **{name: value for name, value in options.items() if name in known})

    def _whole_source(self) -> Path:
        """Folder of the files this model was loaded from, with those that running it did not need."""
        source = Path(self.model_save_dir)
        if all((source / name).exists() for name in FILES):
            return source
        repository = repository_of_snapshot(source)
        return repository.download((*FILES, *EXTRA_FILES)) if repository else source

    def half(self) -> OVModelForLlavaMPT:
        self._differs_from_files = True
        return super().half()

    @staticmethod
    def preprocess_inputs(text: str, image=None, processor=None, tokenizer=None, config=None, video=None, audio=None):
        """One user turn as model inputs, as the host's calibration and evaluation code asks for it."""
        if processor is None or video is not None or audio is not None:
            raise ValueError("LLaVA-MPT takes text and pictures, and needs its processor for them.")
        return question_inputs(processor, text, [] if image is None else [image])


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


def _stack(images: Any) -> torch.Tensor:
    """A list of image tensors, or one with a dimension for rows, as `(images, 3, height, width)`."""
    if isinstance(images, (list, tuple)):
        images = torch.stack([torch.as_tensor(image).squeeze(0) for image in images])
    return images.flatten(0, 1) if images.ndim == 5 else images


def _with_prompt(output: Any, prompt: torch.LongTensor, length: int) -> Any:
    """Put the caller's prompt back in front of what was generated; `length` is that of the canonical prompt."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    repeats = sequences.shape[0] // prompt.shape[0]
    sequences = torch.cat([prompt.repeat_interleave(repeats, dim=0), sequences[:, length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
