"""What a machine has that an installation changes: compared before it and after it is gone."""

from __future__ import annotations

from tests.machines.machine import Machine

State = dict[str, list[str]]
"""By question: the lines of the answer."""

_QUESTIONS = {
    "files": (
        "find /etc /usr /var/lib /opt /run -xdev \\( -name '*virt-ports*' -o -name 'natd*' "
        "-o -name 'cpmd*' \\) -print; echo end"
    ),
    "tables": "nft list tables | grep -vE 'filter|nat|mangle|libvirt'; echo end",
    "rules": "ip rule",
    # The router's address is learned anew.
    "routes": "ip route show table all | grep -v virbr0",
    "kernel": (
        "sysctl -a 2>/dev/null | grep -E '^net[.](ipv4|netfilter)[.]' "
        "| grep -vE 'count|pressure|p_mem|vnet|virbr|docker|random|nf_log|tcp_fastopen_key|buckets|_max|bridge'"
    ),
    "units": (
        "all=$(systemctl list-unit-files --no-legend --plain) || exit 1; "
        "grep -E 'natd|cpmd|virt-ports' <<<\"$all\"; echo end"
    ),
    "processes": "ps -eo args | grep -E '[/]natd|[/]cpmd'; echo end",
}


def state(machine: Machine) -> State:
    """Return what the machine has now."""
    return {name: machine.run(question).splitlines() for name, question in _QUESTIONS.items()}
