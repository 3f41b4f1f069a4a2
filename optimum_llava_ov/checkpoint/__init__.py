"""Stage 1: an original checkpoint, on disk or on the Hub, as configurations, a tokenizer and mapped tensors."""
