"""
Decides which files a machine gets, and what is done with files that already exist.

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
from collections.abc import Iterator
from pathlib import PurePosixPath

from cpm.install import choices as choices_
from cpm.install import configs, sources
from cpm.install.choices import EDGE, HOST, MANAGER, Choices
from cpm.protocol import overlaps

ETC = PurePosixPath("/etc/virt-ports")
UNITS = PurePosixPath("/etc/systemd/system")
SYSUSERS = PurePosixPath("/etc/sysusers.d/virt-ports.conf")
TMPFILES = PurePosixPath("/etc/tmpfiles.d/virt-ports.conf")
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
    TAKE_AWAY = "take away"
    """libvirt would execute the file, and it does not run."""


def targets(choices: Choices, programs: PurePosixPath) -> list[Target]:
    """
    Return the files of a machine, in the order in which they are written: a file comes after those it needs.

    :param programs: Directory of cpmd and natd, on the machine.
    :raise ConfigError: When a file is missing from this installation.
    """
    found = [
        Target(SYSUSERS, sources.system_file("virt-ports.sysusers")),
        Target(TMPFILES, sources.system_file("virt-ports.tmpfiles")),
    ]
    if MANAGER in choices.roles:
        found += [
            Target(ETC / "cpmd.toml", configs.cpmd_toml(choices.internal_pool), is_config=True),
            _unit("cpmd.service", programs),
        ]
    if choices.roles & {HOST, EDGE}:
        found += [Target(ETC / "natd.toml", configs.natd_toml(choices), is_config=True)]
        found += [_unit("natd.service", programs)]
    if HOST in choices.roles:
        found += [Target(ETC / "hook.conf", configs.hook_conf(), is_config=True)]
        hook = sources.hook_file(str(HOOK))
        found += [Target(HOOK, hook, mode=0o755, staging=HOOK.parent.parent, is_executed=True)]
    return found


def decide(target: Target, found: bytes | None, written: str | None) -> Action:
    """
    Return the action for one file.

    :param found: Its present content; None: it does not exist.
    :param written: Digest of the content that an earlier install wrote; None: no earlier install wrote it.
    """
    if found is None:
        return Action.CREATE
    if digest(found) == target.sha256:
        return Action.LEAVE
    if target.is_config or digest(found) != written:
        return Action.KEEP
    return Action.UPDATE


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def remaining_steps(choices: Choices, *, hook_is_new: bool) -> list[str]:
    """Return the steps that are left to the operator, in order: what starts a process is not done here."""
    daemons = " ".join(name for name, here in (("cpmd", MANAGER in choices.roles), ("natd", choices.is_node)) if here)
    steps = list(_pool_steps(choices))
    steps += [f"edit {ETC}/natd.toml, {question}" for question in configs.open_questions(choices) if choices.is_node]
    if choices.is_node and choices.manager_url.startswith("https://"):
        steps.append(f"put this node's certificate, its key and the CA into {ETC}/tls (paths are in natd.toml)")
    steps.append(f"systemd-sysusers {SYSUSERS.name} && systemd-tmpfiles --create {TMPFILES.name}")
    steps.append(f"systemctl daemon-reload && systemctl enable --now {daemons}")
    if hook_is_new:
        steps.append(
            "systemctl try-reload-or-restart libvirtd (or virtqemud): it finds new hooks only then, or when it starts; "
            "running VMs are not affected"
        )
    if choices.is_node:
        where = "" if MANAGER in choices.roles else "on the manager: "
        steps.append(f"{where}virt-ports node approve {choices.name}: let this machine be {_roles_of(choices)}")
    if MANAGER in choices.roles:
        steps.append("virt-ports pool add ADDRESS: the public addresses the VMs share")
    return steps


def _roles_of(choices: Choices) -> str:
    return " and ".join(role for role in (HOST, EDGE) if role in choices.roles)


def _pool_steps(choices: Choices) -> Iterator[str]:
    """Yield what is left to do about an internal pool that this machine cannot share with VMs."""
    if not choices.pool_uses:
        return
    uses = overlaps.words(choices.pool_uses)
    if MANAGER not in choices.roles:
        yield (
            f"see that [pool] internal in the manager's cpmd.toml is not the default {choices_.DEFAULT_POOL}, "
            f"of which this machine uses {uses}: {overlaps.remedy(choices_.DEFAULT_POOL, choices.pool_uses)}"
        )
    elif choices.internal_pool is None:
        yield (
            f"edit {ETC}/cpmd.toml, [pool] internal: a network for internal addresses of VMs that no machine uses "
            f"(this one uses {uses})"
        )
    else:
        yield (
            f"see that no machine of yours uses {choices.internal_pool}, which {ETC}/cpmd.toml takes for the internal "
            f"addresses of VMs: this machine uses a part of the default ({uses})"
        )


def _unit(name: str, programs: PurePosixPath) -> Target:
    return Target(UNITS / name, sources.system_file(name).replace("@BINDIR@", str(programs)))
