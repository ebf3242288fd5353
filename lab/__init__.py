"""
A whole virt-ports site on one machine, made of network namespaces, real libvirtds and real or light guests.

``make lab-up`` builds the one people play with; the end-to-end tests and the benchmarks build their own, under
other names, from the same pieces. Nothing of the product imports this package, and nothing here knows how the
product works inside: it starts its executables, writes their configuration files and runs its hook.
"""
