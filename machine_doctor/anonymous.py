"""
Other names for VMs, nodes and addresses, the same for each wherever it occurs. Pure.

Tested in ``tests/unit/machine_doctor/test_anonymous.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Final

_IPV4: Final = re.compile(r"(?<![\w.])(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})(?![\w.]*\w)")
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?![\w:])")
_HARDWARE: Final = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])")
_UUID: Final = re.compile(r"(?<!\w)[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?!\w)")
_FIELD: Final = re.compile(r"[a-z_]+")
_SAME: Final = ("0.", "127.", "255.", "169.254.", "100.64.0.0", "198.41.0.4")
"""Beginnings of IPv4 addresses that say nothing of a site."""


class Names:
    """
    The substitutes; the order in which things occur decides which number each gets.

    An IPv4 network of 256 addresses becomes ``10.A.B``, and the last number of an address stays, so that what is in one
    network before is in one network afterwards.

    :param machines: Names of nodes, and this machine's host name.
    :param vms: Names of VMs.
    """

    def __init__(self, machines: Iterable[str], vms: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        for kind, names in (("node", sorted(set(machines))), ("vm", sorted(set(vms)))):
            for number, name in enumerate(filter(None, names), 1):
                self._names.setdefault(name, f"{kind}{number}")
        words = sorted(self._names, key=lambda name: (-len(name), name))
        self._words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)") if words else None
        self._networks: dict[str, str] = {}
        self._others: dict[str, str] = {}

    def text(self, text: str) -> str:
        """Return a text with all names and addresses replaced."""
        text = _UUID.sub(lambda found: self._other(found[0].lower(), "00000000-0000-0000-0000-{:012}"), text)
        if self._words is not None:
            text = self._words.sub(lambda found: self._names[found[0]], text)
        text = _HARDWARE.sub(lambda found: self._other(found[0].lower(), "02:00:00:00:00:{:02x}"), text)
        text = _IPV6.sub(self._ipv6, text)
        return _IPV4.sub(self._ipv4, text)

    def value(self, value: Any, *, are_keys_names: bool = False) -> Any:
        """
        Return a JSON value with all names and addresses in strings replaced.

        Keys that look like a field's name stay.

        :param are_keys_names: Whether any key of this object may be a name, as in the facts of a finding.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {
                key if _FIELD.fullmatch(key) and not are_keys_names else self.text(key): self.value(
                    each, are_keys_names=key == "facts"
                )
                for key, each in value.items()
            }
        return value

    def _ipv4(self, found: re.Match[str]) -> str:
        try:
            IPv4Address(found[0])
        except AddressValueError:
            return found[0]
        if found[0].startswith(_SAME):
            return found[0]
        network = f"{found[1]}.{found[2]}.{found[3]}"
        number = len(self._networks)
        return f"{self._networks.setdefault(network, f'10.{number >> 8}.{number & 255}')}.{found[4]}"

    def _ipv6(self, found: re.Match[str]) -> str:
        try:
            address = IPv6Address(found[0])
        except AddressValueError:
            return found[0]
        return found[0] if address.is_loopback or not int(address) else self._other(str(address), "2001:db8::{:x}")

    def _other(self, original: str, form: str) -> str:
        return self._others.setdefault(original, form.format(len(self._others) + 1))
