"""
Applies the kernel settings under ``/proc/sys/net`` without which packets are dropped or connections end too early.

:mod:`natctl.ruleset.routing` decides which. They apply to the network namespace of the calling thread. Tested by
``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

import pathlib
import posixpath
from collections.abc import Callable, Iterator
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.kernel.settings_before import Setting, SettingsBefore
from natctl.model.entries import Path, Settings
from natctl.ruleset import routing, timeouts, way_check

_DIRECTORY: Final = pathlib.Path("/proc/sys/net/ipv4")
FORWARDING: Final = "ip_forward"
_REDIRECTS: Final = "conf/all/accept_redirects"
_ICMP_TIMEOUT: Final = "../netfilter/nf_conntrack_icmp_timeout"
_SLASHES_AND_DOTS: Final = str.maketrans("/.", "./")


def apply(settings: Settings, path: Path | None, noted: SettingsBefore) -> tuple[str, ...]:
    """
    Set what these roles need; interfaces that do not exist yet are left for the next call.

    The timeout of ICMP queries is raised, never lowered: it counts for all connections of this machine.

    :param noted: Where it is kept what they were before.
    :return: The changes, one line each.
    :raise KernelError: When the kernel refuses a value.
    """
    return (
        *_switch(settings, noted),
        *_loosen_reverse_path_filters(settings, noted),
        *_raise_icmp_timeout(settings, path, noted),
    )


def _raise_icmp_timeout(settings: Settings, path: Path | None, noted: SettingsBefore) -> Iterator[str]:
    if settings.host is None:
        return
    seconds, now = timeouts.in_effect(settings.host, path).icmp_s, read(_ICMP_TIMEOUT)
    if now is not None and int(now) < seconds:
        _change(_ICMP_TIMEOUT, now, str(seconds), noted)
        yield f"{key(_ICMP_TIMEOUT)} was {now}, is {seconds}"


def connection_table_size() -> int | None:
    """Return how many connections the kernel can keep (``nf_conntrack_max``); None: it does not say."""
    return _netfilter_number("nf_conntrack_max")


def connection_table_entries() -> int | None:
    """Return how many connections the kernel keeps (``nf_conntrack_count``); None: it does not say."""
    return _netfilter_number("nf_conntrack_count")


def _netfilter_number(name: str) -> int | None:
    try:
        return int((_DIRECTORY.parent / "netfilter" / name).read_text())
    except (OSError, ValueError):
        return None


def _switch(settings: Settings, noted: SettingsBefore) -> Iterator[str]:
    for switch in routing.switches(settings):
        now = read(switch.path)
        if now is not None and now not in switch.accepted:
            if switch.path == FORWARDING:
                noted.note_all(_follows_forwarding())
            _change(switch.path, now, switch.value, noted)
            yield f"{key(switch.path)} was {now}, is {switch.value}"


def _follows_forwarding() -> dict[str, Setting]:
    """
    Return the settings that the kernel changes when ``ip_forward`` is set to 1, and what it sets them to.

    Source: inet_forward_change in linux/net/ipv4/devinet.c.
    """
    folders = _DIRECTORY.glob("conf/*")
    paths = {f"conf/{folder.name}/forwarding": "1" for folder in folders if folder.name != "all"}
    found = {path: (read(path), ours) for path, ours in {**paths, _REDIRECTS: "0"}.items()}
    return {path: Setting(before, ours) for path, (before, ours) in found.items() if before is not None}


def follows_forwarding(path: str) -> bool:
    """Return whether the kernel changes a setting with ``ip_forward``; natd itself never does."""
    return path == _REDIRECTS or path.endswith("/forwarding")


def _loosen_reverse_path_filters(settings: Settings, noted: SettingsBefore) -> Iterator[str]:
    for name in routing.asymmetric_interfaces(settings):
        path = f"conf/{name}/rp_filter"
        everywhere, here = read("conf/all/rp_filter"), read(path)
        if everywhere is None or here is None:
            continue
        value = routing.loose_rp_filter(int(everywhere), int(here))
        if value is not None:
            _change(path, here, str(value), noted)
            yield f"{key(path)} was strict, is {value}"


def loosen_until(interface: str, passes: Callable[[], bool], noted: SettingsBefore) -> str:
    """
    Loosen an interface's reverse path filter step by step until it lets a VM's packets pass; otherwise leave it.

    :param noted: As for :func:`apply`.
    :return: What was changed; an empty string when the interface's own value does not help, or it is gone.
    :raise KernelError: When the kernel does not take a value.
    """
    path = f"conf/{interface}/rp_filter"
    everywhere, before = read("conf/all/rp_filter"), read(path)
    if everywhere is None or before is None:
        return ""
    here = int(before)
    while (value := way_check.passing_rp_filter(int(everywhere), here)) is not None:
        _change(path, str(here), str(value), noted)
        here = value
        if passes():
            return f"{key(path)} was {before} (all: {everywhere}) and dropped packets of VMs, is {value}"
    if here != int(before):
        write(path, before)
    return ""


def _change(path: str, before: str, value: str, noted: SettingsBefore) -> None:
    noted.note(path, before, value)
    write(path, value)


def key(path: str) -> str:
    """
    Return a setting's name as sysctl(8) takes it, which writes a dot in the name of an interface as a slash.

    :param path: Below /proc/sys/net/ipv4.
    """
    return posixpath.normpath(f"net/ipv4/{path}").translate(_SLASHES_AND_DOTS)


def read(path: str) -> str | None:
    """Return a setting. :param path: Below /proc/sys/net/ipv4. :return: None: it cannot be read."""
    try:
        return (_DIRECTORY / path).read_text().strip()
    except OSError:
        return None


def write(path: str, value: str) -> None:
    """Set a setting. :param path: Below /proc/sys/net/ipv4. :raise KernelError: When the kernel refuses."""
    try:
        (_DIRECTORY / path).write_text(value)
    except OSError as error:
        raise KernelError(f"set {key(path)}", error.errno or 0, error.strerror or "") from error
