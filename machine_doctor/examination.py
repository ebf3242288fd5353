"""
Gathers the facts of this machine, and has the checks judge them.

Tested in ``tests/unit/machine_doctor/test_examination.py``, with a real network in ``tests/netns/test_doctor.py``, and
on a whole site in ``tests/e2e/test_doctor.py``.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Collection
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

import cpm
import cpm.settings
import natctl.settings
from cpm.api.client import Client
from cpm.protocol.errors import InvalidRequest
from cpm.service import clock
from machine_doctor import checks
from machine_doctor.facts import Facts, ManagerFacts, Setup, Unread
from machine_doctor.findings import Examination, worst
from machine_doctor.readers import files, hook, listeners, machine, manager, network, setup, tls

_MANAGER_TIMEOUT_S = 5.0
_ROOT = Path("/")


class Sources(NamedTuple):
    """Where facts come from."""

    socket: str
    """Of cpmd; an empty string: the one that cpmd.toml names."""
    natd: Path = natctl.settings.DEFAULT_PATH
    cpmd: Path = cpm.settings.DEFAULT_PATH


def gather(sources: Sources) -> Facts:
    """
    Read everything, in the network namespace of the calling thread. Changes nothing.

    The hook is executed once, with an operation that does nothing; a manager on another machine is sent one request
    without a session.
    """
    here = setup.setup(sources.natd, sources.cpmd)
    net = network.network(here)
    running = machine.processes(_sockets(here, sources))
    paths = [] if isinstance(net, Unread) else sorted(net.interfaces)
    looked_at, unseen = files.look_at_all(_paths(here))
    site = manager.manager(Client(_sockets(here, sources)["cpmd"], timeout_s=_MANAGER_TIMEOUT_S))
    return Facts(
        now=clock.wall().seconds,
        is_root=os.geteuid() == 0,
        version=importlib.metadata.version("virt-ports"),
        installed_at=_installed_at(),
        setup=here,
        kernel=machine.kernel(_ROOT),
        sysctl=machine.sysctl(_ROOT, paths),
        sysctl_files=machine.sysctl_files(_ROOT),
        network=net,
        filters=network.filters(),
        families=network.families(),
        queues=listeners.listeners("queue"),
        log_groups=listeners.listeners("log"),
        connections=machine.number(_ROOT / "proc/sys/net/netfilter/nf_conntrack_count"),
        hash_buckets=machine.number(_ROOT / "sys/module/nf_conntrack/parameters/hashsize"),
        sockets=network.local_sockets(),
        processes=running,
        hook=hook.hook(_ROOT, running),
        units=machine.units(_ROOT),
        files=looked_at,
        unseen=unseen,
        disks=machine.disks(_folders(here)),
        clock=machine.clock(),
        certificates=tls.certificates(here),
        remote=tls.remote_manager(here, lambda: clock.wall().seconds),
        manager=site,
        external=_external(here, site),
        networkd=machine.networkd(_ROOT),
    )


def _sockets(here: Setup, sources: Sources) -> dict[str, str]:
    configured = here.cpmd.listen.socket if here.cpmd is not None else cpm.settings.ListenSettings().socket
    natd = here.natd.listen.socket if here.natd is not None else natctl.settings.ListenSettings().socket
    return {"cpmd": sources.socket or configured, "natd": natd}


def _external(here: Setup, site: ManagerFacts | Unread) -> frozenset[IPv4Address] | Unread:
    if isinstance(site, ManagerFacts):
        return frozenset(view.address for view in site.pool)
    return network.external_addresses(here)


def _installed_at() -> float | None:
    try:
        return Path(cpm.__file__ or "").stat().st_ctime
    except OSError:
        return None


def _paths(here: Setup) -> list[str | None]:
    """Return the files and folders whose permissions matter."""
    paths: list[str | None] = []
    if here.natd is not None:
        socket = here.natd.listen.socket
        paths += [here.natd.manager.key, socket, str(Path(socket).parent), here.natd.state]
    if here.cpmd is not None:
        socket = here.cpmd.listen.socket
        paths += [
            here.cpmd.listen.key,
            here.cpmd.events.webhook_token_file,
            here.cpmd.ledger.path,
            socket,
            str(Path(socket).parent),
        ]
    return paths


def _folders(here: Setup) -> list[str]:
    folders = [str(Path(here.cpmd.ledger.path).parent)] if here.cpmd is not None else []
    return [*folders, here.natd.state] if here.natd is not None else folders


def selected(names: Collection[str]) -> tuple[checks.Check, ...]:
    """
    Return the checks with these names, all without any.

    :raise InvalidRequest: When there is no check of a name.
    """
    known = checks.all_checks()
    unknown = sorted(set(names) - {each.name for each in known})
    if unknown:
        raise InvalidRequest(f"no check {', '.join(unknown)}; `virt-ports doctor --list` has their names")
    return tuple(each for each in known if not names or each.name in names)


def examine(facts: Facts, wanted: Collection[checks.Check]) -> Examination:
    """Judge the facts. Pure."""
    findings = tuple(each.finding(facts) for each in wanted)
    roles = sorted(role.value for role in facts.setup.roles)
    return Examination(
        facts.version,
        facts.now,
        facts.setup.name,
        (*roles, *(("manager",) if facts.setup.is_manager else ())),
        facts.setup.is_installed,
        worst(each.result for each in findings),
        findings,
    )
