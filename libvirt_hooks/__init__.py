"""The libvirt hook: a short program that libvirt starts and waits for. Standard library only."""
