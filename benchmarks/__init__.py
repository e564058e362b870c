"""Benchmarks against pure PyTorch: ``make bench``."""
