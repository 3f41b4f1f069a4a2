"""Run a bundle from transformers code."""
