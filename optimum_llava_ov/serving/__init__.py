"""Serve bundles over HTTP with the interface of OpenAI."""
