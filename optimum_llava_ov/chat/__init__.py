"""Chat with a bundle, in Python and in the terminal. Each turn processes its new tokens only."""
