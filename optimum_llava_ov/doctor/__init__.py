"""Find out what is wrong with an installation, and what a model needs on this machine."""
