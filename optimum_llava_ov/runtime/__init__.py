"""Stage 5: running a bundle from transformers code."""
