"""The libvirt hook and what surrounds it. Tested in ``tests/unit/machine_doctor/test_readers.py``."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cpm.install import hook_check, sources
from cpm.install.hook_bytecode import MARK
from cpm.install.plan import HOOK
from cpm.protocol.errors import ConfigError
from machine_doctor.facts import FileFacts, HookFacts, Process, Unread
from machine_doctor.readers import files, journal

_PROFILES: Final = (
    "usr.sbin.libvirtd",
    "usr.sbin.virtqemud",
    "libvirtd",
    "virtqemud",
    "local/usr.sbin.libvirtd",
    "local/usr.sbin.virtqemud",
)
_WRITABLE: Final = 0o022


def hook(root: Path, processes: tuple[Process, ...]) -> HookFacts | Unread:
    """Look at the hook, and execute it once as libvirtd does, with an operation that does nothing."""
    path = root / HOOK.relative_to("/")
    file = files.look_at(path)
    if isinstance(file, Unread):
        return file
    folders, _ = files.look_at_all([path.parent, path.parent.parent, path.parent.parent.parent])
    daemon = next((each.name for each in processes if each.name in ("libvirtd", "virtqemud")), None)
    return HookFacts(
        file,
        _is_ours(path),
        _others(path),
        folders,
        _fails(path, file, folders) if file is not None else "",
        _profiles(root),
        _enforces(root / "sys/fs/selinux/enforce"),
        journal.last_reload(daemon) if daemon is not None and root == Path("/") else None,
    )


def _enforces(path: Path) -> bool | Unread:
    """Say whether SELinux enforces. Without SELinux the folder is not there, or empty; the file ends in no newline."""
    if not files.is_there(path):
        return False
    found = files.text(path)
    return found if isinstance(found, Unread) else found.strip() == "1"


def _is_ours(path: Path) -> bool | None:
    found = files.text(path)
    if isinstance(found, Unread):
        return None
    try:
        return is_same(found, sources.hook_file(str(HOOK)))
    except ConfigError:
        return None


def is_same(found: str, expected: str) -> bool:
    """
    Say whether a hook is the one that is expected: the same text, and no other bytecode that Python would run.

    Bytecode of another version of Python is not run, and does no harm.
    """
    text, _, code = expected.rpartition(MARK)
    if found in (expected, text):
        return True
    its_text, _, its_code = found.rpartition(MARK)
    return its_text == text and its_code.partition("\n")[0] != code.partition("\n")[0]


def _others(path: Path) -> tuple[FileFacts, ...]:
    beside = [other for other in path.parent.glob("*") if other != path]
    found, _ = files.look_at_all([path.parent.parent / "qemu", *sorted(beside)])
    return tuple(each for each in found if not stat.S_ISDIR(each.mode))


def _fails(path: Path, file: FileFacts, folders: tuple[FileFacts, ...]) -> str | Unread:
    if os.geteuid():
        return Unread("only root can execute the hook as libvirtd does; run this with sudo")
    for each in (file, *folders):
        if each.uid or each.mode & _WRITABLE:
            return Unread(f"not executed, because others than root can write {each.path} (see the check hook-rights)")
    return hook_check.reason_not_to_run(path)


def _profiles(root: Path) -> dict[str, str] | Unread:
    found: dict[str, str] = {}
    for name in _PROFILES:
        text = files.text(root / "etc/apparmor.d" / name)
        if isinstance(text, str):
            found[f"/etc/apparmor.d/{name}"] = text
        elif files.is_there(root / "etc/apparmor.d" / name):
            return text
    return found
