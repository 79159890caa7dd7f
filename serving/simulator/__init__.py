"""Discrete-event instances driven by the real Conductor (floor 4)."""
