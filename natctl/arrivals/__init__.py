"""Connections that begin on this host's VMs: when more ports are asked for, and what is deferred until then. Pure."""
