"""Thin readers: files, netlink and sockets into facts. Each changes nothing, and says what it could not read."""
