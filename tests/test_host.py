"""The contract with Optimum: each private name we rely on, and what to do when it has moved."""

import importlib
import inspect
import logging
import sys
from importlib.metadata import version

import pytest
from conftest import run

from optimum_llava_ov import host


ADVICE = (
    "optimum-intel {version} has no {name} any more. Adapt optimum_llava_ov/host.py to where it went, or narrow "
    "SUPPORTED_OPTIMUM_INTEL and the dependency in pyproject.toml."
)


@pytest.mark.parametrize(
    "name",
    [
        "optimum.commands.export.openvino.OVExportCommand.parse_args",
        "optimum.commands.export.openvino.OVExportCommand.run",
        "optimum.commands.export.openvino.no_compression_parameter_provided",
        "optimum.commands.export.openvino.prepare_wc_config",
        "optimum.exporters.openvino.__main__.main_export",
        "optimum.exporters.openvino.convert._save_model",
        "optimum.exporters.openvino.convert.allow_skip_tracing_check",
        "optimum.exporters.openvino.convert.export",
        "optimum.exporters.openvino.convert.export_from_model",
        "optimum.exporters.openvino.convert.save_model",
        "nncf.quantization.algorithms.weight_compression.openvino_backend.create_ov_const_from_tensor",
        "optimum.exporters.openvino.config.TextDecoderWithPositionIdsOpenVINOConfig",
        "optimum.exporters.openvino.model_configs.BaseVLMOpenVINOConfig",
        "optimum.exporters.openvino.model_configs.VLMConfigBehavior",
        "optimum.intel.openvino.configuration._DEFAULT_4BIT_WQ_CONFIGS",
        "optimum.intel.openvino.configuration._DEFAULT_8BIT_WQ_CONFIGS",
        "optimum.intel.openvino.modeling_visual_language.MODEL_TYPE_TO_CLS_MAPPING",
        "optimum.intel.openvino.modeling_visual_language.OVModelWithEmbedForCausalLM",
        "optimum.intel.openvino.modeling_visual_language._OVLlavaForCausalLM",
        "optimum.intel.openvino.modeling_visual_language.main_export",
        "optimum.intel.openvino.quantization._weight_only_quantization",
        "optimum.intel.openvino.utils.PREDEFINED_VISUAL_LM_DATASETS",
    ],
)
def test_private_names(name):
    modules = [part for part in name.split(".") if part != "OVExportCommand"]
    found = importlib.import_module(".".join(modules[:-1]))
    found = getattr(found, "OVExportCommand", None) if "OVExportCommand" in name else found
    assert hasattr(found, modules[-1]), ADVICE.format(version=version("optimum-intel"), name=name)


def test_the_language_models_class_still_has_what_we_replace():
    from optimum.intel.openvino.modeling_visual_language import OVModelWithEmbedForCausalLM

    for name in ("_compile_model", "_reorder_cache", "compile", "embed_tokens", "forward"):
        assert hasattr(OVModelWithEmbedForCausalLM, name), ADVICE.format(version=version("optimum-intel"), name=name)


def test_main_export_still_takes_what_we_pass_on():
    from optimum.exporters.openvino.__main__ import main_export

    parameters = inspect.signature(main_export.__wrapped__).parameters
    expected = {"model_name_or_path", "output", "task", "ov_config", "stateful", "convert_tokenizer", "model_kwargs", "cache_dir"}
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
    run(sys.executable, "-c", code)


def test_import_is_light():
    """Registration waits until the host is imported by somebody who needs it."""
    code = "import sys, optimum_llava_ov; print({'torch', 'transformers', 'openvino', 'optimum.intel'} & set(sys.modules))"
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"


def test_a_broken_plugin_does_not_break_optimum():
    code = "import sys; sys.modules['optimum_llava_ov'] = None; sys.argv = ['optimum-cli', '--help']; from optimum.commands.optimum_cli import main; main()"
    result = run(sys.executable, "-c", code)
    assert "usage: optimum-cli" in result.stdout
    assert "other models are not affected" in result.stderr
