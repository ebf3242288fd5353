"""Checks of netfilter's queues and logs. Tested in ``tests/unit/machine_doctor/test_checks_of_packets.py``."""

from __future__ import annotations

from collections.abc import Collection

from machine_doctor.checks.registry import check, for_hosts
from machine_doctor.facts import Facts, Listener, known
from machine_doctor.findings import Fact, Verdict, problem, warning


def _verdict(
    facts: Facts, listeners: Collection[Listener], wanted: Collection[int], kind: str, setting: str
) -> Verdict:
    ours = {each.number: each for each in listeners if each.number in wanted}
    shown: dict[str, Fact] = {str(number): each.program or "unknown" for number, each in ours.items()}
    troubles = [
        problem(
            f"{kind} {each.number} is taken by {each.program or 'another program'}",
            f"stop that program or give it another one, or set host.{setting} in natd.toml, and restart natd",
        )
        for each in ours.values()
        if not each.is_natd and (each.program or facts.process("natd") is None)
    ]
    missing = sorted(set(wanted) - ours.keys())
    if missing and facts.process("natd") is not None and facts.families:
        numbers = ", ".join(map(str, missing))
        troubles.append(
            warning(f"natd runs and does not listen to {kind} {numbers}", "`journalctl -u natd` says why; restart natd")
        )
    return Verdict(shown, tuple(troubles))


@check(
    "nfqueue",
    "no other program has natd's NFQUEUE",
    matters="connections of VMs that wait for more ports are decided by a stranger, or dropped",
    remedy="set host.queue in natd.toml to a number that nothing uses, and restart natd",
)
def nfqueue(facts: Facts) -> Verdict:
    """Judge who listens to the queue."""
    for_hosts(facts)
    host = facts.setup.kernel.host
    assert host is not None
    return _verdict(facts, known(facts.queues), (host.queue,), "NFQUEUE", "queue")


@check(
    "nflog",
    "no other program has natd's NFLOG groups",
    matters="natd does not learn of bursts, and VMs get more ports later than they could",
    remedy="set host.log_group in natd.toml to a number which, with the next two, nothing uses, and restart natd",
)
def nflog(facts: Facts) -> Verdict:
    """Judge who listens to the groups."""
    for_hosts(facts)
    host, natd = facts.setup.kernel.host, facts.setup.natd
    assert host is not None
    groups = (host.log_group, host.older_log_group, host.port_control_log_group)
    is_listening = natd is None or natd.monitor.arrivals
    return _verdict(facts, known(facts.log_groups), groups if is_listening else (), "NFLOG group", "log_group")
