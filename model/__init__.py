"""Decoder-only transformers, checkpoints, sampling and tokenising (floor 1)."""
