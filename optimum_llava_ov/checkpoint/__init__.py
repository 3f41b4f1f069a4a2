"""Read an original checkpoint, on disk or on the Hub: configurations, a tokenizer and mapped tensors."""
