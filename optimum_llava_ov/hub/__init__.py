"""Publish a bundle on the Hub."""
