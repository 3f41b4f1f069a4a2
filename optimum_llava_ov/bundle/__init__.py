"""Describe, check and write a bundle: the folder that an export makes."""
