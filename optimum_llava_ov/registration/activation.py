"""Register with transformers and Optimum when their modules are imported.

Registration needs modules of the host. Importing them takes seconds, which would delay `import optimum_llava_ov` and
every start of `optimum-cli`. So registration waits until the host imports them: a finder on `sys.meta_path` runs a
callback right after such a module is imported.

At that moment, other modules of the host that import this one are only half imported. If a callback imported them, it
would get incomplete modules. So the callbacks for transformers import only modules of transformers that are complete:
the configuration needs only such modules, and the other classes are registered as [`_Deferred`].
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable


class _Deferred(type):
    """Make placeholders for classes. A placeholder imports its class when it is used.

    Args:
        name: name of the class.
        module: module of the class.
        known: attributes that can be read without importing the class.
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

    from optimum_llava_ov.checkpoint.families import FAMILIES

    for family in FAMILIES:
        AutoConfig.register(family.model_type, family, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

    from optimum_llava_ov.checkpoint.families import FAMILIES

    for family in FAMILIES:
        model = _Deferred(family.torch_class, "optimum_llava_ov.models.llava", config_class=family)
        AutoModelForImageTextToText.register(family, model, exist_ok=True)


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from optimum_llava_ov.checkpoint.families import FAMILIES

    processor = _Deferred("OriginalLlavaProcessor", "optimum_llava_ov.bundle.settings")
    for family in FAMILIES:
        AutoProcessor.register(family, processor, exist_ok=True)


def _host_hook(name: str) -> Callable[[], None]:
    def hook() -> None:
        from optimum_llava_ov.registration import hooks

        # The command is imported at every start of `optimum-cli`. It checks the version when it runs.
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
    """Let the loader of a host's module run a callback after the import. This finder finds no modules itself."""

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
    """Register with the modules that are imported already, and with the others when they are imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, callback in _AFTER_IMPORT.items():
        if name in sys.modules:
            callback()
    sys.meta_path.insert(0, _Finder())
