"""Metrics of both daemons: their declarations, histograms, and Prometheus' text format. Pure."""
