"""Shared by both daemons: configuration files, logging, start and stop, named tasks, the clock, sd_notify."""
