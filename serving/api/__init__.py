"""OpenAI-compatible HTTP on top of an engine (floor 5)."""
