"""Traces, arrival processes and request outcomes, shared by live and simulated runs. Pure Python."""
