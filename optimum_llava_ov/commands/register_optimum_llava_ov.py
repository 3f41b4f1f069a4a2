"""Register the commands. `optimum-cli` imports this file at every start, so it must be fast and must not fail."""

import logging


REGISTER_COMMANDS = []

try:
    import optimum_llava_ov  # noqa: F401  the import registers the package with Optimum's exporter
    from optimum_llava_ov.cli.commands import LlavaOVCommand

    REGISTER_COMMANDS.append(LlavaOVCommand)
except Exception:
    logging.getLogger(__name__).exception("optimum-llava-ov could not be loaded; other models are not affected")
