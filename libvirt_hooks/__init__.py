"""libvirt hooks: short-lived, started and awaited by libvirt; standard library only."""
