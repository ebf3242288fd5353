"""
Kernel, settings, clock, disks, daemons and units, from files. Tested in ``tests/unit/machine_doctor/test_readers.py``.

What belongs to a network namespace is read below ``/proc/sys/net`` and ``/proc/thread-self/net``, which are
those of the calling thread.
"""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import gzip
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from machine_doctor.facts import (
    ClockFacts,
    DiskFacts,
    KernelFacts,
    NetworkDaemon,
    Process,
    SysctlLine,
    UnitFacts,
    Unread,
)
from machine_doctor.readers import files

_OPTION: Final = re.compile(r"^CONFIG_(\w+)=([ym])$", re.M)
_SYSCTL_FOLDERS: Final = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d")
"""Of sysctl.d(5): a file in an earlier folder hides one of the same name in a later one."""
_KEYS: Final = (
    "net.ipv4.ip_forward",
    "net.ipv4.fib_multipath_hash_policy",
    "net.bridge.bridge-nf-call-iptables",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_icmp_timeout",
)
_KEYS_BY_INTERFACE: Final = ("forwarding", "rp_filter", "src_valid_mark", "send_redirects")
_UNIT_FOLDERS: Final = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
_UNITS: Final = (
    "natd.service",
    "cpmd.service",
    "libvirtd.service",
    "libvirtd.socket",
    "virtqemud.service",
    "virtqemud.socket",
)
_DAEMONS: Final = frozenset({"natd", "cpmd", "libvirtd", "virtqemud"})
_LISTENS: Final = 0x10000
"""``__SO_ACCEPTCON`` in the flags of /proc/net/unix."""
_STA_UNSYNC: Final = 0x40
_NO: Final = frozenset({"no", "n", "false", "f", "off", "0"})


def kernel(root: Path) -> KernelFacts:
    """Return the kernel's version, options and modules."""
    release = os.uname().release
    loaded = frozenset(path.name for path in (root / "sys/module").glob("*"))
    return KernelFacts(release, _options(root, release), _modules(root, release), loaded)


def _options(root: Path, release: str) -> dict[str, str] | Unread:
    for path in (root / "proc/config.gz", root / f"boot/config-{release}", root / f"lib/modules/{release}/config"):
        try:
            content = path.read_bytes()
            text = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError):
            continue
        return dict(_OPTION.findall(text.decode("ascii", "replace")))
    return Unread(f"the kernel's options are neither in /proc/config.gz nor in /boot/config-{release}")


def _modules(root: Path, release: str) -> frozenset[str] | Unread:
    found = files.text(root / f"lib/modules/{release}/modules.dep")
    if isinstance(found, Unread):
        there = files.is_there(root / "lib/modules" / release)
        return found if there else frozenset()
    paths = (line.partition(":")[0] for line in found.splitlines())
    return frozenset(path.rpartition("/")[2].partition(".ko")[0].replace("-", "_") for path in paths)


def sysctl(root: Path, interfaces: Iterable[str]) -> dict[str, str]:
    """Return the values of those keys that checks look at."""
    by_interface = (
        (f"net.ipv4.conf.{name}.{key}", f"net/ipv4/conf/{name}/{key}")
        for name in ("all", "default", *interfaces)
        for key in _KEYS_BY_INTERFACE
    )
    keys = [*((key, key.replace(".", "/")) for key in _KEYS), *by_interface]
    found = ((key, files.line(root / "proc/sys" / path)) for key, path in keys)
    return {key: value for key, value in found if value is not None}


def sysctl_files(root: Path) -> tuple[SysctlLine, ...]:
    """Return the assignments that are in force at the next boot: of each key, the last one."""
    by_name: dict[str, Path] = {}
    for folder in reversed(_SYSCTL_FOLDERS):
        by_name.update({path.name: path for path in sorted((root / folder).glob("*.conf"))})
    paths = [by_name[name] for name in sorted(by_name)] + [root / "etc/sysctl.conf"]
    last: dict[str, SysctlLine] = {}
    for path in paths:
        found = files.text(path)
        for line in found.splitlines() if isinstance(found, str) else ():
            key, is_assignment, value = line.strip().removeprefix("-").partition("=")
            if is_assignment and not line.lstrip().startswith(("#", ";")):
                key = key.strip().replace("/", ".")
                last[key] = SysctlLine("/" + str(path.relative_to(root)), key, value.strip())
    return tuple(last.values())


def number(path: Path) -> int | None:
    """Return the number in a file; None: there is none."""
    found = files.line(path)
    return int(found) if found is not None and found.isdecimal() else None


class _Timex(ctypes.Structure):
    """``struct timex`` of sys/timex.h, 64 bit."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    )


def clock() -> ClockFacts | Unread:
    """Return what the kernel says of its clock: adjtimex(2) with modes 0, which sets nothing."""
    timex = _Timex()
    try:
        done = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError) as error:
        return Unread(f"cannot ask the kernel for its clock: {error}")
    if done < 0:
        return Unread(f"cannot ask the kernel for its clock: {os.strerror(ctypes.get_errno())}")
    return ClockFacts(not timex.status & _STA_UNSYNC, timex.maxerror / 1e6)


def disks(paths: Iterable[str]) -> tuple[DiskFacts, ...]:
    """Return the room of the file systems of these folders, those that exist."""
    found = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            room = os.statvfs(path)
            size = room.f_frsize
            found.append(DiskFacts(path, room.f_bavail * size, room.f_blocks * size, room.f_favail, room.f_files))
    return tuple(found)


def processes(sockets: dict[str, str]) -> tuple[Process, ...]:
    """
    Return the daemons that run in the network namespace of the calling thread.

    :param sockets: By daemon, the path at which it would listen: one in another PID namespace is known by that.
    """
    import psutil

    here = _namespace(Path("/proc/thread-self"))
    found: dict[str, Process] = {}
    for process in psutil.process_iter(["name", "create_time"]):
        name = process.info["name"]
        base = Path("/proc", str(process.pid))
        if name in _DAEMONS and name not in found and _namespace(base) in (here, None):
            label = files.line(base / "attr/apparmor/current") or files.line(base / "attr/current") or ""
            found[name] = Process(name, process.pid, process.info["create_time"], label)
    listening = set(_listening())
    for name, path in sockets.items():
        if name not in found and path in listening:
            found[name] = Process(name, 0, None)
    return tuple(found[name] for name in sorted(found))


def _namespace(base: Path) -> int | None:
    try:
        return (base / "ns/net").stat().st_ino
    except OSError:
        return None


def _listening() -> Iterator[str]:
    """Yield the paths of unix sockets on which a process of this network namespace listens."""
    found = files.text(Path("/proc/thread-self/net/unix"))
    for line in found.splitlines()[1:] if isinstance(found, str) else ():
        row = line.split(maxsplit=7)
        if len(row) == 8 and int(row[3], 16) & _LISTENS:
            yield row[7]


def units(root: Path) -> tuple[UnitFacts, ...]:
    """Return our units and libvirt's; nothing where systemd does not run."""
    if not files.is_there(root / "run/systemd/system"):
        return ()
    return tuple(_unit(root, name) for name in _UNITS)


def _unit(root: Path, name: str) -> UnitFacts:
    exists = any(files.is_there(root / folder / name) for folder in _UNIT_FOLDERS)
    wants = [path for path in (root / "etc/systemd/system").glob(f"*.wants/{name}") if path.is_symlink()]
    wants += [path for path in (root / "etc/systemd/system").glob(f"*.requires/{name}") if path.is_symlink()]
    return UnitFacts(name, exists, bool(wants), _runs(root, name))


def _runs(root: Path, unit: str) -> bool:
    for hierarchy in ("", "systemd/", "unified/"):
        found = files.line(root / f"sys/fs/cgroup/{hierarchy}system.slice/{unit}/cgroup.procs")
        if found:
            return True
    return False


def networkd(root: Path) -> NetworkDaemon:
    """Return whether systemd-networkd runs, and what it does with routes of others (networkd.conf(5))."""
    runs = _runs(root, "systemd-networkd.service")
    by_name: dict[str, Path] = {}
    for folder in ("usr/lib", "usr/local/lib", "run", "etc"):
        by_name.update({path.name: path for path in (root / folder / "systemd/networkd.conf.d").glob("*.conf")})
    settings: dict[str, str] = {}
    for path in (root / "etc/systemd/networkd.conf", *(by_name[name] for name in sorted(by_name))):
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(path)
            settings |= dict(parser["Network"]) if parser.has_section("Network") else {}
    keeps = [
        settings.get(key, "yes").lower() in _NO for key in ("manageforeignroutingpolicyrules", "manageforeignroutes")
    ]
    return NetworkDaemon(runs, *keeps)
