"""
What verbs print with ``-o json`` that is no answer of the manager: a type for each document.

Types only, which verbs import for the type checker and not when they run. ``docs/reference/output.md`` and its schema
are made from them (:mod:`cpm.cli.output_reference`). Tested in ``tests/unit/cpm/cli/test_output.py``.
"""

from __future__ import annotations

from typing import TypedDict


class TopDocument(TypedDict):
    """A VM in ``virt-ports top``."""

    name: str
    uuid: str
    node: str
    state: str
    """As in ``virt-ports list``."""
    ports_in_use: int | None
    """Of the active range; null: not measured yet."""
    ports_held: int
    """All its ports, those of ranges that it leaves included."""
    ports: int
    """Size of the active range; 0: it has none."""
    cap: int | None
    new_connections_per_s: float | None
    packets_per_s: float | None
    """Both directions; null, as all three rates, while its host has not reported."""
    megabits_per_s: float | None
    """Both directions, 10^6 bit/s."""


class PolicyDocument(TypedDict):
    """What became of a load under one policy."""

    policy: str
    refused: int
    """Connections for which there was no port."""
    refused_vms: int
    """VMs with such connections."""
    grown: int
    """How often a range grew."""
    moved: int
    """How often a VM got another range."""
    shrunk: int
    denied: int
    """How often a VM asked for more ports and got none."""
    held_mean: float
    """Ports that all VMs held together, on average over the time."""
    held_peak: int
    used_mean: float
    used_peak: int
    held_per_used: float | None
    """Mean of the ports held through mean of the ports used; null: none were used."""
    pool_ports: int | None
    """Ports of the smallest pool in which nothing was refused; null: not searched, or there is none."""
    vms_per_address: float | None
    """VMs that share an external address in that pool."""


class SimulateDocument(TypedDict):
    """The results of ``virt-ports simulate``."""

    trace: str
    """Name of the file, or kind of the generated load."""
    seed: int
    vms: int
    seconds: float
    connections: int
    policies: list[PolicyDocument]


class RecordDocument(TypedDict):
    """What ``virt-ports record`` has written."""

    file: str
    vms: int
    seconds: float
    lines: int


class CheckDocument(TypedDict):
    """A check that ``virt-ports doctor`` can make."""

    check: str
    about: str
    """Completes the sentence "it looks whether"."""


class ReportDocument(TypedDict):
    """The archive that ``virt-ports report`` has written."""

    file: str
    files: int
    """How many are in it."""
    bytes: int


class SettingsFileDocument(TypedDict):
    """A settings file that ``virt-ports config check`` has read."""

    file: str
    problem: str | None
    """What is wrong, with the remedy; null: nothing."""


class CertificateDocument(TypedDict):
    """A certificate of ``virt-ports pki``."""

    name: str
    """A node's name, the manager's address, or ``ca``: the authority's own."""
    certificate: str
    """Path of the PEM file."""
    key: str
    """Path of the PEM file with its private key."""
    ends: float | None
    """UTC seconds after which it is not valid; null: see ``fault``."""
    fault: str
    """Why it is no certificate of this authority that can be read; empty: it is one."""


class InstalledFileDocument(TypedDict):
    """What ``virt-ports install`` has done, or would do, with a file."""

    path: str
    action: str
    """``create``, ``update``, ``unchanged``; ``keep``: it was edited, and the new text is in ``FILE.new`` beside it;
    ``packaged``: the package has brought the same; ``remove``: so this copy goes; ``take away``: the hook does not run,
    so it is not installed."""
    why: str
    """Why it was taken away, with the remedy; else empty."""


class InstallDocument(TypedDict):
    """What ``virt-ports install`` has done."""

    dry_run: bool
    """It only says what it would do."""
    files: list[InstalledFileDocument]
    remaining: list[str]
    """Steps that are left to you, in their order."""


class RemovedFileDocument(TypedDict):
    """What ``virt-ports uninstall`` has done, or would do, with a file or folder."""

    path: str
    action: str
    """``remove``, ``keep`` or ``move``."""
    why: str
    """Why it is kept, or where it is moved to; else empty."""


class UninstallDocument(TypedDict):
    """What ``virt-ports uninstall`` has done."""

    dry_run: bool
    """It only says what it would do."""
    files: list[RemovedFileDocument]
    kernel: list[str]
    """What the kernel got back: tables, routes, rules and settings."""
    vms_cut: int
    """VMs whose connections ended."""
    remaining: list[str]
    """Steps that are left to you, in their order."""


class BackupDocument(TypedDict):
    """The copy that ``virt-ports backup`` has written."""

    file: str
    bytes: int
    ledger: str
    """Path of what was copied."""


class RestoreDocument(TypedDict):
    """What ``virt-ports restore`` has done."""

    ledger: str
    """Path of the ledger."""
    former: str | None
    """Where the former ledger is now; null: there was none, or the one in place was accepted."""
