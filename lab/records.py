"""The lab's records of its guests: one file each, written before the guest is created and removed after it is gone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from lab.errors import LabError

LIGHT = "light"
REAL = "real"

_FIRST, _LAST = 10, 99
"""Last bytes of light guests' addresses; libvirt's DHCP deals out from 100 on."""


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """
    One guest.

    :param kind: :data:`LIGHT` or :data:`REAL`.
    :param address: Its address in the guest network; empty for a real guest, which asks by DHCP.
    """

    name: str
    kind: str
    host: str
    uuid: str
    mac: str
    address: str = ""


class GuestRecords:
    """The guests of one lab; a directory with a file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def all(self) -> list[GuestRecord]:
        """Return every guest, also those whose creation was interrupted, by name."""
        return [self._read(path) for path in sorted(self._directory.glob("*.json"))]

    def get(self, name: str) -> GuestRecord:
        """:raise LabError: When there is no such guest."""
        path = self._directory / f"{name}.json"
        if not path.exists():
            names = ", ".join(record.name for record in self.all()) or "none"
            raise LabError(f"there is no guest {name} in the lab; there are: {names}")
        return self._read(path)

    def add(self, name: str, kind: str, host: str) -> GuestRecord:
        """
        Record a guest before it is made, with an identity of its own.

        Light guests get the lowest free address *of their host*: two hosts may use the same one, as in real life.

        :raise LabError: When the name is taken, or the host has no address left.
        """
        everyone = self.all()
        if any(record.name == name for record in everyone):
            raise LabError(f"there is a guest {name} already; remove it or choose another name")
        identity = uuid4()
        mac = "52:54:00:" + identity.bytes[:3].hex(":")
        taken = {record.address for record in everyone if record.host == host}
        address = self._lowest_free(host, taken) if kind == LIGHT else ""
        record = GuestRecord(name, kind, host, str(identity), mac, address)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"{name}.json").write_text(json.dumps(asdict(record)))
        return record

    def remove(self, name: str) -> None:
        """Forget a guest."""
        (self._directory / f"{name}.json").unlink(missing_ok=True)

    @staticmethod
    def _lowest_free(host: str, taken: set[str]) -> str:
        for last in range(_FIRST, _LAST + 1):
            if f"10.10.0.{last}" not in taken:
                return f"10.10.0.{last}"
        raise LabError(f"{host} has {_LAST - _FIRST + 1} light guests, no more fit its network; remove one")

    @staticmethod
    def _read(path: Path) -> GuestRecord:
        return GuestRecord(**json.loads(path.read_text()))
