"""Shared by manager and nodes: values, messages and their JSON encoding, errors, timeouts, wishes."""
