"""Stage 6: measure the quality of bundles against the checkpoint or another bundle."""
