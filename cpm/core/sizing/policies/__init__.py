"""Scaling policies, one module each: how many ports a VM should have."""
