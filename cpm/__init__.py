"""Centralized Port Manager: global view, ledger, allocator, scaling, ordering of NAT updates."""
