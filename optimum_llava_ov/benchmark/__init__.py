"""Stage 6: measure speed and memory of a bundle on this machine."""
