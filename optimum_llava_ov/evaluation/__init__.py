"""Stage 6: what a conversion costs in quality, measured against the checkpoint or another bundle."""
