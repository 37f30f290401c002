"""Measurements: what varlik gets right, what it costs, and what stands beside it."""
