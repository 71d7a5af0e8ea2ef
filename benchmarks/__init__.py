"""Benchmarks: speed against peers, and planted-rank tasks for the methods."""
