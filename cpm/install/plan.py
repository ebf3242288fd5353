"""
Decides which files a machine gets, and what is done with files that already exist.

The Debian package brings units, user and directories in /usr/lib. Where it has the very file, nothing is written, and a
copy of ours in /etc, which would hide the package's next version, is removed.

An edited file is never overwritten. Our files are replaced if they are still as an earlier install wrote them;
configuration files are the operator's as soon as they exist. If the new text differs from a file that is kept, it is
written beside it as ``FILE.new``, which neither systemd nor libvirt nor our daemons read.

libvirt executes every executable file in its hook folder: at each start of a VM, which fails with the file, and at each
start of libvirtd, which kills a running VM when the file fails. Nothing but the complete hook may ever lie there, so it
is written one folder higher (:attr:`Target.staging`).

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Iterator, Set
from pathlib import PurePosixPath

from cpm.install import configs, sources
from cpm.install.choices import EDGE, HOST, MANAGER, Choices

ETC = PurePosixPath("/etc/virt-ports")
UNITS = PurePosixPath("/etc/systemd/system")
SYSUSERS = PurePosixPath("/etc/sysusers.d/virt-ports.conf")
TMPFILES = PurePosixPath("/etc/tmpfiles.d/virt-ports.conf")
_OF_PACKAGES = {
    UNITS: PurePosixPath("/usr/lib/systemd/system"),
    SYSUSERS.parent: PurePosixPath("/usr/lib/sysusers.d"),
    TMPFILES.parent: PurePosixPath("/usr/lib/tmpfiles.d"),
}
"""Where a Debian package puts what otherwise goes to the folder of /etc, in which a file takes precedence."""
HOOK = PurePosixPath("/etc/libvirt/hooks/qemu.d/virt-ports")
MANIFEST = ETC / "install.json"
"""List of the files written, for the next install. Not in /var/lib/virt-ports, which cpmd's user can write: the next
install runs as root and trusts this list."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A file that should exist."""

    path: PurePosixPath
    text: str
    mode: int = 0o644
    is_config: bool = False
    staging: PurePosixPath | None = None
    """Folder in which the file is written before it is renamed into its own; None: its own. On the same file system."""
    is_executed: bool = False
    """libvirt executes it: it must be shown to run, or it is taken away again."""

    @property
    def work_folder(self) -> PurePosixPath:
        """Folder of everything that belongs to the file but is not the file: temporary files, and the new text."""
        return self.staging or self.path.parent

    @property
    def beside(self) -> PurePosixPath:
        """Where the new text goes when the file itself is kept."""
        return self.work_folder / f"{self.path.name}.new"

    @property
    def packaged(self) -> PurePosixPath | None:
        """Where a Debian package would have brought the file; None: it would not."""
        folder = _OF_PACKAGES.get(self.path.parent)
        return folder / self.path.name if folder else None

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return digest(self.text.encode())


class Action(enum.Enum):
    """The action for a target."""

    CREATE = "create"
    UPDATE = "update"
    """The file is as an earlier install wrote it, and the new text differs."""
    LEAVE = "unchanged"
    KEEP = "keep"
    """The file is configuration or was edited: the new text is written beside it."""
    PACKAGED = "packaged"
    """A Debian package has brought the file."""
    REMOVE = "remove"
    """A Debian package has brought the file; the copy that an earlier install wrote goes."""
    TAKE_AWAY = "take away"
    """libvirt would execute the file, and it does not run."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileOutcome:
    """The action for one file: carried out, or in a dry run planned."""

    path: PurePosixPath
    action: Action
    beside: PurePosixPath | None = None
    """Where the new text is, when the file was kept; where a package has the file, when one has brought it."""
    why: str = ""
    """Why the file was taken away, and what to do."""


def targets(choices: Choices, programs: PurePosixPath) -> list[Target]:
    """
    Return the files of a machine, in the order in which they are written: a file comes after those it needs.

    :param programs: Directory of cpmd and natd, on the machine.
    :raise ConfigError: When a file is missing from this installation.
    """
    return [*_configurations(choices), *program_files(choices.roles, programs)]


def program_files(roles: Set[str], programs: PurePosixPath) -> list[Target]:
    """Return the files that belong to this version of the programs, not to the operator; else as :func:`targets`."""
    found = [
        Target(SYSUSERS, sources.system_file("virt-ports.sysusers")),
        Target(TMPFILES, sources.system_file("virt-ports.tmpfiles")),
    ]
    if MANAGER in roles:
        found.append(_unit("cpmd.service", programs))
    if roles & {HOST, EDGE}:
        found.append(_unit("natd.service", programs))
    if HOST in roles:
        hook = sources.hook_file(str(HOOK))
        found.append(Target(HOOK, hook, mode=0o755, staging=HOOK.parent.parent, is_executed=True))
    return found


def _configurations(choices: Choices) -> Iterator[Target]:
    if MANAGER in choices.roles:
        yield Target(ETC / "cpmd.toml", configs.cpmd_toml(choices.internal_pool), is_config=True)
    if choices.roles & {HOST, EDGE}:
        yield Target(ETC / "natd.toml", configs.natd_toml(choices), is_config=True)
    if HOST in choices.roles:
        yield Target(ETC / "hook.conf", configs.hook_conf(), is_config=True)


def decide(target: Target, found: bytes | None, written: str | None, packaged: bytes | None = None) -> Action:
    """
    Return the action for one file.

    :param found: Its present content; None: it does not exist.
    :param written: Digest of the content that an earlier install wrote; None: no earlier install wrote it.
    :param packaged: Content of the file that a Debian package has brought; None: there is none.
    """
    is_packaged = packaged is not None and digest(packaged) == target.sha256
    if found is None:
        return Action.PACKAGED if is_packaged else Action.CREATE
    if is_packaged and digest(found) in (written, target.sha256):
        return Action.REMOVE
    if digest(found) == target.sha256:
        return Action.LEAVE
    if target.is_config or digest(found) != written:
        return Action.KEEP
    return Action.UPDATE


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _unit(name: str, programs: PurePosixPath) -> Target:
    return Target(UNITS / name, sources.system_file(name).replace("@BINDIR@", str(programs)))
