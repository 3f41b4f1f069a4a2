"""Build the model in torch, in the form that its export needs."""
