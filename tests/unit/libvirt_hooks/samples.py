"""Domain XML as libvirt 9.0 passes it to its hooks (shortened), and generators of damaged input."""

from __future__ import annotations

import random

UUID = "4dea22b3-1d52-48f3-a516-782e98ab3fa0"

DOMAIN = f"""<domain type='qemu' id='7'>
  <name>web-1</name>
  <uuid>{UUID}</uuid>
  <metadata><app:note xmlns:app='http://example.com/app'><name>not the name</name></app:note></metadata>
  <memory unit='KiB'>98304</memory>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type><kernel>/boot/vmlinux</kernel></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type='network'>
      <mac address='52:54:00:AB:00:01'/>
      <source network='default' portid='6a1b4c6e-4e0e-4b87-9d7f-0f3a5f1b6f6e' bridge='virbr0'/>
      <target dev='vnet0'/>
      <model type='virtio'/>
    </interface>
    <interface type='bridge'>
      <mac address='52:54:00:ab:00:02'/>
      <source bridge='br1'/>
      <target dev='vnet1'/>
    </interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
""".encode()

OPERATIONS = ["prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "attach"]


def arguments(rng: random.Random) -> list[str]:
    """Return arguments of a hook: valid, nearly valid or garbage."""
    right = [rng.choice(["web-1", "a b", "ü", "-", "$(reboot)"]), rng.choice(OPERATIONS), "begin", "-"]
    twist = rng.randrange(6)
    if twist == 0:
        return right[: rng.randrange(5)]
    if twist == 1:
        right[rng.randrange(4)] = _text(rng)
    elif twist == 2:
        return [_text(rng) for _ in range(rng.randrange(8))]
    elif twist == 3:
        right += [_text(rng)] * rng.randrange(3)
    return right


def stdin(rng: random.Random) -> bytes:
    """Return standard input of a hook: valid, damaged or garbage."""
    twist = rng.randrange(7)
    if twist == 0:
        return DOMAIN
    if twist == 1:
        return DOMAIN[: rng.randrange(len(DOMAIN))]
    if twist == 2:
        data = bytearray(DOMAIN)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if twist == 3:
        cut = rng.randrange(len(DOMAIN))
        return DOMAIN[cut:] + DOMAIN[:cut]
    if twist == 4:
        return rng.randbytes(rng.randrange(2000))
    if twist == 5:
        return b"<!DOCTYPE domain [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]>" + DOMAIN
    return b""


def _text(rng: random.Random) -> str:
    """Anything that can be an argument of a process: all but NUL, and any bytes (PEP 383)."""
    length = rng.choice([0, 1, 3, 20, 300, 5000])
    return bytes(rng.randrange(1, 256) for _ in range(length)).decode("utf-8", "surrogateescape")
