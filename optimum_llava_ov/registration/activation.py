"""Registration with transformers and Optimum, each at the moment it is imported.

Registering needs the host's modules, and importing these takes seconds, which `import optimum_llava_ov` and every start of
`optimum-cli` would have to pay. So registration waits for the host: a finder on `sys.meta_path` sees a module being imported
and runs our part right after it.

At that moment other modules of the host wait for this one, half imported. Whoever imports them again gets the half. So what runs
for transformers imports no module of transformers that is not ready: the configuration is made of modules that are, and the other
classes are entered as [`_Deferred`].
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable


class _Deferred(type):
    """Metaclass of a class that stands for another one, and imports it when it is used.

    Args:
        name: of the class.
        module: where it is.
        known: attributes that can be read without importing it.
    """

    def __new__(mcs, name: str, module: str, **known: Any) -> type:
        return super().__new__(mcs, name, (), {"__module__": module, **known})

    def __init__(cls, *args: Any, **known: Any):
        pass

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._imported(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._imported()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._imported())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._imported())

    def _imported(cls) -> type:
        return getattr(importlib.import_module(cls.__module__), cls.__name__)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from optimum_llava_ov.checkpoint.config import LlavaMptConfig

    AutoConfig.register(LlavaMptConfig.model_type, LlavaMptConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

    from optimum_llava_ov.checkpoint.config import LlavaMptConfig

    model = _Deferred(
        "LlavaMptForConditionalGeneration", "optimum_llava_ov.models.llava_mpt", config_class=LlavaMptConfig
    )
    AutoModelForImageTextToText.register(LlavaMptConfig, model, exist_ok=True)


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from optimum_llava_ov.checkpoint.config import LlavaMptConfig

    AutoProcessor.register(
        LlavaMptConfig, _Deferred("LlavaMptProcessor", "optimum_llava_ov.bundle.settings"), exist_ok=True
    )


def _host_hook(name: str) -> Callable[[], None]:
    def hook() -> None:
        from optimum_llava_ov.registration import hooks

        # The command is imported at every start of `optimum-cli`, and checks when it runs.
        if name == "hook_command" or hooks.is_supported():
            getattr(hooks, name)()

    return hook


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
    "optimum.commands.export.openvino": _host_hook("hook_command"),
    "optimum.exporters.openvino": _host_hook("hook_exporter"),
    "optimum.intel.openvino.modeling_visual_language": _host_hook("hook_modeling"),
    "optimum.intel.openvino.configuration": _host_hook("hook_default_recipes"),
}


class _Finder:
    """Finds nothing itself; lets the loader of a host's module call us when the module is ready."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _AFTER_IMPORT:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                _call_after(spec.loader, _AFTER_IMPORT[fullname])
                return spec
        return None


def _call_after(loader, callback: Callable[[], None]) -> None:
    exec_module = loader.exec_module

    def exec_module_and_register(module):
        exec_module(module)
        callback()

    loader.exec_module = exec_module_and_register


def activate() -> None:
    """Register now with what is imported already, and later with the rest."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, callback in _AFTER_IMPORT.items():
        if name in sys.modules:
            callback()
    sys.meta_path.insert(0, _Finder())
