"""Conversation: sessions whose turns cost only their new words, in Python, in the terminal and in the browser."""
