"""``virt-ports doctor`` and ``virt-ports report``: what goes wrong on a machine, each with its remedy. Read-only."""
