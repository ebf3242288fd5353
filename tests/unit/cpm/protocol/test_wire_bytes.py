"""
The bytes of every message between manager and nodes, for protocol 4.

A change here means that nodes and manager of different versions no longer understand each other: raise
:data:`cpm.protocol.messages.PROTOCOL` with it. Each message stands once with every optional field set and once with
every optional field left out, beside the exact JSON that a running manager or node of this protocol sends.
"""

from __future__ import annotations

import json
import typing
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest

from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.holdings import Held, HeldRange
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostForward, HostIntent
from cpm.protocol.messages import (
    PROTOCOL,
    AddressSource,
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    Draining,
    FastPathAt,
    Follows,
    Freed,
    GuestAddress,
    GuestState,
    GuestView,
    Hello,
    ManagerMessage,
    MapPorts,
    MapRefusal,
    MapRefused,
    Measured,
    Need,
    NodeMessage,
    OwnPorts,
    PathState,
    Presence,
    Present,
    Refused,
    RefusedVM,
    Rejected,
    Report,
    Snapshot,
    Unmanaged,
    UnmapPorts,
    WayProblem,
    Welcome,
)
from cpm.protocol.model import (
    UNLIMITED,
    DomainUUID,
    Filtering,
    ForwardProtocol,
    NodeName,
    PortRange,
    Role,
    WishedForward,
    Wishes,
)
from cpm.protocol.own_ports import MOST_ADDRESSES, MOST_RANGES, OwnAddress, OwnRange, OwnUse
from cpm.protocol.timeouts import Timeouts
from cpm.protocol.walltime import UtcSeconds

WEB, DB = DomainUUID("u-web"), DomainUUID("u-db")
EXTERNAL, INTERNAL, UNDERLAY = IPv4Address("203.0.113.1"), IPv4Address("100.64.0.1"), IPv4Address("172.30.0.11")
GUEST_ADDRESS = IPv4Address("192.168.122.5")
PORTS, OTHER_PORTS = PortRange(20480, 20735), PortRange(1024, 1087)

ALL_WISHES = Wishes(
    floor=256,
    cap=4096,
    weight=200,
    policy="spec",
    drain_limit_s=600.0,
    connections=131072,
    connection_rate=5000,
    filtering=Filtering.ENDPOINT_INDEPENDENT,
    pcp=32,
    forwards=(
        WishedForward(
            ports=PortRange(443, 443),
            to=PortRange(8443, 8443),
            protocol=ForwardProtocol.UDP,
            address=EXTERNAL,
            guest=GUEST_ADDRESS,
            is_kept=False,
        ),
    ),
    nonsense=("weight 'x': no number",),
)
GUEST = GuestView(
    GuestState.ANSWERING,
    UtcSeconds(1.5),
    why="guest-file-open: disabled",
    connections=12,
    established=7,
    interfaces=2,
    rx_bytes=1000,
    tx_bytes=2000,
    external=EXTERNAL,
    ports=PORTS,
)
PATH = PathState(
    IPv4Network("100.64.0.0/10"),
    edges=(UNDERLAY, IPv4Address("172.30.0.12")),
    externals=(EXTERNAL,),
    timeouts=Timeouts(udp_s=300),
    edge_names=(NodeName("edge1"),),
)
OWN = (OwnAddress(EXTERNAL, (OwnRange(OTHER_PORTS, OwnUse.LISTENER), OwnRange(PORTS, OwnUse.EPHEMERAL))),)
HOST_VM = HostIntent(
    WEB,
    "web1",
    INTERNAL,
    PORTS,
    draining=(OTHER_PORTS,),
    external=EXTERNAL,
    at_cap=True,
    connections=65536,
    connection_rate=2000,
    port_control=16,
    filtering=Filtering.ENDPOINT_INDEPENDENT,
    forwards=(HostForward(PortRange(443, 443), 8443, ForwardProtocol.BOTH, GUEST_ADDRESS, EXTERNAL),),
    leaving_forwards=(PortRange(2222, 2222),),
)
EDGE_VM = EdgeIntent(
    WEB, "web1", INTERNAL, UNDERLAY, (ExternalRange(EXTERNAL, OTHER_PORTS), ExternalRange(EXTERNAL, PORTS))
)

FROM_NODES: list[tuple[NodeMessage, bytes]] = [
    (
        Hello(
            PROTOCOL,
            NodeName("host1"),
            frozenset({Role.HOST}),
            UNDERLAY,
            "0.1.0",
            3,
            (Presence(WEB, "web1", ALL_WISHES),),
            OWN,
            (Held(WEB, int(INTERNAL), 0, (HeldRange(0, 20480, 20735),)),),
            (Held(DB, int(INTERNAL) + 1, int(UNDERLAY), (HeldRange(int(EXTERNAL), 1024, 1087),)),),
            "0123456789abcdef",
            "f00d",
            Follows("3f2a", "9c41", 120, (NodeName("edge1"),)),
            1,
            is_partial=True,
        ),
        (
            b'{"type":"hello","protocol":6,"node":"host1","roles":["host"],"underlay":"172.30.0.11",'
            b'"version":"0.1.0","epoch":3,"domains":[{"domain":"u-web","name":"web1","wishes":{"floor":256,'
            b'"cap":4096,"weight":200,"policy":"spec","drain_limit_s":600.0,'
            b'"connections":131072,"connection_rate":5000,"filtering":"endpoint-independent",'
            b'"pcp":32,"pool":null,"address":null,"forwards":[{"ports":{"first":443,"last":443},"to":{"first":8443,"last":8443},"protocol":"udp",'
            b'"address":"203.0.113.1","guest":"192.168.122.5","is_kept":false}],'
            b'"nonsense":["weight \'x\': no number"]}}],"own":[{"address":"203.0.113.1","ranges":[{'
            b'"ports":{"first":1024,"last":1087},"use":"listener"},{"ports":{"first":20480,"last":20735},'
            b'"use":"ephemeral"}]}],"host_holds":[["u-web",1681915905,0,[[0,20480,20735]]]],'
            b'"edge_holds":[["u-db",1681915906,2887647243,[[3405803777,1024,1087]]]],'
            b'"machine":"0123456789abcdef","instance":"f00d",'
            b'"follows":{"ledger":"3f2a","run":"9c41","grants":120,"edges":["edge1"]},"ended_timeout_s":1,'
            b'"is_partial":true}'
        ),
    ),
    (
        Hello(PROTOCOL, NodeName("edge1"), frozenset({Role.EDGE}), UNDERLAY, "0.1.0", 0, ()),
        (
            b'{"type":"hello","protocol":6,"node":"edge1","roles":["edge"],"underlay":"172.30.0.11",'
            b'"version":"0.1.0","epoch":0,"domains":[],"own":[],"host_holds":[],"edge_holds":[],'
            b'"machine":"","instance":"","follows":{"ledger":"","run":"","grants":0,"edges":[]},"ended_timeout_s":null,'
            b'"is_partial":false}'
        ),
    ),
    (
        OwnPorts(OWN),
        (
            b'{"type":"own-ports","addresses":[{"address":"203.0.113.1","ranges":[{"ports":{"first":1024,'
            b'"last":1087},"use":"listener"},{"ports":{"first":20480,"last":20735},"use":"ephemeral"}]}]}'
        ),
    ),
    (
        Attach(WEB, "web1", incoming=True, wishes=ALL_WISHES),
        (
            b'{"type":"attach","domain":"u-web","name":"web1","incoming":true,"wishes":{"floor":256,'
            b'"cap":4096,"weight":200,"policy":"spec","drain_limit_s":600.0,'
            b'"connections":131072,"connection_rate":5000,"filtering":"endpoint-independent",'
            b'"pcp":32,"pool":null,"address":null,"forwards":[{"ports":{"first":443,"last":443},"to":{"first":8443,"last":8443},"protocol":"udp",'
            b'"address":"203.0.113.1","guest":"192.168.122.5","is_kept":false}],'
            b'"nonsense":["weight \'x\': no number"]}}'
        ),
    ),
    (Attach(WEB, "web1"), b'{"type":"attach","domain":"u-web","name":"web1","incoming":false,"wishes":null}'),
    (
        Attach(WEB, "web1", wishes=Wishes()),
        (
            b'{"type":"attach","domain":"u-web","name":"web1","incoming":false,"wishes":{"floor":null,'
            b'"cap":null,"weight":null,"policy":null,"drain_limit_s":null,'
            b'"connections":null,"connection_rate":null,"filtering":null,"pcp":null,"pool":null,"address":null,"forwards":[],"nonsense":[]}}'
        ),
    ),
    (
        Attach(WEB, "web1", wishes=Wishes(drain_limit_s=UNLIMITED)),
        (
            b'{"type":"attach","domain":"u-web","name":"web1","incoming":false,"wishes":{"floor":null,'
            b'"cap":null,"weight":null,"policy":null,"drain_limit_s":0.0,'
            b'"connections":null,"connection_rate":null,"filtering":null,"pcp":null,"pool":null,"address":null,"forwards":[],"nonsense":[]}}'
        ),
    ),
    (Detach(WEB, "shutdown"), b'{"type":"detach","domain":"u-web","reason":"shutdown"}'),
    (
        Present((Presence(WEB, "web1"), Presence(DB, 'd"b\n\u00fc', Wishes(floor=64)))),
        (
            b'{"type":"present","domains":[{"domain":"u-web","name":"web1","wishes":null},{"domain":"u-db",'
            b'"name":"d\\"b\\n\xc3\xbc","wishes":{"floor":64,"cap":null,"weight":null,"policy":null,'
            b'"drain_limit_s":null,'
            b'"connections":null,"connection_rate":null,"filtering":null,"pcp":null,"pool":null,"address":null,"forwards":[],"nonsense":[]}}],"unmanaged":[],'
            b'"is_partial":false}'
        ),
    ),
    (
        Present((), (Unmanaged(WEB, "web1", "its interface vnet3 is on no Linux bridge"),), is_partial=True),
        (
            b'{"type":"present","domains":[],"unmanaged":[{"domain":"u-web","name":"web1",'
            b'"reason":"its interface vnet3 is on no Linux bridge"}],"is_partial":true}'
        ),
    ),
    (Applied(3, 17), b'{"type":"applied","epoch":3,"generation":17,"refused":[]}'),
    (
        Applied(3, 17, (RefusedVM(WEB, "cannot set the route"),)),
        (
            b'{"type":"applied","epoch":3,"generation":17,'
            b'"refused":[{"domain":"u-web","reason":"cannot set the route"}]}'
        ),
    ),
    (
        Rejected(3, 17, "kernel", "cannot apply: No space left on device"),
        (
            b'{"type":"rejected","epoch":3,"generation":17,"code":"kernel",'
            b'"message":"cannot apply: No space left on device"}'
        ),
    ),
    (
        Report(
            17,
            1.0,
            (Measured(WEB, 120.5, 3.25, 192, 40.0, (Draining(OTHER_PORTS, 2),), GUEST),),
            {"no mapping": 4},
            {WEB: 9},
            ("packets of VMs on br0 leave by wg0",),
            (WayProblem("leave by wg0", (WEB,)),),
            {WEB: 7},
            (FastPathAt("eth1", "off"), FastPathAt("eth0")),
            (
                GuestAddress(WEB, IPv4Address("10.10.0.5"), AddressSource.LEASE, (IPv4Address("172.30.0.7"),)),
                GuestAddress(DomainUUID("u-db")),
            ),
        ),
        (
            b'{"type":"report","generation":17,"period_s":1.0,"vms":[{"domain":"u-web","packets_per_s":120.5,'
            b'"megabits_per_s":3.25,"ports_in_use":192,"new_connections_per_s":40.0,"draining":[{"ports":{'
            b'"first":1024,"last":1087},"connections":2}],"guest":{"state":"answering","since":1.5,'
            b'"why":"guest-file-open: disabled","connections":12,"established":7,"interfaces":2,'
            b'"rx_bytes":1000,"tx_bytes":2000,"external":"203.0.113.1","ports":{"first":20480,'
            b'"last":20735}}}],"dropped":{"no mapping":4},"refused":{"u-web":9},'
            b'"warnings":["packets of VMs on br0 leave by wg0"],'
            b'"ways":[{"problem":"leave by wg0","domains":["u-web"]}],"limited":{"u-web":7},'
            b'"fast_path":[{"interface":"eth1","reason":"off"},{"interface":"eth0","reason":""}],'
            b'"guests":[{"domain":"u-web","address":"10.10.0.5","source":"lease","refused":["172.30.0.7"]},'
            b'{"domain":"u-db","address":null,"source":null,"refused":[]}]}'
        ),
    ),
    (
        Report(17, 1.0, (Measured(WEB, 0.0, 0.0),)),
        (
            b'{"type":"report","generation":17,"period_s":1.0,"vms":[{"domain":"u-web","packets_per_s":0.0,'
            b'"megabits_per_s":0.0,"ports_in_use":null,"new_connections_per_s":null,"draining":[],'
            b'"guest":null}],"dropped":{},"refused":{},"warnings":[],'
            b'"ways":[],"limited":{},"fast_path":[],"guests":[]}'
        ),
    ),
    (
        Report(17, 1.0, (Measured(WEB, 0.0, 0.0, guest=GuestView(GuestState.ABSENT, UtcSeconds(1.5))),)),
        (
            b'{"type":"report","generation":17,"period_s":1.0,"vms":[{"domain":"u-web","packets_per_s":0.0,'
            b'"megabits_per_s":0.0,"ports_in_use":null,"new_connections_per_s":null,"draining":[],"guest":{'
            b'"state":"absent","since":1.5,"why":"","connections":null,"established":null,"interfaces":null,'
            b'"rx_bytes":null,"tx_bytes":null,"external":null,"ports":null}}],"dropped":{},"refused":{},"warnings":[],'
            b'"ways":[],"limited":{},"fast_path":[],"guests":[]}'
        ),
    ),
    (
        Report(17, 1.0, ()),
        (
            b'{"type":"report","generation":17,"period_s":1.0,"vms":[],"dropped":{},"refused":{},"warnings":[],'
            b'"ways":[],"limited":{},"fast_path":[],"guests":[]}'
        ),
    ),
    (
        Need(WEB, PORTS, 192, 850.5),
        (
            b'{"type":"need","domain":"u-web","ports":{"first":20480,"last":20735},"ports_in_use":192,'
            b'"arrivals_per_s":850.5}'
        ),
    ),
    (
        MapPorts(WEB, GUEST_ADDRESS, PortRange(22, 23), ForwardProtocol.TCP, 7200, 2222, True, True),
        (
            b'{"type":"map-ports","domain":"u-web","guest":"192.168.122.5","to":{"first":22,"last":23},"protocol":"tcp",'
            b'"lifetime_s":7200,"first":2222,"is_exact":true,"keeps_parity":true}'
        ),
    ),
    (
        MapPorts(WEB, GUEST_ADDRESS, PortRange(22, 22), ForwardProtocol.UDP, 120),
        (
            b'{"type":"map-ports","domain":"u-web","guest":"192.168.122.5","to":{"first":22,"last":22},"protocol":"udp",'
            b'"lifetime_s":120,"first":0,"is_exact":false,"keeps_parity":false}'
        ),
    ),
    (
        UnmapPorts(WEB, GUEST_ADDRESS, 22, ForwardProtocol.UDP),
        b'{"type":"unmap-ports","domain":"u-web","guest":"192.168.122.5","to":22,"protocol":"udp"}',
    ),
]

FROM_MANAGER: list[tuple[ManagerMessage, bytes]] = [
    (
        Welcome(PROTOCOL, 3, "0.1.0", "3f2a", "9c41", True),
        (b'{"type":"welcome","protocol":6,"epoch":3,"version":"0.1.0","ledger":"3f2a","run":"9c41","adopts":true}'),
    ),
    (
        Welcome(PROTOCOL, 3, "0.1.0"),
        b'{"type":"welcome","protocol":6,"epoch":3,"version":"0.1.0","ledger":"","run":"","adopts":false}',
    ),
    (
        Snapshot(3, 1, PATH, (HOST_VM,), (EDGE_VM,), 120, 5),
        (
            b'{"type":"snapshot","epoch":3,"generation":1,"path":{"internal_pool":"100.64.0.0/10",'
            b'"edges":["172.30.0.11","172.30.0.12"],"externals":["203.0.113.1"],"timeouts":{'
            b'"tcp_established_s":7440,"tcp_transitory_s":240,"tcp_time_wait_s":120,"tcp_reset_s":10,'
            b'"udp_s":300,"icmp_s":60,"dns_s":30},"edge_names":["edge1"]},"host":[{"domain":"u-web","name":"web1","internal":"100.64.0.1",'
            b'"ports":{"first":20480,"last":20735},"draining":[{"first":1024,"last":1087}],'
            b'"external":"203.0.113.1","at_cap":true,'
            b'"connections":65536,"connection_rate":2000,"port_control":16,"filtering":"endpoint-independent",'
            b'"forwards":[{"ports":{"first":443,"last":443},"to":8443,'
            b'"protocol":"both","guest":"192.168.122.5","external":"203.0.113.1"}],"leaving_forwards":[{"first":2222,"last":2222}]}],"edge":[{"domain":"u-web","name":"web1",'
            b'"internal":"100.64.0.1","via":"172.30.0.11","ranges":[{"external":"203.0.113.1","ports":{'
            b'"first":1024,"last":1087}},{"external":"203.0.113.1","ports":{"first":20480,"last":20735}}]}]'
            b',"grants":120,"detached":5}'
        ),
    ),
    (
        Snapshot(3, 1, PathState(IPv4Network("100.64.0.0/10"))),
        (
            b'{"type":"snapshot","epoch":3,"generation":1,"path":{"internal_pool":"100.64.0.0/10","edges":[],'
            b'"externals":[],"timeouts":null,"edge_names":[]},"host":[],"edge":[],"grants":0,"detached":0}'
        ),
    ),
    (
        Snapshot(
            3,
            1,
            PathState(IPv4Network("100.64.0.0/10")),
            (HostIntent(WEB, "web1", INTERNAL, None),),
            (EdgeIntent(WEB, "web1", INTERNAL, None, ()),),
        ),
        (
            b'{"type":"snapshot","epoch":3,"generation":1,"path":{"internal_pool":"100.64.0.0/10","edges":[],'
            b'"externals":[],"timeouts":null,"edge_names":[]},"host":[{"domain":"u-web","name":"web1","internal":"100.64.0.1",'
            b'"ports":null,"draining":[],"external":null,"at_cap":false,'
            b'"connections":null,"connection_rate":null,"port_control":0,"filtering":"address-and-port-dependent","forwards":[],"leaving_forwards":[]}],"edge":[{"domain":"u-web",'
            b'"name":"web1","internal":"100.64.0.1","via":null,"ranges":[]}],"grants":0,"detached":0}'
        ),
    ),
    (
        Delta(3, 2, (HOST_VM,), (EDGE_VM,), (WEB,), (DB,), PATH, 120, 5),
        (
            b'{"type":"delta","epoch":3,"generation":2,"host":[{"domain":"u-web","name":"web1",'
            b'"internal":"100.64.0.1","ports":{"first":20480,"last":20735},"draining":[{"first":1024,'
            b'"last":1087}],"external":"203.0.113.1","at_cap":true,'
            b'"connections":65536,"connection_rate":2000,"port_control":16,"filtering":"endpoint-independent",'
            b'"forwards":[{"ports":{"first":443,"last":443},"to":8443,'
            b'"protocol":"both","guest":"192.168.122.5","external":"203.0.113.1"}],"leaving_forwards":[{"first":2222,"last":2222}]}],"edge":[{"domain":"u-web","name":"web1",'
            b'"internal":"100.64.0.1","via":"172.30.0.11","ranges":[{"external":"203.0.113.1","ports":{'
            b'"first":1024,"last":1087}},{"external":"203.0.113.1","ports":{"first":20480,"last":20735}}]}],'
            b'"host_gone":["u-web"],"edge_gone":["u-db"],"path":{"internal_pool":"100.64.0.0/10",'
            b'"edges":["172.30.0.11","172.30.0.12"],"externals":["203.0.113.1"],"timeouts":{'
            b'"tcp_established_s":7440,"tcp_transitory_s":240,"tcp_time_wait_s":120,"tcp_reset_s":10,'
            b'"udp_s":300,"icmp_s":60,"dns_s":30},"edge_names":["edge1"]},"grants":120,"detached":5}'
        ),
    ),
    (
        Delta(3, 2),
        (
            b'{"type":"delta","epoch":3,"generation":2,"host":[],"edge":[],"host_gone":[],"edge_gone":[],'
            b'"path":null,"grants":0,"detached":0}'
        ),
    ),
    (
        Refused(3, WEB, "ports-exhausted", "cannot allocate 64 ports"),
        b'{"type":"refused","epoch":3,"domain":"u-web","code":"ports-exhausted","message":"cannot allocate 64 ports"}',
    ),
    (Freed(3, WEB, IPv4Address("100.64.0.1")), b'{"type":"freed","epoch":3,"domain":"u-web","internal":"100.64.0.1"}'),
    (
        MapRefused(3, WEB, GUEST_ADDRESS, 22, ForwardProtocol.TCP, MapRefusal.QUOTA),
        (
            b'{"type":"map-refused","epoch":3,"domain":"u-web","guest":"192.168.122.5","to":22,"protocol":"tcp",'
            b'"why":"quota"}'
        ),
    ),
    (Declined(3, WEB, PORTS), b'{"type":"declined","epoch":3,"domain":"u-web","ports":{"first":20480,"last":20735}}'),
]


def _name(message: object) -> str:
    return type(message).__name__


@pytest.mark.parametrize(("message", "wire"), FROM_NODES, ids=_name)
def test_the_bytes_of_node_messages(message: NodeMessage, wire: bytes) -> None:
    assert codec.encode(message) == wire
    assert codec.decode_node_message(wire) == message


@pytest.mark.parametrize(("message", "wire"), FROM_MANAGER, ids=_name)
def test_the_bytes_of_manager_messages(message: ManagerMessage, wire: bytes) -> None:
    assert codec.encode(message) == wire
    assert codec.decode_manager_message(wire) == message


def test_roles_are_a_list_in_any_order() -> None:
    both = Hello(PROTOCOL, NodeName("n"), frozenset(Role), UNDERLAY, "0.1.0", 0, ())
    start = b'{"type":"hello","protocol":6,"node":"n","roles":["'
    end = b'"],"underlay":"172.30.0.11","version":"0.1.0","epoch":0,"domains":[],"own":[],'
    end += b'"host_holds":[],"edge_holds":[],"machine":"","instance":"",'
    end += b'"follows":{"ledger":"","run":"","grants":0,"edges":[]},"ended_timeout_s":null,"is_partial":false}'
    texts = {start + b'","'.join(order) + end for order in ((b"host", b"edge"), (b"edge", b"host"))}
    assert codec.encode(both) in texts
    assert [codec.decode_node_message(text) for text in texts] == [both, both]


def test_the_tables_have_every_message_and_every_optional_field() -> None:
    for union, samples in ((NodeMessage, FROM_NODES), (ManagerMessage, FROM_MANAGER)):
        kinds = typing.get_args(union)
        assert {type(message) for message, _ in samples} == set(kinds)
        for kind in kinds:
            for field in msgspec.structs.fields(kind):
                if not field.required:
                    values = [getattr(message, field.name) for message, _ in samples if isinstance(message, kind)]
                    empty = {not value or value == field.default for value in values}
                    assert empty == {True, False}, f"{kind.__name__}.{field.name}"


REQUIRED = {
    "hello": {"protocol", "node", "roles", "underlay", "version", "epoch", "domains"},
    "attach": {"domain", "name"},
    "detach": {"domain", "reason"},
    "own-ports": {"addresses"},
    "present": {"domains"},
    "applied": {"epoch", "generation"},
    "rejected": {"epoch", "generation", "code", "message"},
    "report": {"generation", "period_s", "vms"},
    "need": {"domain", "ports", "ports_in_use", "arrivals_per_s"},
    "map-ports": {"domain", "guest", "to", "protocol", "lifetime_s"},
    "unmap-ports": {"domain", "guest", "to", "protocol"},
    "map-refused": {"epoch", "domain", "guest", "to", "protocol", "why"},
    "welcome": {"protocol", "epoch", "version"},
    "snapshot": {"epoch", "generation", "path"},
    "delta": {"epoch", "generation"},
    "refused": {"epoch", "domain", "code", "message"},
    "declined": {"epoch", "domain", "ports"},
    "freed": {"epoch", "domain", "internal"},
}
"""Fields without which a message is refused; all others have a default."""


def _samples() -> list[tuple[typing.Callable[[bytes], object], bytes]]:
    return [(codec.decode_node_message, wire) for _, wire in FROM_NODES] + [
        (codec.decode_manager_message, wire) for _, wire in FROM_MANAGER
    ]


@pytest.mark.parametrize(("decode", "wire"), _samples(), ids=lambda value: "")
def test_a_missing_field_is_its_default_or_an_error_that_names_it(
    decode: typing.Callable[[bytes], object], wire: bytes
) -> None:
    fields = json.loads(wire)
    required = REQUIRED[fields["type"]]
    for name in required:
        with pytest.raises(InvalidRequest, match=f"missing required field `{name}`"):
            decode(_without(fields, name))
    for name in fields.keys() - required - {"type"}:
        assert decode(_without(fields, name)) is not None
    with pytest.raises(InvalidRequest, match="missing required field `type`"):
        decode(_without(fields, "type"))


def _without(fields: dict[str, object], name: str) -> bytes:
    return json.dumps({key: value for key, value in fields.items() if key != name}).encode()


@pytest.mark.parametrize(("decode", "wire"), _samples(), ids=lambda value: "")
def test_fields_of_a_newer_version_are_ignored_at_every_level(
    decode: typing.Callable[[bytes], object], wire: bytes
) -> None:
    assert decode(json.dumps(_with_news(json.loads(wire))).encode()) == decode(wire)


def _with_news(value: typing.Any) -> typing.Any:
    if isinstance(value, list):
        return [_with_news(item) for item in value]
    if not isinstance(value, dict):
        return value
    # The keys of these are data: a reason, a UUID.
    return {
        key: item if key in ("dropped", "refused", "limited") else _with_news(item) for key, item in value.items()
    } | {"news": [1]}


@pytest.mark.parametrize(
    ("wire", "path"),
    [
        (b'{"type":"need","domain":"u","ports":{"first":1},"ports_in_use":1,"arrivals_per_s":1}', r"`last`.*\$\.ports"),
        (
            b'{"type":"need","domain":"u","ports":{"first":9,"last":1},"ports_in_use":1,"arrivals_per_s":1}',
            r"\$\.ports",
        ),
        (b'{"type":"need","domain":"u","ports":"1-9","ports_in_use":1,"arrivals_per_s":1}', r"\$\.ports"),
        (b'{"type":"present","domains":[{"domain":"u"}]}', r"`name`.*\$\.domains\[0\]"),
        (b'{"type":"attach","domain":"u","name":"n","wishes":{"floor":"64"}}', r"\$\.wishes\.floor"),
        (b'{"type":"attach","domain":"u","name":"n","incoming":1}', r"\$\.incoming"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_place(wire: bytes, path: str) -> None:
    with pytest.raises(InvalidRequest, match=path):
        codec.decode_node_message(wire)


def test_an_edge_cannot_send_own_ports_without_end() -> None:
    ranges = tuple(OwnRange(PortRange(port, port), OwnUse.LISTENER) for port in range(MOST_RANGES + 1))
    addresses = tuple(OwnAddress(EXTERNAL + number, ()) for number in range(MOST_ADDRESSES + 1))
    for most in (OwnPorts((OwnAddress(EXTERNAL, ranges[1:]),)), OwnPorts(addresses[1:])):
        assert codec.decode_node_message(codec.encode(most)) == most
    with pytest.raises(InvalidRequest, match=r"\$\.addresses\[0\]\.ranges"):
        codec.decode_node_message(codec.encode(OwnPorts((OwnAddress(EXTERNAL, ranges),))))
    with pytest.raises(InvalidRequest, match=r"\$\.addresses"):
        codec.decode_node_message(codec.encode(OwnPorts(addresses)))


def test_each_side_refuses_its_own_messages() -> None:
    for _, wire in FROM_NODES:
        with pytest.raises(InvalidRequest):
            codec.decode_manager_message(wire)
    for _, wire in FROM_MANAGER:
        with pytest.raises(InvalidRequest):
            codec.decode_node_message(wire)
