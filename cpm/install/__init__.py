"""Installs systemd units, the libvirt hook and an initial configuration. Used by ``virt-ports install`` only."""
