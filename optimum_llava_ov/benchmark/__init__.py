"""Stage 6: how fast a bundle answers on this machine, and in how much memory."""
