"""Measure speed and memory of a bundle on this machine."""
