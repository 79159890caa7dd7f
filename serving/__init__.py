"""Engines, the Conductor, the simulator and the HTTP API."""
