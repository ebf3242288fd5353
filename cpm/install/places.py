"""
Where cpmd and natd write, as their settings files on a machine have it: for an uninstall, which has to find it all.

The settings need not be good ones: a file that a daemon would refuse may name a ledger all the same.

Tested in ``tests/unit/cpm/install/test_removal.py``.
"""

from __future__ import annotations

import dataclasses
import glob
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cpm.install.apply import inside
from cpm.install.plan import ETC
from cpm.protocol.errors import ConfigError

LEDGER: Final = PurePosixPath("/var/lib/virt-ports")
NATD_STATE: Final = PurePosixPath("/var/lib/virt-ports-natd")
RUN: Final = (PurePosixPath("/run/virt-ports"), PurePosixPath("/run/virt-ports-natd"))

_OF_LEDGER: Final = ("", "-wal", "-shm", "-journal", ".lock", ".part", ".part-journal", ".before-restore-*")
"""Ends of the names that a ledger, its locks, SQLite's files and former ledgers have."""
_SINKS: Final = ("syslog", "ipfix", "file", "webhook")
_PART: Final = "????????"
"""What :func:`cpm.service.files.replace` has at the end of a file that is not complete."""


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """What is written. The last part of a path is a pattern."""

    natd: tuple[PurePosixPath, ...]
    """natd's state, and sockets."""
    ledger: tuple[PurePosixPath, ...]
    """The ledger, and what belongs to it."""
    records: tuple[PurePosixPath, ...]
    """What the operator has had written for use elsewhere."""
    folders: tuple[PurePosixPath, ...]
    """Folders that a daemon has made for some of it."""
    cpmd_socket: PurePosixPath


def read(root: Path) -> Places:
    """
    Read the settings of the machine below ``root``; those that are not there have their defaults.

    :raise ConfigError: When a file is there and cannot be read.
    """
    cpmd, natd = (_Document(root, ETC / f"{name}.toml") for name in ("cpmd", "natd"))
    ledger = cpmd.path("ledger", "path") or LEDGER / "ledger.db"
    positions = cpmd.path("events", "state") or ledger.parent / "events"
    exports = cpmd.path("journal", "export")
    socket = cpmd.path("listen", "socket") or RUN[0] / "cpmd.sock"
    records = [exports / "journal-*.jsonl.gz"] if exports else []
    records += [_exactly(each) for each in (cpmd.path("events", "file"),) if each]
    folder = ledger.parent / "journal"
    sockets = (socket, cpmd.path("listen", "read_socket"))
    return Places(
        natd=(*_of_natd(natd), *(_exactly(each) for each in sockets if each)),
        ledger=(
            *_of_ledger(root, ledger),
            *(positions / name for sink in _SINKS for name in (f"{sink}.position", f".{sink}.position.{_PART}")),
            folder / "journal-*.jsonl.gz",
        ),
        records=tuple(records),
        folders=(positions, folder),
        cpmd_socket=socket,
    )


def _of_natd(settings: _Document) -> Iterator[PurePosixPath]:
    state = settings.path("state") or NATD_STATE
    yield from (state / name for name in ("follows.json", f".follows.json.{_PART}", "follows.json.part", "grants"))
    socket = settings.path("listen", "socket") or RUN[1] / "natd.sock"
    yield _exactly(socket)
    yield from (socket.with_name(name) for name in ("settings-before.json", f".settings-before.json.{_PART}"))


def _of_ledger(root: Path, path: PurePosixPath) -> Iterator[PurePosixPath]:
    names = {path}
    if root.resolve() == Path("/"):
        # Lock and log are beside the file itself, whatever link leads to it.
        names.add(PurePosixPath(Path(path).resolve()))
    for each in sorted(names):
        yield from (each.with_name(glob.escape(each.name) + end) for end in _OF_LEDGER)


def _exactly(path: PurePosixPath) -> PurePosixPath:
    return path.with_name(glob.escape(path.name))


class _Document:
    """A settings file as it is written."""

    def __init__(self, root: Path, path: PurePosixPath) -> None:
        self._tables: dict[str, Any] = {}
        try:
            self._tables = tomllib.loads(inside(root, path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            remedy = f"{why}; correct it, or move it away: what it names may be left then"
            raise ConfigError(str(path), "", remedy) from error

    def path(self, *keys: str) -> PurePosixPath | None:
        """Return a path; None: there is none."""
        value: Any = self._tables
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return PurePosixPath("/", value) if isinstance(value, str) and PurePosixPath(value).name else None
