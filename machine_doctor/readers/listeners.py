"""
Programs that listen to NFQUEUEs and NFLOG groups, from /proc. Tested in ``tests/netns/test_doctor.py``.

Formats: ``seq_show`` in net/netfilter/nfnetlink_queue.c and nfnetlink_log.c (first the number, then the port of the
netlink socket), and net/netlink/af_netlink.c.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from machine_doctor.facts import Listener, Unread
from machine_doctor.readers import files

_HERE: Final = Path("/proc/thread-self/net")
_NETFILTER: Final = "12"  # NETLINK_NETFILTER


def listeners(kind: str) -> tuple[Listener, ...] | Unread:
    """
    Return the listeners in the network namespace of the calling thread.

    :param kind: ``queue`` or ``log``.
    """
    path = _HERE / f"netfilter/nfnetlink_{kind}"
    found = files.text(path)
    if isinstance(found, Unread):
        # Without the module there is neither the file nor a listener.
        return found if os.geteuid() else ()
    ports = {int(row[0]): row[1] for row in map(str.split, found.splitlines()) if len(row) > 1}
    owners = _owners(set(ports.values())) if ports else {}
    return tuple(
        Listener(number, owners.get(port, ""), owners.get(port, "") == "natd") for number, port in sorted(ports.items())
    )


def _owners(ports: set[str]) -> dict[str, str]:
    """Return the names of the programs that have these netlink ports."""
    table = files.text(_HERE / "netlink")
    rows = [row.split() for row in table.splitlines()[1:]] if isinstance(table, str) else []
    inodes = {f"socket:[{row[9]}]": row[2] for row in rows if len(row) > 9 and row[1] == _NETFILTER and row[2] in ports}
    found: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            with os.scandir(process / "fd") as entries:
                links = {str(Path(entry.path).readlink()) for entry in entries}
        except OSError:
            continue
        for link in links & inodes.keys():
            found[inodes[link]] = files.line(process / "comm") or ""
    return found
