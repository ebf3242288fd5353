"""NAT component: programs the host role and the edge role of the data path over netlink."""
