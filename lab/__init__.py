"""
A whole virt-ports site on one machine, made of network namespaces, real libvirtds and real or light guests.

``make lab-up`` builds one for interactive use; the end-to-end tests and the benchmarks build their own, under other
names, from the same parts. Nothing of the product imports this package, and nothing here depends on the
product's internals: it starts its executables, writes their configuration files and runs its hook.
"""
