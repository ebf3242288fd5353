"""Installs systemd units, the libvirt hook and a first configuration. Used by ``virt-ports install`` only."""
