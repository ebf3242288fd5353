"""Netlink: nftables, conntrack, links and routes. The only package that imports pyroute2."""
