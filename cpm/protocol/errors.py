"""
Errors that a user, an operator or a peer gets to see.

Each carries facts as attributes, a stable machine ``code`` and one sentence that ends in what to do::

    VirtPortsError
    ├── InvalidRequest          what was asked cannot be understood
    ├── ConfigError             file, key and remedy
    ├── NotFound                no such VM, address or node
    ├── Ambiguous               a name that fits several VMs
    ├── Conflict                true, but not now
    │   ├── AddressInUse
    │   ├── IllegalStep         an allocation cannot do that in its state
    │   └── Overloading         one external port, two owners: refused by the ledger itself
    ├── PortsExhausted          no free run of ports is long enough
    ├── InternalPoolExhausted   no internal address is left
    ├── LedgerError             the ledger cannot be read or written
    │   └── SchemaTooNew
    ├── KernelError             the kernel refused a transaction
    └── Unreachable             the other side does not answer
"""

from __future__ import annotations

from ipaddress import IPv4Address


class VirtPortsError(Exception):
    """The family. ``str()`` is a sentence for a person, ``code`` is for programs."""

    code: str = "error"


class InvalidRequest(VirtPortsError):
    """What was asked cannot be understood; the message names the part and what would be right."""

    code = "invalid-request"


class ConfigError(VirtPortsError):
    """
    A configuration file is missing, unreadable or wrong.

    :param file: Path of the file.
    :param key: Dotted key, empty when the file as a whole is meant.
    :param remedy: What to write instead.
    """

    code = "config"

    def __init__(self, file: str, key: str, remedy: str) -> None:
        super().__init__(file, key, remedy)
        self.file = file
        self.key = key
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where}: {self.remedy}"


class NotFound(VirtPortsError):
    """
    Nothing of that kind goes by that name.

    :param kind: What was looked for, in a word: ``VM``, ``address``, ``node``.
    :param name: The name as given.
    :param remedy: Where to look, for example the command that lists them.
    """

    code = "not-found"

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        super().__init__(kind, name, remedy)
        self.kind = kind
        self.name = name
        self.remedy = remedy

    def __str__(self) -> str:
        return f"no {self.kind} {self.name!r}; {self.remedy}"


class Ambiguous(VirtPortsError):
    """
    Several VMs go by that name.

    :param name: The name as given.
    :param uuids: Those that fit.
    """

    code = "ambiguous"

    def __init__(self, name: str, uuids: tuple[str, ...]) -> None:
        super().__init__(name, uuids)
        self.name = name
        self.uuids = uuids

    def __str__(self) -> str:
        return f"{len(self.uuids)} VMs are named {self.name!r}; use one of the UUIDs {', '.join(self.uuids)}"


class Conflict(VirtPortsError):
    """True as asked, but the present state does not allow it; the message says what does."""

    code = "conflict"


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
        return (
            f"cannot remove {self.address}: VMs hold {self.allocations} ranges on it; "
            "stop them or move them first, see `virt-ports list`"
        )


class IllegalStep(Conflict):
    """
    An event that cannot happen to an allocation in its present state.

    :param state: The state, in a word.
    :param event: The event, in a word.
    """

    code = "illegal-step"

    def __init__(self, state: str, event: str) -> None:
        super().__init__(state, event)
        self.state = state
        self.event = event

    def __str__(self) -> str:
        return f"a range that is {self.state} cannot be {self.event}; please report this as a bug"


class Overloading(Conflict):
    """
    One external port would have had two owners; the ledger refused and nothing changed.

    :param detail: The ledger's own words: address, ports and both owners where known.
    """

    code = "overloading"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"refused, one external port would have two owners ({self.detail}); please report this as a bug"


class PortsExhausted(VirtPortsError):
    """
    No free run of ports is long enough.

    :param wanted: Ports asked for.
    :param longest_free: Longest free run on any address that was searched, in ports; 0 when all are full.
    :param reason: Why, in a few words, for example ``no external address in the pool``.
    """

    code = "ports-exhausted"

    def __init__(self, wanted: int, longest_free: int, reason: str) -> None:
        super().__init__(wanted, longest_free, reason)
        self.wanted = wanted
        self.longest_free = longest_free
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"cannot allocate {self.wanted} ports: {self.reason} (longest free run: {self.longest_free}); "
            "add an address with `virt-ports pool add`"
        )


class InternalPoolExhausted(VirtPortsError):
    """
    No internal address is left.

    :param pool: The pool, in CIDR notation.
    """

    code = "internal-pool-exhausted"

    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self.pool = pool

    def __str__(self) -> str:
        return f"no internal address is left in {self.pool}; set a larger pool.internal in cpmd.toml"


class LedgerError(VirtPortsError):
    """The ledger cannot be read or written; the message has SQLite's words and what to look at. Nothing changed."""

    code = "ledger"


class SchemaTooNew(LedgerError):
    """
    The ledger was written by a newer version.

    :param found: Schema version in the file.
    :param known: Newest version this program knows.
    """

    code = "schema-too-new"

    def __init__(self, found: int, known: int) -> None:
        super().__init__(found, known)
        self.found = found
        self.known = known

    def __str__(self) -> str:
        return (
            f"the ledger has schema {self.found}, this version knows {self.known}; "
            "install the newer virt-ports or restore a backup made before the upgrade"
        )


class KernelError(VirtPortsError):
    """
    The kernel refused a transaction; nothing of it is in force.

    :param action: What was being done.
    :param errno: The kernel's answer, 0 when there was none.
    :param detail: The kernel's words, or ours.
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
    The other side does not answer.

    :param peer: Whom we wanted: a socket path or URL.
    :param detail: What the system said.
    :param remedy: What to do.
    """

    code = "unreachable"

    def __init__(self, peer: str, detail: str, remedy: str) -> None:
        super().__init__(peer, detail, remedy)
        self.peer = peer
        self.detail = detail
        self.remedy = remedy

    def __str__(self) -> str:
        return f"cannot reach {self.peer}: {self.detail}; {self.remedy}"
