"""Stage 5: run a bundle from transformers code."""
