"""cpmd's settings: ``cpmd.toml``, one struct per table, every field with its unit and reason."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import replace

from cpm.core import quotas
from cpm.core.rollout.edge_service import Patience
from cpm.core.sizing import LITERAL, GuardSettings, default_policy, policy_named
from cpm.core.sizing.rules import PoolRules
from cpm.core.wishes import Defaults
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT, MAX_QUOTA_PORTS, MAX_QUOTA_VMS, whole_number
from cpm.protocol.errors import ConfigError, InvalidRequest
from cpm.protocol.model import Filtering
from cpm.protocol.timeouts import Timeouts, TimeoutsTable
from cpm.protocol.wishes import MAXIMUM_WEIGHT
from cpm.service import config, logs
from cpm.service.metrics import settings as listen
from cpm.service.metrics.settings import Listen, MetricsListen

DEFAULT_PATH = Path("/etc/virt-ports/cpmd.toml")

_Ports = Annotated[int, Meta(ge=1, le=LAST_PORT - FIRST_PORT + 1)]
_Count = Annotated[int, Meta(ge=1, le=4_000_000)]
_Seconds = Annotated[float, Meta(ge=0)]
_Positive = Annotated[float, Meta(gt=0)]
_MOST_TIMES: Final = 1000
"""Greatest factor of a number of ports; with one near the largest number a product has no value any more."""


class ListenSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The addresses at which operators and nodes reach the manager."""

    socket: str = "/run/virt-ports/cpmd.sock"
    """Unix socket for ``virt-ports`` and for a natd on the same machine. Anybody who can open it (mode 0660) may read.
    Changes are for root, cpmd's own user and members of ``admin_group``, sessions of nodes for root."""
    read_socket: str = ""
    """A second socket, on which nobody may change anything, for programs that only read; empty: none."""
    admin_group: str = ""
    """Group whose members may change something; empty: only root."""
    address: str | None = None
    """``IP:PORT`` for nodes on other machines, always TLS with client certificates. If not set, only the sockets."""
    certificate: str | None = None
    """PEM file: the manager's certificate, its name or address as SAN."""
    key: str | None = None
    """PEM file: its private key."""
    ca: str | None = None
    """PEM file: the CA of the nodes' certificates. Use it for nothing else: every certificate it signs may connect
    under its name, and then gets what ``virt-ports node approve`` allows that name."""


class LedgerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The ledger."""

    path: str = "/var/lib/virt-ports/ledger.db"
    """Path of its SQLite file."""


class JournalSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the ledger keeps the journal."""

    keep_days: Annotated[int, Meta(ge=0, le=36500)] = 400
    """Days for which ``whois``, ``history`` and ``events`` know everything; 0: for ever. Older entries are exported to
    files before they are deleted. If you have to answer for a certain time by law, set it to at least that."""
    export: str = ""
    """Folder of the files with older entries, which nothing deletes; empty: ``journal`` beside the ledger."""


class PoolSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How ports are assigned. The external addresses themselves are in the ledger: ``virt-ports pool add``."""

    block: _Ports = 64
    """Ports: ranges are whole blocks. Smaller blocks waste fewer ports, larger ones mean fewer changes."""
    initial: _Ports = 256
    """Ports a VM starts with, if the pool has them."""
    floor: _Ports = 64
    """Ports that every VM keeps at least, and starts with when the pool is short."""
    cap: _Ports = 32768
    """Ports that a VM gets at most, draining and held ones included, so that no VM takes a whole address."""
    weight: Annotated[int, Meta(ge=1, le=MAXIMUM_WEIGHT)] = 100
    """A VM's share, relative to other VMs, of the ports above the floors when ports are short."""
    start_reserve: Annotated[float, Meta(ge=0, le=0.5)] = 0.03
    """Share of the pool that growth never gets, so that VMs can start."""
    hold_down_s: _Seconds = 120.0
    """Seconds between the end of a range and its next owner. 120 is RFC 6888 REQ-8; lower it only in tests: a peer
    may still be sending to the old owner."""
    drain_limit_s: _Positive | None = None
    """Seconds after which a draining range is withdrawn although connections use it, while another VM lacks ports; each
    time the journal has an event ``cut``. If not set, never. This is the only setting that cuts connections."""
    connections: _Count = 65536
    """Connections that a VM may have at once (RFC 6888 REQ-4). Twice the ports of the largest range; four such VMs fill
    the connection table of a usual host. No VM gets less than its equal part of half of that table."""
    connections_floor: _Count = 1024
    """The least that a VM's wish may say: a VM cannot be cut off by a typing error."""
    connections_cap: _Count = 1_048_576
    """The most that a VM's wish may say."""
    connection_rate: _Count = 1000
    """Connections that a VM may begin in a second; a burst may have twenty times as many. At this rate a VM reaches
    its limit of ``connections`` in a minute."""
    connection_rate_floor: _Count = 20
    """The least that a VM's wish may say."""
    connection_rate_cap: _Count = 100_000
    """The most that a VM's wish may say."""
    filtering: Filtering = Filtering.DEFAULT
    """Who reaches a VM's sockets from outside (RFC 4787, section 5): ``address-and-port-dependent``: those to whom the
    socket has sent; ``endpoint-independent``, also called *full cone*: anybody, while the socket has its port."""
    compact_s: _Positive = 30.0
    """Seconds between two searches for ranges to move, so that short free runs become a long one. On each address one
    range is moved at a time."""
    internal: IPv4Network = IPv4Network("100.64.0.0/10")
    """Addresses between hosts and edges, one per VM (RFC 6598). Must not be routed elsewhere in your network."""
    pairing: str = "preferred"
    """``preferred``: a VM that outgrows its external address may move to another one; ``strict``: never."""
    timeouts: TimeoutsTable = TimeoutsTable()
    """Idle seconds after which hosts forget a connection of a VM; a host's natd.toml takes precedence."""


class GuardTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The guards that limit what the policy proposes; each can be switched off."""

    floor: bool = True
    """Never below the VM's floor."""
    cap: bool = True
    """Never above its cap."""
    whole_blocks: bool = True
    """Sizes are whole blocks."""
    headroom: bool = True
    """Never below the ports in use plus ``headroom_share`` of them plus ``headroom_ports``."""
    headroom_share: Annotated[float, Meta(ge=0, le=_MOST_TIMES)] = 0.25
    """Of ``headroom``."""
    headroom_ports: Annotated[int, Meta(ge=0, le=LAST_PORT)] = 16
    """Of ``headroom``."""
    unused: bool = True
    """No growth while less than ``grow_above_use`` of the range is in use: a download is many packets and one port."""
    grow_above_use: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Of ``unused``: a share of the range."""
    exhausted: bool = True
    """An exhausted range grows by ``exhausted_factor`` at once, whatever the score and in spite of the cool-down."""
    exhausted_factor: Annotated[float, Meta(gt=1, le=_MOST_TIMES)] = 2.0
    """Of ``exhausted``."""
    still_used: bool = True
    """No shrinking while more than ``shrink_below_use`` of the range is in use."""
    shrink_below_use: Annotated[float, Meta(ge=0, le=1)] = 0.35
    """Of ``still_used``: a share of the range."""
    grow_cool_down_s: _Seconds = 5.0
    """Seconds between two growths of a range."""
    shrink_cool_down_s: _Seconds = 30.0
    """Seconds between any change of a range and its next reduction."""
    shrink_after_samples: Annotated[int, Meta(ge=1)] = 10
    """Samples in a row that must ask for less before a range shrinks."""


class ScalingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """When ranges grow and shrink."""

    policy: str = default_policy()
    """Policy of VMs without a wish for one; ``virt-ports set --help`` has the names and what each does."""
    literal: bool = False
    """True: follow the policy to the letter, with all guards off."""
    guards: GuardTable = GuardTable()

    def guard_settings(self) -> GuardSettings:
        """Return the guards as :func:`cpm.core.sizing.decide` takes them."""
        if self.literal:
            return LITERAL
        guards = self.guards
        return GuardSettings(
            floor=guards.floor,
            cap=guards.cap,
            whole_blocks=guards.whole_blocks,
            headroom_share=guards.headroom_share if guards.headroom else None,
            headroom_ports=guards.headroom_ports,
            exhausted_factor=guards.exhausted_factor if guards.exhausted else None,
            grow_above_use=guards.grow_above_use if guards.unused else None,
            shrink_below_use=guards.shrink_below_use if guards.still_used else None,
            grow_cool_down_s=guards.grow_cool_down_s,
            shrink_cool_down_s=guards.shrink_cool_down_s,
            shrink_after_samples=guards.shrink_after_samples,
        )


class NodesSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What nodes may have, and how the manager treats those that are away, or do not confirm what they were sent."""

    edge_grace_s: _Seconds = 10.0
    """Seconds that an edge may be disconnected, or leave something unconfirmed, before hosts no longer route through
    it, if there is another. Its tables keep working, so a restart of natd has no effect on traffic."""
    edge_wait_s: _Seconds = 5.0
    """The same while a range of a VM waits for that edge, and another one has it. Longer than a restart of natd or cpmd
    takes: whatever hosts do, the router outside may still send answers to that edge, which drops those to ports that it
    does not know."""
    confirm_s: _Seconds = 10.0
    """Seconds that a connected node may leave something unconfirmed before ``virt-ports node list`` says that it does
    not answer. From then on it may be fenced."""
    max_vms: Annotated[int, Meta(ge=1, le=MAX_QUOTA_VMS)] = quotas.DEFAULT.vms
    """VMs that a host may have, those that ended and still hold ports included, unless ``virt-ports node approve
    --max-vms`` says another number: so that a host that went wrong does not use up what others need."""
    max_ports: Annotated[int, Meta(ge=1, le=MAX_QUOTA_PORTS)] = quotas.DEFAULT.ports
    """Ports that the VMs of a host may hold in all, draining and held ones included, unless ``virt-ports node approve
    --max-ports`` says another number."""

    def patience(self) -> Patience:
        """Return how long nodes may take, as the deciding half takes it."""
        return Patience(edge_grace_s=self.edge_grace_s, edge_wait_s=self.edge_wait_s, confirm_s=self.confirm_s)


class MetricsSettings(MetricsListen, frozen=True, forbid_unknown_fields=True):
    """Metrics for Prometheus."""

    per_vm: bool = True
    """Whether there are metrics of single VMs, eight for each and more for one that changed; false: only those of
    nodes, addresses and the site."""


class PageSettings(Listen, frozen=True, forbid_unknown_fields=True):
    """
    The status page for browsers: maps of the external addresses, VMs, nodes, events.

    It asks for no password: keep the address on ``127.0.0.1``, and come by ``ssh -L`` or through a proxy that asks for
    one.
    """

    names: tuple[str, ...] = ()
    """Names by which browsers call it, besides IP addresses and ``localhost``: that of the proxy, for example
    ``status.example.net``. Others are refused, because any web site can point a name of its own here."""


class EventsSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """
    Where cpmd tells entries of the journal to, from the first start with the setting on. Each place has a position in
    the journal of its own, from which it goes on after a restart; what could not be delivered is tried again.
    """

    syslog: str = ""
    """Messages of RFC 5424: ``unix:///dev/log``, ``udp://ADDRESS:514`` or ``tcp://ADDRESS:601``; empty: none."""
    ipfix: str = ""
    """``ADDRESS:PORT`` of an IPFIX collector (UDP; port 4739 is the usual one) or ``tcp://ADDRESS:PORT``, which is told
    which ports VMs get and give back, as in RFC 8158; empty: none."""
    ipfix_domain: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 1
    """Observation domain id, if the collector has other exporters at the same address."""
    file: str = ""
    """A file to which lines of JSON are appended, in a folder that cpmd may write to, such as ``/var/lib/virt-ports``;
    empty: none. Nothing deletes it."""
    webhook: str = ""
    """``https://`` or ``http://`` URL to which entries are posted as JSON; empty: none."""
    webhook_token_file: str = ""
    """A file with a token that the webhook is sent (``Authorization: Bearer``); empty: none."""
    webhook_ca: str = ""
    """PEM file: the CA of the webhook's certificate; empty: those of the system."""
    state: str = ""
    """Folder with the positions in the journal; empty: ``events`` beside the ledger."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    listen: ListenSettings = ListenSettings()
    ledger: LedgerSettings = LedgerSettings()
    journal: JournalSettings = JournalSettings()
    pool: PoolSettings = PoolSettings()
    scaling: ScalingSettings = ScalingSettings()
    nodes: NodesSettings = NodesSettings()
    metrics: MetricsSettings = MetricsSettings()
    page: PageSettings = PageSettings()
    events: EventsSettings = EventsSettings()
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""

    def defaults(self) -> Defaults:
        """Return the values for VMs without wishes."""
        pool = self.pool
        return Defaults(
            floor=pool.floor,
            cap=pool.cap,
            weight=pool.weight,
            policy=self.scaling.policy,
            drain_limit_s=pool.drain_limit_s,
            connections=pool.connections,
            connection_rate=pool.connection_rate,
            filtering=pool.filtering,
            bounds={
                "connections": (pool.connections_floor, pool.connections_cap),
                "connection_rate": (pool.connection_rate_floor, pool.connection_rate_cap),
            },
        )

    def rules(self) -> PoolRules:
        """Return the part of the settings that decisions depend on."""
        pool = self.pool
        return PoolRules(
            block=pool.block,
            initial=pool.initial,
            start_reserve=pool.start_reserve,
            hold_down_s=pool.hold_down_s,
            compact_s=pool.compact_s,
            internal=pool.internal,
            strict_pairing=pool.pairing == "strict",
            patience=self.nodes.patience(),
            timeouts=self.timeouts(),
            defaults=self.defaults(),
            guards=self.scaling.guard_settings(),
            quota=quotas.Quota(self.nodes.max_vms, self.nodes.max_ports),
        )

    def export_folder(self) -> Path:
        """Return the folder of the files with older entries of the journal."""
        return Path(self.journal.export) if self.journal.export else Path(self.ledger.path).parent / "journal"

    def events_folder(self) -> Path:
        """Return the folder with the positions of those who are told entries of the journal."""
        return Path(self.events.state) if self.events.state else Path(self.ledger.path).parent / "events"

    def timeouts(self) -> Timeouts:
        """Return the connection timeouts of hosts whose own settings have none."""
        return self.pool.timeouts.override(Timeouts())


def load(path: Path) -> Settings:
    """
    Read and check ``cpmd.toml``.

    :raise ConfigError: When the file cannot be read, is not TOML, has an unknown key, or a value is wrong.
    """
    settings = config.load(path, Settings)
    _check(str(path), settings)
    return settings


def _check(file: str, settings: Settings) -> None:
    pool, nodes_at = settings.pool, settings.listen
    if not pool.floor <= pool.initial <= pool.cap:
        raise ConfigError(file, "pool.initial", f"must lie between floor ({pool.floor}) and cap ({pool.cap})")
    for name in ("connections", "connection_rate"):
        least, value, most = (getattr(pool, f"{name}{end}") for end in ("_floor", "", "_cap"))
        if not least <= value <= most:
            raise ConfigError(file, f"pool.{name}", f"must lie between {name}_floor ({least}) and {name}_cap ({most})")
    if pool.pairing not in ("preferred", "strict"):
        raise ConfigError(file, "pool.pairing", "use preferred or strict")
    if settings.nodes.edge_wait_s > settings.nodes.edge_grace_s:
        raise ConfigError(file, "nodes.edge_wait_s", f"must not exceed edge_grace_s ({settings.nodes.edge_grace_s:g})")
    pool.timeouts.check(file, "pool.timeouts")
    settings.metrics.check(file)
    settings.page.check(file, "page")
    logs.check_level(file, settings.log_level)
    _check_events(file, settings.events)
    try:
        policy_named(settings.scaling.policy)
    except InvalidRequest as error:
        raise ConfigError(file, "scaling.policy", str(error)) from error
    if pool.internal.num_addresses < 4:
        raise ConfigError(file, "pool.internal", "use at least a /30; every VM needs an address")
    if nodes_at.address is not None:
        for key in ("certificate", "key", "ca"):
            if getattr(nodes_at, key) is None:
                raise ConfigError(
                    file, f"listen.{key}", "is required with listen.address; nodes are known by certificates"
                )
        split_address(file, nodes_at.address)


def _check_events(file: str, events: EventsSettings) -> None:
    if events.ipfix:
        transport, _, collector = events.ipfix.rpartition("://")
        if transport not in ("", "udp", "tcp"):
            raise ConfigError(file, "events.ipfix", "use ADDRESS:4739 or tcp://ADDRESS:4739")
        listen.split_address(file, "events.ipfix", collector)
    scheme, _, rest = events.syslog.partition("://")
    if scheme in ("udp", "tcp"):
        listen.split_address(file, "events.syslog", rest)
    elif events.syslog and (scheme != "unix" or not rest.startswith("/")):
        raise ConfigError(file, "events.syslog", "use unix:///dev/log, udp://ADDRESS:514 or tcp://ADDRESS:601")
    if events.webhook and not events.webhook.startswith(("https://", "http://")):
        raise ConfigError(file, "events.webhook", "use https://… or http://…")
    for key in ("file", "webhook_token_file", "webhook_ca", "state"):
        if (path := getattr(events, key)) and not path.startswith("/"):
            raise ConfigError(file, f"events.{key}", "use a path that begins with /")


FOLLOWED: Final = ("pool", "scaling", "nodes", "journal.keep_days", "log_level")
"""Tables and keys that cpmd follows while it runs. All others need a restart; also a new one that is not added here."""

NOT_FOLLOWED: Final = frozenset(("pool.block", "pool.internal"))
"""Keys of those tables that need a restart: ranges and addresses of VMs that run are made of them."""


SECRET: Final = frozenset(("events.webhook",))
"""Keys whose values are for nobody but those who may read the file: they are not shown as a whole."""


class Difference(NamedTuple):
    """A setting whose value in the file is not the one in force."""

    key: str
    """Dotted: ``pool.floor``."""
    before: Any
    """The value in force."""
    after: Any
    """The one in the file."""

    @property
    def needs_restart(self) -> bool:
        """Whether cpmd follows it only when it is restarted."""
        return self.key in NOT_FOLLOWED or not any(
            self.key == name or self.key.startswith(f"{name}.") for name in FOLLOWED
        )


def differences(before: Struct, after: Struct, prefix: str = "") -> Iterator[Difference]:
    """Yield the settings that differ, in the order of the file."""
    for name in before.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Struct):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield Difference(f"{prefix}{name}", old, new)


def follow(before: Settings, after: Settings) -> Settings:
    """Return what is in force when a running cpmd, with ``before`` in force, has followed a file with ``after``."""
    settings = before
    for each in differences(before, after):
        if not each.needs_restart:
            settings = _with(settings, each.key.split("."), each.after)
    return settings


def _with(table: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(table, **{name: _with(getattr(table, name), rest, value) if rest else value})


def split_address(file: str, address: str) -> tuple[str, int]:
    """
    Split ``IP:PORT``.

    :raise ConfigError: When it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    number = whole_number(port, LAST_PORT)
    if not (host and colon and number):
        raise ConfigError(file, "listen.address", "use IP:PORT, for example 172.30.0.2:7414")
    return host, number
