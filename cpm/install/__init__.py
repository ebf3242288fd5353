"""Puts the product on a machine: units, hook and a first configuration. Used by ``virt-ports install`` only."""
