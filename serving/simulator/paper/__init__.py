"""Mooncake's tables and figures, recomputed: the paper's number beside ours, with a verdict."""
