"""Registration with transformers and Optimum, each at the moment it is imported.

Registering needs the host's modules, and importing these takes seconds, which `import optimum_llava_ov` and every start of
`optimum-cli` would have to pay. So registration waits for the host: a finder on `sys.meta_path` sees a module being imported
and runs our part right after it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable


def _after_transformers_configs() -> None:
    from transformers import AutoConfig

    from optimum_llava_ov.checkpoint.config import LlavaMptConfig

    AutoConfig.register(LlavaMptConfig.model_type, LlavaMptConfig, exist_ok=True)


def _host_hook(name: str) -> Callable[[], None]:
    def hook() -> None:
        from optimum_llava_ov import host

        # The command is imported at every start of `optimum-cli`, and checks when it runs.
        if name == "hook_command" or host.is_supported():
            getattr(host, name)()

    return hook


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _after_transformers_configs,
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
