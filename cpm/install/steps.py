"""
The steps that are left to the operator, in order: what starts or ends a process is not done by an install. Pure.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cpm.install import configs
from cpm.install.choices import DEFAULT_POOL, EDGE, HOST, MANAGER, Choices
from cpm.install.plan import ETC, HOOK, SYSUSERS, TMPFILES, UNITS, Action, FileOutcome
from cpm.protocol import overlaps

_PACKAGED = (Action.PACKAGED, Action.REMOVE)
"""A Debian package has brought the file, and has made the user and the directories."""


def after_install(choices: Choices, done: list[FileOutcome]) -> list[str]:
    """Return what is left to do after an install. :param done: Its outcomes."""
    daemons = " ".join(name for name, here in (("cpmd", MANAGER in choices.roles), ("natd", choices.is_node)) if here)
    steps = list(_pool_steps(choices))
    steps += [f"edit {ETC}/natd.toml, {question}" for question in configs.open_questions(choices) if choices.is_node]
    if choices.is_node and choices.manager_url.startswith("https://"):
        steps.append(f"put this node's certificate, its key and the CA into {ETC}/tls (paths are in natd.toml)")
    if any(each.path == SYSUSERS and each.action not in _PACKAGED for each in done):
        steps.append(f"systemd-sysusers {SYSUSERS.name} && systemd-tmpfiles --create {TMPFILES.name}")
    reload = "" if all(each.action is Action.PACKAGED for each in _units(done)) else "systemctl daemon-reload && "
    steps.append(f"{reload}systemctl enable --now {daemons}")
    steps += _hook_steps(done)
    if choices.is_node:
        where = "" if MANAGER in choices.roles else "on the manager: "
        steps.append(f"{where}virt-ports node approve {choices.name}: let this machine be {_roles_of(choices)}")
    if MANAGER in choices.roles:
        steps.append("virt-ports pool add ADDRESS: the public addresses the VMs share")
    return steps


def after_refresh(done: list[FileOutcome]) -> list[str]:
    """Return what is left to do after a refresh. :param done: Its outcomes."""
    changed = [each for each in _units(done) if each.action in (Action.UPDATE, Action.REMOVE)]
    if not changed:
        return []
    return ["systemctl daemon-reload && systemctl try-restart " + " ".join(each.path.stem for each in changed)]


def _units(done: Iterable[FileOutcome]) -> list[FileOutcome]:
    return [each for each in done if each.path.parent == UNITS]


def _hook_steps(done: Iterable[FileOutcome]) -> Iterator[str]:
    if any(each.path == HOOK and each.action is Action.CREATE for each in done):
        yield (
            "systemctl try-reload-or-restart libvirtd (or virtqemud): it finds new hooks only then, or when it starts; "
            "running VMs are not affected"
        )


def _roles_of(choices: Choices) -> str:
    return " and ".join(role for role in (HOST, EDGE) if role in choices.roles)


def _pool_steps(choices: Choices) -> Iterator[str]:
    """Yield what is left to do about an internal pool that this machine cannot share with VMs."""
    if not choices.pool_uses:
        return
    uses = overlaps.words(choices.pool_uses)
    if MANAGER not in choices.roles:
        yield (
            f"see that [pool] internal in the manager's cpmd.toml is not the default {DEFAULT_POOL}, "
            f"of which this machine uses {uses}: {overlaps.remedy(DEFAULT_POOL, choices.pool_uses)}"
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
