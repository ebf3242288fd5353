"""
Removes what installs wrote, as the manifest lists it.

A file that is as it was written goes. One that was edited stays, but for the hook: without natd it would delay or
refuse every start of a VM.

Tested in ``tests/unit/cpm/install/test_removal.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from cpm.install.apply import Manifest, inside, read_manifest
from cpm.install.places import LEDGER, NATD_STATE, RUN, Places
from cpm.install.plan import ETC, HOOK, MANIFEST, SYSUSERS, TMPFILES, UNITS, digest
from cpm.protocol.errors import ConfigError
from cpm.service import files

EDITED_HOOK = ETC / "hook.edited"
PKI = ETC / "pki"


class Fate(enum.Enum):
    """What happens to a file or directory."""

    REMOVE = "remove"
    KEEP = "keep"
    """It was edited, is to be kept, or cannot be made again."""
    MOVE = "move"
    """An edited hook, to :data:`EDITED_HOOK`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """One file or directory, and what happens to it."""

    path: PurePosixPath
    fate: Fate
    why: str = ""
    """Why it is kept."""


def plan(root: Path, places: Places, *, keep_ledger: bool, with_edited: bool) -> list[Removal]:
    """
    Return what would be removed below ``root``, in order: the hook first, what only the settings tell of before the
    settings, the manifest last.

    Our own folders go as a whole; in other folders, only the files that are ours.

    :param keep_ledger: Leave the ledger, with all that is in cpmd's directory.
    :param with_edited: Remove edited files, too.
    :raise ConfigError: When the manifest, or a file in it, cannot be read, or a symbolic link leads out of ``root``.
    """
    installed = list(_files(root, _manifest(root), with_edited=with_edited))
    hook = [each for each in installed if each.path.is_relative_to(HOOK.parent)]
    of_ledger = (Fate.KEEP, "the ledger") if keep_ledger else (Fate.REMOVE, "")
    found = [*hook, *(Removal(path, Fate.REMOVE) for path in _matching(root, places.natd))]
    found += [Removal(path, *of_ledger) for path in _matching(root, places.ledger)]
    found += [each for each in installed if each not in hook]
    found += [Removal(path, Fate.REMOVE) for path in (*RUN, NATD_STATE) if _real(root, path).exists()]
    if _real(root, LEDGER).exists():
        found.append(Removal(LEDGER, *of_ledger))
    found += [Removal(path, Fate.KEEP, "you have had it written") for path in _matching(root, places.records)]
    if _real(root, PKI / "ca.key").exists():
        found.append(Removal(PKI, Fate.KEEP, "the certificate authority: its key cannot be made again"))
    if _real(root, MANIFEST).exists():
        found.append(Removal(MANIFEST, Fate.REMOVE))
    return found


def _matching(root: Path, patterns: Iterable[PurePosixPath]) -> Iterator[PurePosixPath]:
    """Yield what is there, unless it is in a folder that goes as a whole."""
    for pattern in patterns:
        if not any(pattern.is_relative_to(folder) for folder in (*RUN, NATD_STATE, LEDGER)):
            for found in sorted(_real(root, pattern).parent.glob(pattern.name)):
                yield pattern.with_name(found.name)


def carry_out(root: Path, removals: list[Removal], folders: Iterable[PurePosixPath] = ()) -> None:
    """
    Remove them, and the folders that installs made and that are empty now.

    :param folders: Those that daemons made.
    :raise ConfigError: When one cannot be removed; another call goes on.
    """
    for each in removals:
        try:
            _carry_out(root, each)
        except OSError as error:
            raise ConfigError(str(each.path), "", f"cannot remove: {error.strerror}; then run this again") from error
    # Those of libvirt and systemd stay, empty or not.
    for folder in (*folders, HOOK.parent, ETC):
        with contextlib.suppress(OSError):
            _real(root, folder).rmdir()


def _carry_out(root: Path, removal: Removal) -> None:
    real = _real(root, removal.path)
    if removal.fate is Fate.MOVE:
        files.replace(_real(root, EDITED_HOOK), real.read_bytes(), 0o644)
    if removal.fate is Fate.KEEP:
        return
    if real.is_dir() and not real.is_symlink():
        _remove_folder(real)
    else:
        real.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # The ledger may have a disk of its own: it is empty now, and where it is mounted is not ours.
        if error.errno != errno.EBUSY or error.filename != str(folder):
            raise


def _files(root: Path, manifest: Manifest, *, with_edited: bool) -> Iterator[Removal]:
    paths = sorted((PurePosixPath(path) for path in manifest.files), key=lambda path: (path != HOOK, path))
    for path in paths:
        if not _is_ours(path):
            raise ConfigError(str(MANIFEST), "", f"lists {path}, which is none of our files; correct it, then go on")
        content = _read(root, path)
        new = path.parent.parent / f"{path.name}.new" if path == HOOK else path.with_name(f"{path.name}.new")
        if _real(root, new).exists():
            yield Removal(new, Fate.REMOVE)
        if content is None:
            continue
        if digest(content) == manifest.files[str(path)] or with_edited:
            yield Removal(path, Fate.REMOVE)
        elif path == HOOK:
            yield Removal(path, Fate.MOVE, f"edited; it goes to {EDITED_HOOK}")
        else:
            yield Removal(path, Fate.KEEP, "edited")


def _is_ours(path: PurePosixPath) -> bool:
    ours = {HOOK, SYSUSERS, TMPFILES, UNITS / "cpmd.service", UNITS / "natd.service"}
    return path in ours or (path.parent == ETC and ".." not in path.parts)


def _manifest(root: Path) -> Manifest:
    content = _read(root, MANIFEST)
    return Manifest({}, frozenset()) if content is None else read_manifest(content)


def _read(root: Path, path: PurePosixPath) -> bytes | None:
    try:
        return _real(root, path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot read: {error.strerror}; make it a readable file") from error


def _real(root: Path, path: PurePosixPath) -> Path:
    return inside(root, path)
