"""Connections that begin on this host's VMs: when to ask for more ports, and what waits meanwhile. Pure."""
