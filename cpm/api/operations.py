"""
The operations that the manager offers to operators, each declared once.

From these declarations the server gets its routes and checks requests, the client gets paths and types, and
``docs/reference/api.md`` is generated. Functions are registered for them in :mod:`cpm.api.handlers`; their arguments
are the parameters declared here and, where there is one, ``body``.

Who only asks does not wait for the types of answers and bodies: they are imported when somebody decodes or describes
them, which is why a declaration has functions that return them.
"""

from __future__ import annotations

from cpm.api.parameters import Address, Choice, Choices, Flag, Match, Moment, NameCursor, Parameter, WholeNumber
from cpm.api.words import (
    EVENT_NAMES,
    FORWARD_STATES,
    NODE_EVENT_NAMES,
    NODE_STATES,
    RANGE_STATES,
    ROLES,
    VM_STATES,
    hyphenated,
)
from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.errors import (
    AddressInUse,
    AddressOverlaps,
    Ambiguous,
    ConfigError,
    Conflict,
    NotFound,
    PortHeld,
    PortsExhausted,
    PortsInUse,
    QuotaReached,
    VirtPortsError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from ipaddress import IPv4Address
    from typing import Any, Final, Generic, TypeAlias, TypeVar

    from cpm.api import requests, views

    Argument: TypeAlias = str | int | float | bool | IPv4Address | Sequence[str] | None
    """
    The value of a parameter as a client gives it; None and False are left out of the query, True becomes 1, and of
    several texts each is there once.
    """

    Answer = TypeVar("Answer")

    class _Answering(Generic[Answer]):
        """Says by which type an operation is answered."""

else:
    Answer = None

    class _Answering:
        def __class_getitem__(cls, _):
            return cls

    class _Views:
        """:mod:`cpm.api.views`, imported when a type of it is needed."""

        def __getattr__(self, name):
            from cpm.api import views

            return getattr(views, name)

    class _Requests:
        """:mod:`cpm.api.requests`, likewise."""

        def __getattr__(self, name):
            from cpm.api import requests

            return getattr(requests, name)

    requests, views = _Requests(), _Views()

_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
"""What stands for itself in a URL (RFC 3986 section 2.3)."""


class Operation(_Answering[Answer]):
    """
    One operation of the API.

    :param method: The HTTP method.
    :param path: The path; ``{name}``, as a whole segment, stands for the parameter of that name.
    :param answer: Returns the type of the answer; for a stream, of each of its lines.
    :param summary: A sentence for the reference.
    :param parameters: Those of the path and those of the query, in the order in which they are checked.
    :param body: Returns the type of the request's body; None: it has none.
    :param streams: The answer is newline-delimited JSON, value by value.
    :param errors: Errors it can answer with, besides those of any operation.
    """

    def __init__(
        self,
        method: str,
        path: str,
        answer: Callable[[], type[Answer]],
        summary: str,
        parameters: tuple[Parameter, ...] = (),
        *,
        body: Callable[[], type[object]] | None = None,
        streams: bool = False,
        errors: tuple[type[VirtPortsError], ...] = (),
    ) -> None:
        self.method = method
        self.path = path
        self.summary = summary
        self.parameters = parameters
        self.streams = streams
        self.errors = errors
        self._answer = answer
        self._body = body

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def answer(self) -> type[Answer]:
        """Type of the answer; for a stream, of each of its lines."""
        return self._answer()

    @property
    def body(self) -> type[object] | None:
        """Type of the request's body; None: it has none."""
        return None if self._body is None else self._body()

    @property
    def has_body(self) -> bool:
        """Whether requests have a body."""
        return self._body is not None

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.method != "GET"

    @property
    def arguments(self) -> frozenset[str]:
        """The names of the arguments that its handler gets from a request."""
        return frozenset(each.name for each in self.parameters) | ({"body"} if self.has_body else set())

    def target(self, arguments: Mapping[str, Argument]) -> str:
        """
        Return path and query of a request.

        :param arguments: By parameter; text may have any characters.
        :raise TypeError: When an argument is not declared, or one of the path is missing.
        """
        segments = self.path.split("/")
        in_path = {each[1:-1] for each in segments if each.startswith("{")}
        if arguments.keys() - {each.name for each in self.parameters} or in_path - arguments.keys():
            raise TypeError(f"{self} takes {sorted(self.arguments)}, not {sorted(arguments)}")
        path = "/".join(_quoted(arguments[each[1:-1]]) if each.startswith("{") else each for each in segments)
        query = "&".join(
            f"{name}={_quoted(value).replace('%20', '+')}"
            for name, values in arguments.items()
            if name not in in_path
            for value in _texts(values)
        )
        return f"{path}?{query}" if query else path


def _texts(value: Argument) -> Iterator[object]:
    """Yield what the query has of a value."""
    if value is True:
        yield 1
    elif isinstance(value, (list, tuple)):
        yield from value
    elif value is not None and value is not False:
        yield value


def _quoted(value: object) -> str:
    """Return a value for a URL, as :func:`urllib.parse.quote` does; bytes of the command line stay what they are."""
    text = str(value).encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in text)


_VM = Parameter("name", "name or UUID of a VM")
_NODE = Parameter("name", "name of a node")
_FOLLOW = Flag("follow", "wait for more, until the client disconnects")
_NO_SUCH_VM = (NotFound, Ambiguous)
_PAGE = WholeNumber("limit", "most entries to return; all when it is missing", 1, 100_000)
_AFTER_NAME = NameCursor("after", "only what comes after it, in order of name: the last entry of the page before")
_BEFORE = WholeNumber("before", "only entries with a smaller `seq`: those before a page", 1, 2**62)
_TIME = (
    Moment("begin", "only entries from then on", default="all that there are"),
    Moment("end", "and until then"),
)
_EVENT = Choices("event", "only such events", hyphenated(EVENT_NAMES))

LIST_VMS: Final = Operation(
    "GET", "/v1/domains", lambda: list[views.DomainView],
    "List the VMs that have ports or wait for some, in order of name.",
    parameters=(
        Flag("all", "also VMs that are gone and whose ports are not free yet"),
        Match("match", "only VMs with such a name or UUID"),
        Parameter("node", "only VMs on this host"),
        Address("address", "only VMs that hold ports of this external address", required=False),
        Choices("state", "only VMs in such a state", hyphenated(VM_STATES)),
        Choice(
            "sort", "the order; the largest number first, equal ones in order of name",
            ("name", "node", "address", "ports", "in-use", "state"),
        ),
        _PAGE, _AFTER_NAME,
    ),
    errors=(NotFound,),
)  # fmt: skip
SHOW_VM: Final = Operation(
    "GET", "/v1/domains/{name}", lambda: views.DomainDetail, "Show everything known of one VM.",
    parameters=(_VM,), errors=_NO_SUCH_VM,
)  # fmt: skip
SET_WISHES: Final = Operation(
    "PATCH", "/v1/domains/{name}", lambda: views.DomainDetail,
    "Set or unset the operator's wishes for one VM; they apply from its next measurement on.",
    parameters=(_VM,), body=lambda: requests.WishesRequest, errors=_NO_SUCH_VM,
)  # fmt: skip
RESIZE: Final = Operation(
    "POST", "/v1/domains/{name}/resize", lambda: views.DomainDetail, "Give one VM's range another size now.",
    parameters=(_VM,), body=lambda: requests.ResizeRequest, errors=(*_NO_SUCH_VM, Conflict, PortsExhausted),
)  # fmt: skip
RELOCATE: Final = Operation(
    "POST", "/v1/domains/{name}/relocate", lambda: views.DomainDetail, "Move one VM to other ports of the same number.",
    parameters=(_VM,), errors=(*_NO_SUCH_VM, Conflict, PortsExhausted),
)  # fmt: skip
EXPLAIN: Final = Operation(
    "GET", "/v1/domains/{name}/explain", lambda: views.ExplainView, "Explain why one VM has the ports it has.",
    parameters=(_VM,), errors=_NO_SUCH_VM,
)  # fmt: skip
HISTORY: Final = Operation(
    "GET", "/v1/domains/{name}/history", lambda: list[views.EventView],
    "Return the newest journal entries of one VM, oldest first; also of a VM that is gone.",
    parameters=(
        _VM, WholeNumber("limit", "most entries to return", 1, 100_000, default=1000), _EVENT, *_TIME, _BEFORE,
    ),
    errors=(NotFound,),
)  # fmt: skip
LIST_FORWARDS: Final = Operation(
    "GET", "/v1/forwards", lambda: list[views.ForwardView],
    "List what is let in to VMs from outside, in order of address and ports.",
    parameters=(
        Match("match", "only of VMs with such a name or UUID"),
        Parameter("node", "only of VMs on this host"),
        Address("address", "only on this external address", required=False),
        Choices("state", "only in such a state", FORWARD_STATES),
        WholeNumber("limit", "most entries to return; all when it is missing", 1, 100_000),
    ),
    errors=(NotFound,),
)  # fmt: skip
ADD_FORWARD: Final = Operation(
    "POST", "/v1/domains/{name}/forwards", lambda: views.ForwardView,
    "Let connections from outside in to one VM; what it has already is returned as it is.",
    parameters=(_VM,), body=lambda: requests.ForwardRequestBody,
    errors=(*_NO_SUCH_VM, Conflict, PortHeld, PortsExhausted, QuotaReached),
)  # fmt: skip
REMOVE_FORWARDS: Final = Operation(
    "POST", "/v1/domains/{name}/forwards/remove", lambda: list[views.ForwardView],
    "Let nothing new in to ports of one VM; return its forwards. What is open stays, and then the ports become free.",
    parameters=(_VM,), body=lambda: requests.ForwardRemoval, errors=_NO_SUCH_VM,
)  # fmt: skip
WHOIS: Final = Operation(
    "GET", "/v1/whois", lambda: views.WhoisView, "Return the VM that held an external port at a moment.",
    parameters=(
        WholeNumber("port", "transport port, or ICMP echo identifier", 0, LAST_PORT, required=True),
        Address("address", "external address"),
        Moment("at", "the moment"),
        Parameter("protocol", "for the record; a range is one VM's for all protocols"),
    ),
    errors=(NotFound,),
)  # fmt: skip
LIST_POOL: Final = Operation(
    "GET", "/v1/pool", lambda: list[views.AddressView], "List the external addresses, in order.",
    parameters=(
        Match("match", "only such addresses"),
        Parameter("pool", "only addresses of this pool"),
        Choice("sort", "the order; the largest number first", ("address", "free", "allocated", "leaving", "vms")),
        _PAGE,
        Address("after", "only addresses after this one, in order of address", required=False),
    ),
    errors=(NotFound,),
)  # fmt: skip
ADD_TO_POOL: Final = Operation(
    "POST", "/v1/pool", lambda: list[views.AddressView],
    "Add external addresses, or replace pool or reserved ports of existing ones, all or none; return all addresses.",
    body=lambda: requests.PoolRequest, errors=(AddressOverlaps, PortsInUse),
)  # fmt: skip
SHOW_ADDRESS: Final = Operation(
    "GET", "/v1/pool/{address}", lambda: views.AddressDetail, "Show which VMs hold which ports of an external address.",
    parameters=(
        Address("address", "external address"),
        Match("match", "only ranges of VMs with such a name or UUID"),
        Choices("state", "only ranges in such a state", RANGE_STATES),
        WholeNumber("limit", "most ranges to return; all when it is missing", 1, 100_000),
        WholeNumber("after", "only ranges that begin above this port", 0, LAST_PORT),
    ),
    errors=(NotFound,),
)  # fmt: skip
REMOVE_FROM_POOL: Final = Operation(
    "POST", "/v1/pool/remove", lambda: list[views.AddressView],
    "Remove external addresses, all or none; return the remaining ones.",
    body=lambda: requests.PoolRemoval, errors=(NotFound, AddressInUse),
)  # fmt: skip
LIST_NODES: Final = Operation(
    "GET", "/v1/nodes", lambda: list[views.NodeView], "List the nodes, in order of name.",
    parameters=(
        Match("match", "only nodes with such a name"),
        Choices("role", "only nodes with such a role", ROLES),
        Choices("state", "only nodes in such a state", hyphenated(NODE_STATES)),
        Choice("sort", "the order; the largest number first", ("name", "state", "vms", "ports")),
        _PAGE, _AFTER_NAME,
    ),
)  # fmt: skip
NODE_EVENTS: Final = Operation(
    "GET", "/v1/node-events", lambda: list[views.NodeEventView],
    "Return the newest entries of the record of nodes, oldest first: service of edges, fences.",
    parameters=(
        WholeNumber("limit", "most entries to return", 1, 10_000, default=100),
        Match("node", "only of nodes with such a name"),
        Choices("event", "only such events", NODE_EVENT_NAMES),
        *_TIME, _BEFORE,
    ),
)  # fmt: skip
FENCE: Final = Operation(
    "POST", "/v1/nodes/{name}/fence", lambda: views.NodeView, "Confirm that a node no longer forwards packets.",
    parameters=(_NODE,), errors=(NotFound, Conflict),
)  # fmt: skip
UNFENCE: Final = Operation(
    "DELETE", "/v1/nodes/{name}/fence", lambda: views.NodeView, "Remove a fence: the node may serve again.",
    parameters=(_NODE,), errors=(NotFound,),
)  # fmt: skip
APPROVE: Final = Operation(
    "PUT", "/v1/nodes/{name}/approval", lambda: views.NodeView,
    "Say what a node may be; one that has asked for no more than that gets its session within seconds.",
    parameters=(_NODE,), body=lambda: requests.ApproveRequest, errors=(Conflict,),
)  # fmt: skip
REVOKE: Final = Operation(
    "DELETE", "/v1/nodes/{name}/approval", lambda: views.NodeView,
    "End a node's session and give it no other; an edge goes out of service first.",
    parameters=(_NODE,), errors=(NotFound, Conflict),
)  # fmt: skip
REMOVE_NODE: Final = Operation(
    "DELETE", "/v1/nodes/{name}", lambda: list[views.NodeView],
    "Forget a node that holds nothing; return the remaining ones.",
    parameters=(_NODE,), errors=(NotFound, Conflict),
)  # fmt: skip
AUDIT: Final = Operation(
    "GET", "/v1/audit", lambda: list[views.AuditView],
    "Return the newest changes that operators made, oldest first: when, who, from which process, and what.",
    parameters=(
        WholeNumber("limit", "most entries to return", 1, 10_000, default=100),
        Match("user", "only by such users"),
        Match("request", "only such requests: method and path, `* /v1/domains/web1*` for example"),
        *_TIME, _BEFORE,
    ),
)  # fmt: skip
EVENTS: Final = Operation(
    "GET", "/v1/events", lambda: views.EventView,
    "Stream the journal: the newest entries, or the first ones after a position, oldest first.",
    parameters=(
        WholeNumber("after", "only entries with a greater `seq`", 0, 2**62),
        WholeNumber("limit", "most existing entries to return", 0, 100_000, default=100),
        _FOLLOW,
        Match("vm", "only of VMs with such a name or UUID"),
        Match("node", "only of hosts with such a name"),
        _EVENT, *_TIME, _BEFORE,
    ),
    streams=True,
)  # fmt: skip
EXPORT: Final = Operation(
    "GET", "/v1/export", lambda: views.RecordView,
    "Stream the journal of a time: first the entries that say who had ports at its begin, then those of the time.",
    parameters=(
        Moment("begin", "only what holds or happens from then on", default="all that there is"),
        Moment("end", "and until then"),
    ),
    streams=True,
)  # fmt: skip
MEASUREMENTS: Final = Operation(
    "GET", "/v1/measurements", lambda: views.ReportView,
    "Stream the hosts' measurements from now on, one line per host and period; only with `follow=1`.",
    parameters=(_FOLLOW,), streams=True,
)  # fmt: skip
STATUS: Final = Operation("GET", "/v1/status", lambda: views.StatusView, "Return the state of the manager itself.")
SETTINGS: Final = Operation(
    "GET", "/v1/settings", lambda: views.SettingsView, "Return which settings the file has that are not in force.",
    errors=(ConfigError,),
)  # fmt: skip
RELOAD: Final = Operation(
    "POST", "/v1/settings/reload", lambda: views.SettingsView,
    "Follow the file as far as that needs no restart; return what was different before.",
    body=lambda: requests.ReloadRequest, errors=(ConfigError, Conflict),
)  # fmt: skip
METRICS: Final = Operation("GET", "/metrics", lambda: views.Document, "Return metrics in Prometheus' text format.")

OPERATIONS: Final[tuple[Operation[Any], ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Operation)
)
"""All of them, in the order of this module."""
