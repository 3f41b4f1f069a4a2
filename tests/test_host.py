"""The contract with the libraries below: each private name we rely on, and what to do when it has moved."""

import ast
import importlib
import inspect
import logging
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import run

from optimum_llava_ov import host


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent
ADVICE = (
    "{package} {version} has no {name} any more. Adapt what uses it (`grep -r {last} optimum_llava_ov`) to where it went, or narrow the "
    "bound of {package} in pyproject.toml (for optimum-intel, SUPPORTED_OPTIMUM_INTEL in optimum_llava_ov/host.py, too)."
)
# Names that their owners may move without notice: module, then what is looked up in it
NAMES = {
    "gradio": [
        ("gradio.components", "MultimodalTextbox.async_move_resource_to_block_cache"),
        ("gradio.utils", "get_upload_folder"),
    ],
    "huggingface-hub": [
        ("huggingface_hub", "_CACHED_NO_EXIST"),
        ("huggingface_hub.constants", "DEFAULT_REVISION"),
        ("huggingface_hub.constants", "HF_ASSETS_CACHE"),
        ("huggingface_hub.constants", "HF_HUB_DISABLE_XET"),
        ("huggingface_hub.constants", "HUGGINGFACE_HUB_CACHE"),
        ("huggingface_hub.file_download", "repo_folder_name"),
        ("huggingface_hub.utils", "build_hf_headers"),
        ("huggingface_hub.utils", "get_session"),
        ("huggingface_hub.utils", "validate_repo_id"),
    ],
    "nncf": [
        ("nncf.quantization.algorithms.weight_compression.openvino_backend", "compress_weight"),
        ("nncf.quantization.algorithms.weight_compression.openvino_backend", "create_ov_const_from_tensor"),
    ],
    "openvino": [("openvino._offline_transformations", "paged_attention_transformation")],
    "optimum": [
        ("optimum.commands.base", "BaseOptimumCLICommand.run"),
        ("optimum.exporters.tasks", "TasksManager.create_register"),
    ],
    "optimum-intel": [
        ("optimum.commands.export.openvino", "OVExportCommand.parse_args"),
        ("optimum.commands.export.openvino", "OVExportCommand.run"),
        ("optimum.commands.export.openvino", "no_compression_parameter_provided"),
        ("optimum.commands.export.openvino", "prepare_wc_config"),
        ("optimum.exporters.openvino.__main__", "main_export"),
        ("optimum.exporters.openvino.base", "OpenVINOConfig"),
        ("optimum.exporters.openvino.config", "TextDecoderWithPositionIdsOpenVINOConfig"),
        ("optimum.exporters.openvino.convert", "_save_model"),
        ("optimum.exporters.openvino.convert", "allow_skip_tracing_check"),
        ("optimum.exporters.openvino.convert", "export"),
        ("optimum.exporters.openvino.convert", "export_from_model"),
        ("optimum.exporters.openvino.convert", "save_model"),
        ("optimum.exporters.openvino.model_configs", "BaseVLMOpenVINOConfig"),
        ("optimum.exporters.openvino.model_configs", "VLMConfigBehavior"),
        ("optimum.intel.openvino.configuration", "_DEFAULT_4BIT_WQ_CONFIGS"),
        ("optimum.intel.openvino.configuration", "_DEFAULT_8BIT_WQ_CONFIGS"),
        ("optimum.intel.openvino.modeling_base", "OVBaseModel.from_pretrained"),
        ("optimum.intel.openvino.modeling_visual_language", "MODEL_TYPE_TO_CLS_MAPPING"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelForVisualCausalLM._save_pretrained"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelForVisualCausalLM._set_ov_config_parameters"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM._compile_model"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM._compile_text_emb"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM._get_past_length"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM._reorder_cache"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM.compile"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM.embed_tokens"),
        ("optimum.intel.openvino.modeling_visual_language", "OVModelWithEmbedForCausalLM.forward"),
        ("optimum.intel.openvino.modeling_visual_language", "_OVLlavaForCausalLM"),
        ("optimum.intel.openvino.modeling_visual_language", "main_export"),
        ("optimum.intel.openvino.quantization", "_weight_only_quantization"),
        ("optimum.intel.openvino.utils", "PREDEFINED_VISUAL_LM_DATASETS"),
    ],
    "transformers": [
        ("transformers.generation.candidate_generator", "PromptLookupCandidateGenerator.get_candidates"),
        ("transformers.generation.candidate_generator", "PromptLookupCandidateGenerator.update_candidate_strategy"),
        ("transformers.generation.utils", "GenerationMixin._expand_inputs_for_generation"),
        ("transformers.generation.utils", "GenerationMixin._get_candidate_generator"),
        ("transformers.generation.utils", "GenerationMixin._get_logits_processor"),
        ("transformers.models.auto.configuration_auto", "AutoConfig.register"),
    ],
}


@pytest.mark.parametrize(
    ("package", "module", "name"),
    [(package, module, name) for package, names in NAMES.items() for module, name in names],
    ids=[f"{module}.{name}" for names in NAMES.values() for module, name in names],
)
def test_private_names(package, module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    advice = ADVICE.format(
        package=package, version=version(package), name=f"{module}.{name}", last=name.split(".")[-1]
    )
    assert found is not None, advice


@pytest.mark.parametrize("package", NAMES)
def test_private_names_need_an_upper_bound(package):
    """What may move without notice must not come with an update of the library."""
    bound = re.search(
        rf'^ +"{package}(>=[^";]*)",$|= \["{package}(>=[^";]*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert bound is not None, f"pyproject.toml has no bounds for {package}"
    assert re.fullmatch(r">=[\d.]+,<[\d.]+", bound[1] or bound[2])


def test_no_private_name_is_used_that_is_not_listed():
    """Imports of `_names` and from `_modules`, and `module._name`, of other packages."""
    listed = {f"{module}.{name}".split(".")[-1] for names in NAMES.values() for module, name in names}
    listed |= {part for names in NAMES.values() for module, _ in names for part in module.split(".")}
    unlisted = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / "optimum_llava_ov").rglob("*.py"))
        for name in _private_names(ast.parse(file.read_text()))
        if name not in listed
    ]
    assert not unlisted, f"Add these to NAMES in {Path(__file__).name}: {unlisted}"


def _private_names(tree: ast.Module):
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("optimum_llava_ov"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if re.match("_[a-zA-Z]", name))
            modules |= {alias.asname or alias.name for alias in node.names if (alias.asname or alias.name).islower()}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match("_[a-zA-Z]", node.attr):
            continue
        owner = node.value
        is_super = isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        if is_super or (isinstance(owner, ast.Name) and owner.id in modules):
            yield node.attr


def test_alibi_is_where_paged_attention_has_it(shapes_bundle):
    """The twelfth input of OpenVINO's PagedAttention. What it holds decides whether a graph may run paged at all."""
    import numpy as np
    import openvino

    from optimum_llava_ov.models.alibi import alibi_slopes
    from optimum_llava_ov.runtime.graph import paged

    graph = paged(openvino.Core().read_model(shapes_bundle / "openvino_language_model.xml"))
    advice = (
        f"PagedAttention of openvino {version('openvino')} takes its ALiBi slopes elsewhere. Look at its inputs in "
        "openvino/op/paged_attention.hpp, adapt _ALIBI_SLOPES in optimum_llava_ov/runtime/graph.py, or narrow the bound of openvino."
    )
    assert graph is not None, advice
    attentions = [node for node in graph.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    assert len(attentions) == 4
    for node in attentions:
        slopes = node.input_value(11).get_node()
        while slopes.get_type_name() != "Constant":
            slopes = slopes.input_value(0).get_node()
        np.testing.assert_allclose(np.abs(slopes.data.ravel()), alibi_slopes(8, 16).numpy(), rtol=1e-3, err_msg=advice)


def test_main_export_still_takes_what_we_pass_on():
    from optimum.exporters.openvino.__main__ import main_export

    parameters = inspect.signature(main_export.__wrapped__).parameters
    expected = {
        "model_name_or_path",
        "output",
        "task",
        "ov_config",
        "stateful",
        "convert_tokenizer",
        "model_kwargs",
        "cache_dir",
    }
    assert expected <= set(parameters), (
        f"main_export of optimum-intel {version('optimum-intel')} lost {expected - set(parameters)}"
    )


def test_unknown_version_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setattr(host, "version", lambda name: "9.9.9")
    with caplog.at_level(logging.WARNING):
        assert not host.is_supported()
    assert 'pip install "optimum-intel>=2.2,<2.3"' in caplog.text


ORDERS = {
    "plugin first": "import optimum_llava_ov; from optimum.exporters.openvino import main_export; from optimum.intel import OVModelForVisualCausalLM",
    "plugin last": "from optimum.intel import OVModelForVisualCausalLM; import optimum_llava_ov; from optimum.exporters.openvino import main_export",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports_does_not_matter(order):
    code = ORDERS[order] + (
        "; import optimum.intel.openvino.modeling_visual_language as modeling"
        "; from transformers import AutoConfig"
        "; assert main_export.__wrapped__ is not main_export and modeling.main_export is main_export"
        "; assert issubclass(modeling.MODEL_TYPE_TO_CLS_MAPPING['llava'], modeling._OVLlavaForCausalLM)"
        "; assert modeling.MODEL_TYPE_TO_CLS_MAPPING['llava'] is not modeling._OVLlavaForCausalLM"
        "; assert AutoConfig.for_model('llava_mpt').model_type == 'llava_mpt'"
    )
    run(sys.executable, "-c", code, fresh=True)


def test_import_is_light():
    """Registration waits until the host is imported by somebody who needs it."""
    code = "import sys, optimum_llava_ov; print({'torch', 'transformers', 'openvino', 'optimum.intel'} & set(sys.modules))"
    assert run(sys.executable, "-c", code, fresh=True).stdout.strip() == "set()"


def test_a_broken_plugin_does_not_break_optimum():
    code = "import sys; sys.modules['optimum_llava_ov'] = None; sys.argv = ['optimum-cli', '--help']; from optimum.commands.optimum_cli import main; main()"
    result = run(sys.executable, "-c", code, fresh=True)
    assert "usage: optimum-cli" in result.stdout
    assert "other models are not affected" in result.stderr
