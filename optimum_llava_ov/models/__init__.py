"""Stage 2: the model in torch, in the shape its export needs."""
