"""Stage 6: publish a bundle on the Hub."""
