"""Attention on one mesh, everything else on another; cost model and planner (floor 3)."""
