"""Stage 6: publishing a bundle on the Hub."""
