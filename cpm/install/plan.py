"""
Which files a machine gets, and what to do about those that are there already.

The rule: a file that somebody edited is never overwritten. Ours are replaced as long as they are what an earlier
install wrote; configuration belongs to the operator from the moment it exists. Where the new text differs from a file
that is kept, it is put beside it as ``FILE.new``, which neither systemd nor libvirt nor we ever read.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from pathlib import PurePosixPath

from cpm.install import configs, sources
from cpm.install.choices import EDGE, HOST, MANAGER, Choices

ETC = PurePosixPath("/etc/virt-ports")
UNITS = PurePosixPath("/etc/systemd/system")
SYSUSERS = PurePosixPath("/etc/sysusers.d/virt-ports.conf")
TMPFILES = PurePosixPath("/etc/tmpfiles.d/virt-ports.conf")
HOOK = PurePosixPath("/etc/libvirt/hooks/qemu.d/virt-ports")
MANIFEST = ETC / "install.json"
"""What was written, for the next install and for an uninstall. Not under /var/lib/virt-ports: that is cpmd's own, and
root must not take its orders from there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A file that should exist."""

    path: PurePosixPath
    text: str
    mode: int = 0o644
    is_config: bool = False

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        return digest(self.text.encode())


class Action(enum.Enum):
    """What to do about a target."""

    CREATE = "create"
    UPDATE = "update"
    """It is what an earlier install wrote, and the new one writes something else."""
    LEAVE = "unchanged"
    KEEP = "keep"
    """It is the operator's, as configuration is, or somebody edited it; the new text goes beside it."""


def targets(choices: Choices, programs: PurePosixPath) -> list[Target]:
    """
    Return the files of a machine, in the order they are written: whatever uses another one comes after it.

    :param programs: Directory of cpmd and natd, on the machine.
    :raise ConfigError: When a file is missing from this installation.
    """
    found = [
        Target(SYSUSERS, sources.system_file("virt-ports.sysusers")),
        Target(TMPFILES, sources.system_file("virt-ports.tmpfiles")),
    ]
    if MANAGER in choices.roles:
        found += [Target(ETC / "cpmd.toml", configs.cpmd_toml(), is_config=True), _unit("cpmd.service", programs)]
    if choices.roles & {HOST, EDGE}:
        found += [Target(ETC / "natd.toml", configs.natd_toml(choices), is_config=True)]
        found += [_unit("natd.service", programs)]
    if HOST in choices.roles:
        found += [Target(ETC / "hook.conf", configs.hook_conf(), is_config=True)]
        found += [Target(HOOK, sources.hook_file(), mode=0o755)]
    return found


def decide(target: Target, found: bytes | None, written: str | None) -> Action:
    """
    Say what to do about one file.

    :param found: Its content now; None: it does not exist.
    :param written: Digest of what an earlier install wrote there; None: none did.
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
    """Return what is left to do by hand, in order: the product starts no processes."""
    daemons = " ".join(name for name, here in (("cpmd", MANAGER in choices.roles), ("natd", choices.is_node)) if here)
    steps = [f"edit {ETC}/natd.toml, {question}" for question in configs.open_questions(choices) if choices.is_node]
    if choices.is_node and choices.manager_url.startswith("https://"):
        steps.append(f"put this node's certificate, its key and the CA into {ETC}/tls (paths are in natd.toml)")
    steps.append(f"systemd-sysusers {SYSUSERS.name} && systemd-tmpfiles --create {TMPFILES.name}")
    steps.append(f"systemctl daemon-reload && systemctl enable --now {daemons}")
    if hook_is_new:
        steps.append(
            "systemctl reload libvirtd (or virtqemud): it looks for new hooks then; running VMs are not touched"
        )
    if MANAGER in choices.roles:
        steps.append("virt-ports pool add ADDRESS: the public addresses the VMs share")
    return steps


def _unit(name: str, programs: PurePosixPath) -> Target:
    return Target(UNITS / name, sources.system_file(name).replace("@BINDIR@", str(programs)))
