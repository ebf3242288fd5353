"""
Errors that an operator, a peer or a program using the API can see.

Each has the facts as attributes, a stable ``code`` for programs, and a sentence that ends in a remedy. A class also has
the HTTP status with which the manager answers and the exit code of ``virt-ports``, or inherits them::

    VirtPortsError
    ├── InvalidRequest          malformed, or contradicts itself
    ├── ConfigError             a configuration file is wrong
    ├── Forbidden               the caller may not do that
    ├── Busy                    the caller asks too much at once
    ├── NotFound                no such VM, address or node
    ├── JournalNotKept          the ledger no longer has what happened then
    ├── JournalGap              what happened then was lost with a ledger
    ├── Ambiguous               several VMs have that name
    ├── Conflict                valid, but not in the present state
    │   ├── AddressInUse
    │   ├── AddressOverlaps     the address has another use between the machines
    │   ├── LedgerMistrusted    a node has followed another ledger, or a later state of it
    │   ├── NameInUse           another machine is connected under that node's name
    │   ├── IllegalStep         an allocation in that state cannot take that step
    │   ├── PortsInUse          ports are to be reserved that a VM has
    │   ├── PortHeld            ports are asked for that somebody has
    │   └── Overloading         a port would have two owners: refused by the ledger
    ├── NotApproved             the operator has not approved the node as what it says it is
    ├── PortsExhausted          no run of free ports is long enough
    ├── QuotaReached            a host has as many VMs or ports as it may have
    ├── InternalPoolExhausted   no internal address is left
    ├── LedgerError             the ledger cannot be read or written
    │   ├── LedgerUnwritable    it can be read, but not written at the moment
    │   │   └── LedgerFull      because its file system is full
    │   └── SchemaTooNew
    ├── KernelError             the kernel refused a transaction
    └── Unreachable             the peer does not answer

Those of the ledger and its journal, LedgerMistrusted among them, are in :mod:`cpm.protocol.ledger_errors`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Address


class ExitCode:
    """Exit codes of ``virt-ports``, which imports this module and would wait for :mod:`enum` longer than for it."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERNAL = 4
    INTERRUPTED = 130
    """128 + SIGINT, as a shell reports it."""
    BROKEN_PIPE = 141
    """128 + SIGPIPE, as a shell reports it."""


class VirtPortsError(Exception):
    """Base class. ``str()`` is a sentence for people, ``code`` is for programs."""

    code: str = "error"
    http_status: int = 500
    exit_code: int = ExitCode.INTERNAL


class InvalidRequest(VirtPortsError):
    """A request is malformed or contradicts itself; the message names the part and what to use instead."""

    code = "invalid-request"
    http_status = 400
    exit_code = ExitCode.USAGE


class ConfigError(VirtPortsError):
    """
    A configuration file is missing, unreadable or wrong.

    :param file: Path of the file.
    :param key: Dotted key, empty when the file as a whole is meant.
    :param remedy: What to write instead.
    """

    code = "config"
    exit_code = ExitCode.REFUSED

    def __init__(self, file: str, key: str, remedy: str) -> None:
        super().__init__(file, key, remedy)
        self.file = file
        self.key = key
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where}: {self.remedy}"


class Forbidden(VirtPortsError):
    """The kernel says that the caller is a user who may not do that; the message says who may."""

    code = "forbidden"
    http_status = 403
    exit_code = ExitCode.REFUSED


class Busy(VirtPortsError):
    """The caller has as many requests under way as are served to one user at once; the message says how many."""

    code = "busy"
    http_status = 503
    exit_code = ExitCode.REFUSED


class NotFound(VirtPortsError):
    """
    There is nothing of that kind and name.

    :param kind: In a word: ``VM``, ``address``, ``node``.
    :param name: The name as given.
    :param remedy: Where to look, for example the command that lists them.
    """

    code = "not-found"
    http_status = 404
    exit_code = ExitCode.REFUSED

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        super().__init__(kind, name, remedy)
        self.kind = kind
        self.name = name
        self.remedy = remedy

    def __str__(self) -> str:
        return f"no {self.kind} {self.name!r}; {self.remedy}"


class Ambiguous(VirtPortsError):
    """
    Several VMs have that name.

    :param name: The name as given.
    :param uuids: Their UUIDs.
    """

    code = "ambiguous"
    http_status = 409
    exit_code = ExitCode.REFUSED

    def __init__(self, name: str, uuids: tuple[str, ...]) -> None:
        super().__init__(name, uuids)
        self.name = name
        self.uuids = uuids

    def __str__(self) -> str:
        return f"{len(self.uuids)} VMs are named {self.name!r}; use one of the UUIDs {', '.join(self.uuids)}"


class Conflict(VirtPortsError):
    """A valid request that the present state does not allow; the message ends in a remedy."""

    code = "conflict"
    http_status = 409
    exit_code = ExitCode.REFUSED


class AddressInUse(Conflict):
    """
    An external address still has allocations.

    :param address: The address.
    :param allocations: How many ranges VMs still hold on it.
    """

    code = "address-in-use"

    def __init__(self, address: IPv4Address, allocations: int) -> None:
        super().__init__(address, allocations)
        self.address = address
        self.allocations = allocations

    def __str__(self) -> str:
        ranges = "1 range" if self.allocations == 1 else f"{self.allocations} ranges"
        return (
            f"cannot remove {self.address}: VMs hold {ranges} on it; have new connections leave it with "
            f"`virt-ports pool add {self.address} --pool leaving`, and wait until its ports are free, see "
            f"`virt-ports pool show {self.address}`"
        )


class NameInUse(Conflict):
    """
    A machine says hello under the name of a node that is connected, alive and another one.

    :param node: The name.
    :param first: Address of the machine that has the session, and keeps it.
    :param second: Address of the machine that is refused.
    """

    code = "name-in-use"

    def __init__(self, node: str, first: str, second: str) -> None:
        super().__init__(node, first, second)
        self.node = node
        self.first = first
        self.second = second

    def __str__(self) -> str:
        return (
            f"{self.first} is connected as {self.node} and answers, so {self.second} is refused; "
            "give that machine another name and certificate"
        )


class IllegalStep(Conflict):
    """
    An allocation cannot take a step in its present state.

    :param state: The state, in a word.
    :param event: The event, in a word.
    """

    code = "illegal-step"
    http_status = 500
    exit_code = ExitCode.INTERNAL

    def __init__(self, state: str, event: str) -> None:
        super().__init__(state, event)
        self.state = state
        self.event = event

    def __str__(self) -> str:
        return f"a range that is {self.state} cannot be {self.event}; please report this as a bug"


class AddressOverlaps(Conflict):
    """
    An external address is used for something else between the machines.

    :param address: The external address.
    :param use: What else it is.
    :param remedy: What to do.
    """

    code = "address-overlaps"

    def __init__(self, address: IPv4Address, use: str, remedy: str) -> None:
        super().__init__(address, use, remedy)
        self.address = address
        self.use = use
        self.remedy = remedy

    def __str__(self) -> str:
        return f"cannot use {self.address} as an external address: {self.use}; {self.remedy}"


class PortsInUse(Conflict):
    """
    Ports are to be reserved that a VM has.

    :param address: The external address.
    :param ports: The VM's range.
    :param vm: Its name.
    :param uuid: Its UUID.
    """

    code = "ports-in-use"

    def __init__(self, address: IPv4Address, ports: str, vm: str, uuid: str) -> None:
        super().__init__(address, ports, vm, uuid)
        self.address = address
        self.ports = ports
        self.vm = vm
        self.uuid = uuid

    def __str__(self) -> str:
        # The command is to be copied to a shell: a name may have anything in it.
        return (
            f"cannot reserve these ports of {self.address}: VM {self.vm} has {self.ports}; give it other ports, "
            f"`virt-ports relocate {self.uuid}`, and try again when `virt-ports pool show {self.address}` does not "
            "show that range any more"
        )


class PortHeld(Conflict):
    """
    Ports are asked for by number, and somebody has one of them.

    :param address: The external address.
    :param ports: The ports that the other has.
    :param holder: Who: a VM by name and UUID, a machine, or the operator.
    :param until: Until when, in words.
    :param remedy: What to do.
    """

    code = "port-held"

    def __init__(self, address: IPv4Address, ports: str, holder: str, until: str, remedy: str) -> None:
        super().__init__(address, ports, holder, until, remedy)
        self.address = address
        self.ports = ports
        self.holder = holder
        self.until = until
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.address} {self.ports} belongs to {self.holder} {self.until}; {self.remedy}"


class Overloading(Conflict):
    """
    An external port would get a second owner; the change was refused, and nothing changed.

    :param detail: The constraint that refused, and the change.
    """

    code = "overloading"
    exit_code = ExitCode.INTERNAL

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"refused, one external port would have two owners ({self.detail}); please report this as a bug"


class NotApproved(VirtPortsError):
    """
    A machine asks to be a node, and the operator has not approved it as what it says it is.

    :param node: The name that it gives.
    :param why: What is not approved; completes a sentence that begins with the name.
    """

    code = "not-approved"
    http_status = 403
    exit_code = ExitCode.REFUSED

    def __init__(self, node: str, why: str) -> None:
        super().__init__(node, why)
        self.node = node
        self.why = why

    def __str__(self) -> str:
        return f"{self.node} {self.why}; on the manager: virt-ports node approve {self.node}"


class PortsExhausted(VirtPortsError):
    """
    No run of free ports is long enough.

    :param wanted: Ports requested.
    :param longest_free: Ports in the longest free run of the addresses that were searched; 0 when all are full.
    :param reason: Why, in a few words, for example ``no external address in the pool``.
    """

    code = "ports-exhausted"
    http_status = 507
    exit_code = ExitCode.REFUSED

    def __init__(self, wanted: int, longest_free: int, reason: str) -> None:
        super().__init__(wanted, longest_free, reason)
        self.wanted = wanted
        self.longest_free = longest_free
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"cannot allocate {self.wanted} ports: {self.reason} (longest free run: {self.longest_free}); "
            "add an address to its pool with `virt-ports pool add`"
        )


class QuotaReached(VirtPortsError):
    """
    A host has as many VMs, or its VMs as many ports, as it may have.

    :param node: The host.
    :param what: ``vms`` or ``ports``.
    :param limit: How many it may have.
    """

    code = "quota-reached"
    http_status = 507
    exit_code = ExitCode.REFUSED

    def __init__(self, node: str, what: str, limit: int) -> None:
        super().__init__(node, what, limit)
        self.node = node
        self.what = what
        self.limit = limit

    def __str__(self) -> str:
        words = {"vms": "VMs", "ports": "ports"}[self.what]
        return (
            f"host {self.node} is at its quota of {self.limit} {words}, leaving ones included; "
            f"to raise it: `virt-ports node approve {self.node} --max-{self.what} N`"
        )


class InternalPoolExhausted(VirtPortsError):
    """
    No internal address is left.

    :param pool: The pool, in CIDR notation.
    """

    code = "internal-pool-exhausted"
    http_status = 507
    exit_code = ExitCode.REFUSED

    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self.pool = pool

    def __str__(self) -> str:
        return f"no internal address is left in {self.pool}; set a larger pool.internal in cpmd.toml"


class KernelError(VirtPortsError):
    """
    The kernel refused a transaction; no part of it is in effect.

    :param action: What was attempted, in the infinitive: ``add an element``.
    :param errno: The kernel's error number, 0 when there was no answer.
    :param detail: The kernel's error message, or ours.
    """

    code = "kernel"

    def __init__(self, action: str, errno: int, detail: str) -> None:
        super().__init__(action, errno, detail)
        self.action = action
        self.errno = errno
        self.detail = detail

    def __str__(self) -> str:
        return f"cannot {self.action}: {self.detail} (errno {self.errno}); see `nft list ruleset` on this node"


class Unreachable(VirtPortsError):
    """
    A peer does not answer.

    :param peer: A socket path or URL.
    :param detail: The system's error message.
    :param remedy: What to do.
    """

    code = "unreachable"
    exit_code = ExitCode.UNREACHABLE

    def __init__(self, peer: str, detail: str, remedy: str) -> None:
        super().__init__(peer, detail, remedy)
        self.peer = peer
        self.detail = detail
        self.remedy = remedy

    def __str__(self) -> str:
        return f"cannot reach {self.peer}: {self.detail}; {self.remedy}"
