"""The laboratory: hosts, edges, a router and an internet on one machine."""
