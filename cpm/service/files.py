"""
Writes files so that after a crash, of the process or of the machine, each has its former text or the new one.

A renaming alone does not do that: the kernel may write the new name before the new text, and a power failure then
leaves an empty file (rename(2), fsync(2)). Whatever our programs read again after a crash is written here, and a test
bans other ways.

Tested in ``tests/unit/cpm/service/test_files.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def replace(
    path: Path, content: bytes, mode: int, *, folder: Path | None = None, check: Callable[[Path], None] | None = None
) -> None:
    """
    Write a whole file. When this returns, it is on disk; when it raises, ``path`` is as it was.

    :param mode: Permissions, whatever the umask.
    :param folder: Where the new file is until it is complete, on the same file system; None: in that of ``path``.
    :param check: Called with the complete new file, before it has its name; what it raises ends this.
    :raise OSError: When it cannot be written.
    """
    folder = folder or path.parent
    _remove_leftovers(path.name, folder)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file, part.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file.write(content)
            os.fchmod(descriptor, mode)
            sync(file)
            # A file that is open for writing cannot be executed.
            file.close()
            if check is not None:
                check(part)
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(file: IO[Any]) -> None:
    """
    Put on disk what was written to an open file.

    :raise OSError: When that is not possible.
    """
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """
    Put the names in a folder on disk.

    :raise OSError: When that is not possible.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(name: str, folder: Path) -> None:
    """Remove the parts of writers that were killed; the part of one that lives is locked."""
    for left in folder.glob(f".{glob.escape(name)}.????????"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
