"""
Random stories of a whole site in virtual time, each judged after every step: ``make prove``.

The manager, the nodes and their messages are the real ones; kernels, guests, libvirt, the network and time are
simulated (``docs/design/0017-proof-by-simulation.md``).
"""
