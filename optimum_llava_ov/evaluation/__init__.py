"""Measure the quality of bundles against the checkpoint or another bundle."""
