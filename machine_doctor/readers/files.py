"""Small files, and what is known of any file. Tested in ``tests/unit/machine_doctor/test_readers.py``."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from machine_doctor.facts import FileFacts, Unread

_MOST_BYTES = 1 << 20


def text(path: Path) -> str | Unread:
    """Return the text of a file, at most a MiB of it."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError as error:
        return Unread(f"cannot read {path}: {error.strerror}")


def is_there(path: Path) -> bool:
    """Say whether there is a file or folder; True also where that may not be looked at."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def line(path: Path) -> str | None:
    """Return the text of a file without blanks around it; None: it cannot be read."""
    found = text(path)
    return None if isinstance(found, Unread) else found.strip()


def look_at(path: Path) -> FileFacts | Unread | None:
    """Return what is known of a file; None: there is none."""
    try:
        status = path.stat()
        label = _label(path)
        is_noexec = bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return Unread(f"cannot look at {path}: {error.strerror}")
    changed = max(status.st_mtime, status.st_ctime)
    return FileFacts(str(path), status.st_mode, status.st_uid, _owner(status.st_uid), changed, is_noexec, label)


def look_at_all(paths: Iterable[str | Path | None]) -> tuple[tuple[FileFacts, ...], tuple[str, ...]]:
    """Return what is known of those files that exist, and the names of those that cannot be looked at."""
    found: list[FileFacts] = []
    unseen: list[str] = []
    for path in dict.fromkeys(str(path) for path in paths if path):
        status = look_at(Path(path))
        if isinstance(status, Unread):
            unseen.append(path)
        elif status is not None:
            found.append(status)
    return tuple(found), tuple(unseen)


def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _label(path: Path) -> str | None:
    try:
        return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()
    except (OSError, UnicodeDecodeError):
        return None
