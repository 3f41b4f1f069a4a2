"""Read by `optimum-cli` at every start, whatever the command: must be light, and must not fail."""

import logging


REGISTER_COMMANDS = []

try:
    import optimum_llava_ov  # noqa: F401  registers itself when Optimum's exporter is imported
    from optimum_llava_ov.cli.commands import LlavaOVCommand

    REGISTER_COMMANDS.append(LlavaOVCommand)
except Exception:
    logging.getLogger(__name__).exception("optimum-llava-ov could not be loaded; other models are not affected")
