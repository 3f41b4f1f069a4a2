"""The commands `optimum-cli llava-ov ...`. `optimum-cli` imports them at every start, so imports must be fast."""
