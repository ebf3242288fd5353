"""PCP, NAT-PMP and PORT_SET: a guest asks for ports that lead to it. Pure."""
