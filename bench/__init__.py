"""Benchmarks: they measure the figures of the README."""
