"""Every verb against a manager with canned answers: its request and its output."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from ipaddress import IPv4Address
from typing import Any

import msgspec
import pytest

from cpm.api.requests import ForwardRemoval, ForwardRequestBody, PoolRemoval, PoolRequest
from cpm.api.views import (
    AddressDetail,
    AddressView,
    AllocationView,
    ApprovalView,
    AskedView,
    AuditView,
    CandidateView,
    ClockStepView,
    DomainDetail,
    EventView,
    ExplainView,
    FastPathView,
    ForwardView,
    GuestAgentView,
    HolderView,
    NodeEventView,
    NodeView,
    OwnPortsView,
    RangeView,
    StatusView,
    WhoisView,
    WishView,
)
from cpm.protocol.codec import decode
from cpm.protocol.model import (
    AllocationState,
    DomainUUID,
    ForwardOrigin,
    ForwardProtocol,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.own_ports import OwnUse
from cpm.protocol.timeouts import Timeouts
from cpm.protocol.walltime import UtcSeconds
from tests.fakes.canned_manager import CannedManager, lines, refusal
from tests.unit.cpm.cli.conftest import DB, EXTERNAL, NOW, WEB, Command, domain

HOST1 = NodeName("host1")
HOUR_AGO = UtcSeconds(NOW - 3600)

DETAIL = DomainDetail(
    domain=domain(state="growing"),
    internal_address=IPv4Address("100.64.0.7"),
    floor=64,
    cap=32768,
    packets_per_s=1430.0,
    megabits_per_s=16.7,
    new_connections_per_s=None,
    score=1006.01,
    decided="score 1006.0 is above 1000: grow from 256 to 384",
    allocations=(
        AllocationView(EXTERNAL, 20000, 20255, AllocationState.ACTIVE, HOUR_AGO),
        AllocationView(IPv4Address("203.0.113.2"), 1024, 1279, AllocationState.DRAINING, UtcSeconds(NOW - 60), 3),
    ),
    wishes=(
        WishView("floor", 64, "pool"),
        WishView("cap", 32768, "metadata"),
        WishView("weight", 200, "set"),
        WishView("policy", "occupancy", "set"),
        WishView("drain-limit", None, "pool"),
    ),
    ignored=("metadata: floor 99999: use 1 to 64512 ports",),
    guest=GuestAgentView(
        "answering",
        UtcSeconds(NOW - 60),
        "guest-file-flush: Invalid argument",
        950,
        948,
        1,
        12345,
        678,
        EXTERNAL,
        20000,
        20255,
    ),
)
EXPLAINED = ExplainView(
    domain=domain(), lines=("web1 has 256 ports.", "Pool: 9 of 64512 ports are free."), asked=512, decided=256,
    rule="mostly-unused", decided_at=NOW, refused=None, gave=None, apart=None,
    waits_for=None, waits_since=None, fair_share=None,
    wishes=DETAIL.wishes, ignored=(),
    pool="default", pool_total=64512, pool_free=9, pool_leaving=0, pool_longest_free=9,
    pool_short=False, pool_waiting=0, pool_per_minute=-3.5, pool_empty_in_s=154.3,
    holders=(HolderView("db", 32768, 30000), HolderView("web1", 256, None)),
)  # fmt: skip
EVENTS = [
    EventView(1041, HOUR_AGO, "active", "web1", WEB, HOST1, EXTERNAL, 20000, 20255),
    EventView(1042, NOW, "draining", "db", DB, HOST1, EXTERNAL, 1024, 1087),
]
ADDRESS = AddressView(EXTERNAL, 64511, 320, 64, 60000, 2, (PortRange(5060, 5060), PortRange(8000, 8100)))
ADDRESS_DETAIL = AddressDetail(
    **msgspec.structs.asdict(ADDRESS),
    ranges=(
        RangeView(1024, 1087, AllocationState.DRAINING, NOW, "db", DB, HOST1),
        RangeView(20000, 20255, AllocationState.ACTIVE, HOUR_AGO, "web1", WEB, HOST1),
    ),
)
NODES = [
    NodeView(
        HOST1, (Role.HOST,), IPv4Address("172.30.0.11"), connected=True, in_service=True, fenced=False, synced=True,
        generation=7, applied=7, domains=2, approval=ApprovalView((Role.HOST,), IPv4Address("172.30.0.11")),
        vms=3, max_vms=1000, ports=512, max_ports=1_000_000,
    ),
    NodeView(
        NodeName("edge1"), (Role.EDGE,), IPv4Address("172.30.0.21"), connected=True, in_service=False, fenced=False,
        synced=False, generation=7, applied=6, domains=0, dropped={"unowned": 7, "strangers": 0},
        approval=ApprovalView((Role.EDGE,), IPv4Address("172.30.0.21")),
    ),
]  # fmt: skip
_AWAY: dict[str, Any] = {
    "connected": False, "in_service": False, "fenced": False, "synced": False, "generation": 0, "applied": 0,
    "domains": 0,
}  # fmt: skip
NEW_EDGE = NodeView(
    NodeName("edge3"), (), IPv4Address("172.30.0.23"), **_AWAY,
    approval=ApprovalView((Role.EDGE,), IPv4Address("172.30.0.23")),
)  # fmt: skip
REVOKED = NodeView(NodeName("host2"), (Role.HOST,), IPv4Address("172.30.0.12"), **_AWAY)
ASKS = AskedView(
    (Role.HOST,), IPv4Address("172.30.0.13"), "0123456789abcdef", NOW,
    "is not approved and asks to be host at 172.30.0.13",
)  # fmt: skip
STRANGER = NodeView(
    NodeName("host3"), ASKS.roles, ASKS.underlay, **_AWAY, asks=ASKS, is_known=False,
    warnings=(f"{ASKS.why}; if it may: `virt-ports node approve host3`",),
)  # fmt: skip


def test_list_has_the_form_of_virsh(manager: CannedManager, virt_ports: Command) -> None:
    waiting = domain("db", DB, external_address=None, first_port=None, last_port=None, ports_in_use=None,
                     state="waiting")  # fmt: skip
    manager.on("GET /v1/domains", [domain(), waiting])
    result = virt_ports("list")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        " Name   UUID                                   Node    External address   Ports         In use   State\n"
        "----------------------------------------------------------------------------------------------------------\n"
        " web1   6695eb01-f6a4-8304-79aa-97f2502e193f   host1   203.0.113.1        20000-20255   17       active\n"
        " db     0c2b4d5e-1111-4222-8333-444455556666   host1   -                  -             -        waiting\n"
        "\n"
    )


def test_list_says_where_the_packets_of_a_misrouted_vm_go_and_show_how_to_mend_it(
    manager: CannedManager, virt_ports: Command
) -> None:
    problem = "its packets leave by wg0, not to an edge; see `ip rule`"
    misrouted = domain(state="misrouted", problem=problem)
    manager.on("GET /v1/domains", [misrouted, domain("db", DB, state="unreachable", problem=problem)])
    manager.on("GET /v1/domains/web1", msgspec.structs.replace(DETAIL, domain=misrouted))
    listed = virt_ports("list").out
    assert "misrouted: its packets leave by wg0, not to an edge\n" in listed
    assert "unreachable\n" in listed
    assert f": {problem}\n" in re.sub(" +", " ", virt_ports("show", "web1").out)


def test_an_empty_list_is_a_header(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains", [])
    result = virt_ports("list")
    assert result.code == 0
    assert result.out.splitlines()[0] == " Name   UUID   Node   External address   Ports   In use   State"
    assert len(result.out.splitlines()) == 3


@pytest.mark.parametrize("words", [["-o", "json", "list"], ["list", "-o", "json"], ["list", "--output=json"]])
def test_list_as_json_has_the_documented_keys(manager: CannedManager, virt_ports: Command, words: list[str]) -> None:
    manager.on("GET /v1/domains", [domain()])
    assert virt_ports(*words).json == [
        {
            "name": "web1", "uuid": WEB, "node": "host1", "external_address": "203.0.113.1", "first_port": 20000,
            "last_port": 20255, "ports_in_use": 17, "state": "active", "problem": "",
            "leaving": "", "ports_held": 0, "cap": None,
        }
    ]  # fmt: skip


def test_list_and_show_say_why_a_vm_leaves_its_ports(manager: CannedManager, virt_ports: Command) -> None:
    why = "port 20005 is the machine's own (edge1)"
    manager.on("GET /v1/domains", [domain(leaving=why)])
    assert virt_ports("list").out.splitlines()[2].endswith(f"   active, leaving: {why}")
    manager.on("GET /v1/domains/web1", msgspec.structs.replace(DETAIL, domain=domain(leaving=why)))
    assert f"Leaving:           {why}\n" in virt_ports("show", "web1").out


def test_list_all_requests_vms_that_are_gone(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains?all=1", [domain(state="gone")])
    assert "gone" in virt_ports("list", "--all").out


def test_list_asks_for_what_is_wanted_and_no_more(manager: CannedManager, virt_ports: Command) -> None:
    query = "match=web%2A&match=db&node=host1&address=203.0.113.1&state=not-managed&sort=in-use"
    manager.on(f"GET /v1/domains?limit=11&all=1&{query}", [domain()])
    words = ["--all", "web*", "db", "--node", "host1", "--address", "203.0.113.1", "--state", "not-managed"]
    assert "web1" in virt_ports("list", *words, "--sort", "in-use", "--limit", "10").out
    manager.on("GET /v1/domains?node=host3", refusal(404, "not-found", "no node 'host3'; see `virt-ports node list`"))
    assert virt_ports("list", "--node", "host3").code == 1


def test_a_page_of_a_list_says_how_to_get_the_next_one(manager: CannedManager, virt_ports: Command) -> None:
    odd = domain("it's", DB)
    manager.on("GET /v1/domains?limit=2", [odd, domain()])
    manager.on("GET /v1/domains?limit=2&sort=node", [odd, domain()])
    manager.on(f"GET /v1/domains?limit=2&after=it%27s%3A{DB}", [domain()])
    *rows, last = virt_ports("list", "--limit", "1").out.splitlines()
    assert len(rows) == 4
    options = shlex.split(last.partition(": add ")[2])
    assert options == ["--after", f"it's:{DB}"]
    assert virt_ports("list", "--limit", "1", *options).out.endswith("active\n\n")
    assert virt_ports("list", "--limit", "1", "--sort", "node").out.endswith("active\n\n")
    assert [vm["name"] for vm in virt_ports("list", "--limit", "1", "-o", "json").json] == ["it's"]


def test_nodes_and_addresses_are_chosen_and_come_in_pages(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/nodes?limit=2&match=h%2A&role=host&state=out-of-service&after=a", NODES)
    words = ["h*", "--role", "host", "--state", "out-of-service", "--limit", "1", "--after", "a"]
    assert virt_ports("node", "list", *words).out.endswith("There are more: add --after host1\n")
    manager.on("GET /v1/pool?limit=2&match=203.%2A&after=203.0.113.0", [ADDRESS, ADDRESS])
    words = ["203.*", "--limit", "1", "--after", "203.0.113.0"]
    assert virt_ports("pool", "list", *words).out.endswith("There are more: add --after 203.0.113.1\n")
    assert virt_ports("pool", "list", "--after", "x").code == 2


def test_records_are_chosen_by_time_and_content(manager: CannedManager, virt_ports: Command) -> None:
    time = f"begin={NOW - 60}&end={NOW}&before=7"
    words = ["--since", "-1m", "--to", "now", "--before", "7"]
    manager.on(f"GET /v1/events?vm=web%2A&node=host1&event=within-limits&event=cut&{time}", lines(EVENTS))
    chosen = ["--vm", "web*", "--node", "host1", "--event", "within-limits", "--event", "cut"]
    assert "1041" in virt_ports("events", *chosen, *words).out
    manager.on(f"GET /v1/domains/web1/history?event=cut&{time}", EVENTS)
    assert "1041" in virt_ports("history", "web1", "--event", "cut", *words).out
    manager.on(f"GET /v1/audit?user=ann&request=POST+%2A&{time}", [])
    assert virt_ports("audit", "--user", "ann", "--request", "POST *", *words).code == 0
    manager.on(f"GET /v1/node-events?node=e%2A&event=fenced&{time}", [])
    assert virt_ports("node", "events", "e*", "--event", "fenced", *words).code == 0
    refused = virt_ports("events", "--since", "noon")
    assert (refused.code, "not a time: 'noon'" in refused.err) == (2, True)


def test_states_have_colours_where_they_are_wanted(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = domain("\x1b[31mactive", DB, state="misrouted", problem="its packets \x1b[5m")
    manager.on("GET /v1/domains", [domain("active"), hostile])
    manager.on("GET /v1/nodes", [NODES[1]])
    plain = virt_ports("list").out
    assert "\x1b" not in plain
    coloured = virt_ports("list", "--color", "always").out
    assert coloured.splitlines()[2].endswith("   \x1b[32mactive\x1b[0m")
    assert coloured.splitlines()[2].startswith(" active ")
    assert coloured.splitlines()[3].endswith("\x1b[31mmisrouted: its packets \\x1b[5m\x1b[0m")
    assert coloured.count("\x1b") == 4
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert "\x1b[31mout of service\x1b[0m" in virt_ports("--color", "always", "node", "list").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert virt_ports("list").out == coloured
    assert virt_ports("list", "--color", "never").out == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert virt_ports("list").out == plain


def test_show(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/web1", DETAIL)
    assert virt_ports("show", "web1").out == (
        "Name:              web1\n"
        "UUID:              6695eb01-f6a4-8304-79aa-97f2502e193f\n"
        "State:             growing\n"
        "Node:              host1\n"
        "External address:  203.0.113.1\n"
        "Ports:             20000-20255\n"
        "Ports in use:      17\n"
        "Internal address:  100.64.0.7\n"
        "Floor:             64 ports (pool)\n"
        "Cap:               32768 ports (metadata)\n"
        "Weight:            200 (set)\n"
        "Policy:            occupancy (set)\n"
        "Drain limit:       never (pool)\n"
        "Ignored:           metadata: floor 99999: use 1 to 64512 ports\n"
        "Packets/s:         1430.0\n"
        "Mbit/s:            16.7\n"
        "New connections/s: -\n"
        "Score:             1006.0\n"
        "Last decision:     score 1006.0 is above 1000: grow from 256 to 384\n"
        "Guest agent:       answering, since 2025-11-23T07:37:00+01:00: guest-file-flush: Invalid argument\n"
        "Guest says:        950 TCP sockets, 948 connections established, 12345 bytes received, 678 bytes sent\n"
        "Guest was told:    203.0.113.1 20000-20255\n"
        "\n"
        " External address   Ports         State      Connections   Since\n"
        "--------------------------------------------------------------------------------------\n"
        " 203.0.113.1        20000-20255   active     -             2025-11-23T06:38:00+01:00\n"
        " 203.0.113.2        1024-1279     draining   3             2025-11-23T07:37:00+01:00\n"
        "\n"
    )


@pytest.mark.parametrize(
    ("guest", "lines"),
    [
        (None, ["Guest agent:       not asked yet"]),
        (
            GuestAgentView("not answering", NOW, "no answer in time", *[None] * 8),
            ["Guest agent:       not answering, since 2025-11-23T07:38:00+01:00: no answer in time"],
        ),
        (
            GuestAgentView("answering", NOW, "", None, None, 1, 5, 6, *[None] * 3),
            [
                "Guest agent:       answering, since 2025-11-23T07:38:00+01:00",
                "Guest says:        5 bytes received, 6 bytes sent",
                "Guest was told:    -",
            ],
        ),
    ],
)
def test_show_prints_the_state_of_the_guest_agent(
    manager: CannedManager, virt_ports: Command, guest: GuestAgentView | None, lines: list[str]
) -> None:
    manager.on("GET /v1/domains/web1", msgspec.structs.replace(DETAIL, guest=guest))
    assert [line for line in virt_ports("show", "web1").out.splitlines() if line.startswith("Guest")] == lines
    shown = virt_ports("show", "web1", "-o", "json").json["guest"]
    assert (shown and shown["state"]) == (guest and guest.state)


def test_show_as_json_is_flat(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/web1", DETAIL)
    shown = virt_ports("show", "web1", "-o", "json").json
    assert "domain" not in shown
    assert (shown["name"], shown["first_port"], shown["internal_address"]) == ("web1", 20000, "100.64.0.7")
    assert [each["state"] for each in shown["allocations"]] == ["active", "draining"]
    assert shown["allocations"][1]["since"] == NOW - 60


def test_explain(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/web1/explain", EXPLAINED)
    assert virt_ports("explain", "web1").out == "web1 has 256 ports.\nPool: 9 of 64512 ports are free.\n"
    explained = virt_ports("explain", "web1", "-o", "json").json
    assert (explained["rule"], explained["pool_free"]) == ("mostly-unused", 9)
    assert explained["holders"][0] == {"name": "db", "ports": 32768, "ports_in_use": 30000}


def test_set(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("PATCH /v1/domains/web1", DETAIL)
    result = virt_ports("set", "web1", "floor=256", "drain-limit=none", "policy=spec", "--unset", "cap")
    assert result.code == 0
    assert "Weight:         200 (set)\n" in result.out
    assert virt_ports("set", "web1", "weight=5", "-o", "json").json["wishes"][2] == {
        "key": "weight", "value": 200, "origin": "set",
    }  # fmt: skip
    first, second = (json.loads(body) for _, body in manager.asked)
    assert first == {"floor": 256, "drain_limit_s": 0.0, "policy": "spec", "cap": None}
    assert second == {"weight": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to set; write KEY=VALUE"),
        (["floor"], "'floor' is no KEY=VALUE"),
        (["floor=many"], "floor 'many': use a whole number"),
        (
            ["colour=red"],
            "there is no setting 'colour'; use floor, cap, weight, policy, drain-limit, connections",
        ),
        (["drain-limit=0"], "use seconds above 0, up to 1e+09, or none"),
        (["--unset", "colour"], "cannot unset 'colour'"),
        (["floor=1", "--unset", "floor"], "cannot unset 'floor'"),
    ],
)
def test_set_refuses_invalid_wishes_without_a_request(
    manager: CannedManager, virt_ports: Command, words: list[str], message: str
) -> None:
    result = virt_ports("set", "web1", *words)
    assert result.code == 2
    assert message in result.err
    assert manager.asked == []


def test_resize_and_relocate(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("POST /v1/domains/web1/resize", DETAIL)
    manager.on("POST /v1/domains/web1/relocate", DETAIL)
    for words in (["resize", "web1", "512"], ["relocate", "web1"]):
        assert virt_ports(*words).out == (
            " External address   Ports         State      Connections   Since\n"
            "--------------------------------------------------------------------------------------\n"
            " 203.0.113.1        20000-20255   active     -             2025-11-23T06:38:00+01:00\n"
            " 203.0.113.2        1024-1279     draining   3             2025-11-23T07:37:00+01:00\n"
            "\n"
        )
        assert virt_ports(*words, "-o", "json").json["allocations"][1]["state"] == "draining"
    assert [body for _, body in manager.asked] == [b'{"ports":512}', b'{"ports":512}', b"", b""]


@pytest.mark.parametrize("size", ["many", "0", "-1", "64513", "9" * 30])
def test_resize_refuses_an_invalid_size_without_a_request(
    manager: CannedManager, virt_ports: Command, size: str
) -> None:
    result = virt_ports("resize", "web1", size)
    assert result.code == 2
    assert "64512" in result.err or "-1" in size
    assert manager.asked == []


def test_names_are_quoted_in_the_path(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/a%2F..%3Fb%20%C3%A9", DETAIL)
    assert virt_ports("show", "a/..?b é").code == 0


def whois_view(at: UtcSeconds) -> WhoisView:
    return WhoisView(EXTERNAL, 20817, at, "web1", WEB, HOST1, IPv4Address("100.64.0.7"), 20736, 20863,
                     AllocationState.ACTIVE, HOUR_AGO, pool="mail")  # fmt: skip


def test_whois(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/whois?address=203.0.113.1&port=20817", whois_view(NOW))
    assert virt_ports("whois", "203.0.113.1", "20817").out == (
        "Name:             web1\n"
        "UUID:             6695eb01-f6a4-8304-79aa-97f2502e193f\n"
        "Node:             host1\n"
        "External address: 203.0.113.1\n"
        "Pool:             mail\n"
        "Port:             20817\n"
        "At:               2025-11-23T07:38:00+01:00\n"
        "Range:            20736-20863\n"
        "State:            active\n"
        "Since:            2025-11-23T06:38:00+01:00\n"
        "Internal address: 100.64.0.7\n"
    )
    assert virt_ports("whois", "203.0.113.1", "20817", "-o", "json").json["at"] == NOW


def test_whois_names_nobody_when_a_time_has_two_meanings(manager: CannedManager, virt_ports: Command) -> None:
    candidates = (CandidateView("web1", WEB, HOST1, HOUR_AGO), CandidateView(None, None, None, None))
    nobody = (None,) * 8
    view = WhoisView(EXTERNAL, 20817, NOW, *nobody, "the clock was set back: it showed this time twice", candidates)
    manager.on("GET /v1/whois?address=203.0.113.1&port=20817", view)
    assert virt_ports("whois", "203.0.113.1", "20817").out == (
        " Name   UUID                                   Node    Since\n"
        "----------------------------------------------------------------------------------\n"
        " web1   6695eb01-f6a4-8304-79aa-97f2502e193f   host1   2025-11-23T06:38:00+01:00\n"
        " -      -                                      -       -\n"
        "\n"
        "Which one is not known: the clock was set back: it showed this time twice.\n"
    )
    assert virt_ports("whois", "203.0.113.1", "20817", "-o", "json").json["name"] is None


@pytest.mark.parametrize(
    "at", [["--at", "-10m"], ["--at=-10m"], ["--at", "10 minutes ago"], ["--at", "2025-11-23T07:28:00"]]
)
def test_whois_at_a_time(manager: CannedManager, virt_ports: Command, at: list[str]) -> None:
    manager.on(
        "GET /v1/whois?address=203.0.113.1&port=20817&at=1763879280.0&protocol=udp", whois_view(UtcSeconds(NOW - 600))
    )
    assert virt_ports("whois", "203.0.113.1", "20817", *at, "--protocol", "udp").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["203.0.113", "80"], "not an IPv4 address: '203.0.113'; write 203.0.113.1"),
        (["203.0.113.1", "65536"], "not a port: '65536'; use a number from 0 to 65535"),
        (["203.0.113.1", "http"], "not a port: 'http'; use a number from 0 to 65535"),
        (["203.0.113.1", "80", "--at", "2026-01-01"], "'2026-01-01' is in the future; use a time in the past"),
    ],
)
def test_whois_refuses(virt_ports: Command, manager: CannedManager, words: list[str], message: str) -> None:
    assert virt_ports("whois", *words) == (2, "", f"error: {message}\n")
    assert manager.asked == []


def test_history(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/web1/history?limit=1", EVENTS[:1])
    assert virt_ports("history", "web1", "--limit", "1").out == (
        " Seq    Time                        Event    Name   UUID                                   Node"
        "    External address   Ports\n"
        + "-" * 131 + "\n"
        " 1041   2025-11-23T06:38:00+01:00   active   web1   6695eb01-f6a4-8304-79aa-97f2502e193f   host1"
        "   203.0.113.1        20000-20255\n"
        "\n"
    )  # fmt: skip
    assert virt_ports("history", "web1", "--limit", "1", "-o", "json").json[0]["seq"] == 1041


def test_events(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/events?after=1040&limit=2", lines(EVENTS))
    table = virt_ports("events", "--after", "1040", "--limit", "2").out
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["1041", "1042"]
    assert [event["seq"] for event in virt_ports("events", "--after", "1040", "--limit", "2", "-o", "json").json] == [
        1041,
        1042,
    ]


def test_events_say_when_the_clock_was_set(manager: CannedManager, virt_ports: Command) -> None:
    nobody = ("", DomainUUID(""), NodeName(""), None, None, None)
    manager.on("GET /v1/events?limit=2", lines([EVENTS[0], EventView(1041, NOW, "clock-set", *nobody, -3600.0)]))
    assert "clock-set" in (shown := virt_ports("events", "--limit", "2").out)
    assert "manager's clock back 3600.0 s" in shown
    assert virt_ports("events", "--limit", "2", "-o", "json").json[1]["clock_set_by_s"] == -3600.0


def test_followed_events_are_printed_until_the_manager_ends(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/events?follow=1", lines(EVENTS))
    result = virt_ports("events", "--follow")
    header, _, *rows = result.out.splitlines()
    assert header.index("Event") == rows[0].index("active") == rows[1].index("draining")
    assert header.index("Ports") == rows[0].index("20000-20255") == rows[1].index("1024-1087")
    assert result.code == 3
    assert "the manager ended the stream" in result.err
    documents = virt_ports("events", "-f", "-o", "json").out.splitlines()
    assert [json.loads(line)["seq"] for line in documents] == [1041, 1042]


FORWARD = ForwardView(
    "web1", WEB, NodeName("host1"), EXTERNAL, 8000, 8010,
    ForwardProtocol.BOTH, IPv4Address("192.168.122.5"), 9000, kept=True, origin=ForwardOrigin.SET, state="active",
    since=UtcSeconds(1.0),
)  # fmt: skip
FORWARDS = (
    " External address   Ports       Protocol   Name   Node    To                        Kept   From   State\n"
    "----------------------------------------------------------------------------------------------------------\n"
    " 203.0.113.1        8000-8010   both       web1   host1   192.168.122.5:9000-9010   yes    set    active\n"
    "\n"
)


def test_forward_add(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("POST /v1/domains/web1/forwards", FORWARD)
    words = (
        "forward add web1 9000-9010 --protocol both --port 8000-8010 --address 203.0.113.1 --to 192.168.122.5 --no-keep"
    )
    assert virt_ports(*words.split()).out == FORWARDS
    assert virt_ports("forward", "add", "web1", "22").code == 0
    (_, body), (_, plain) = manager.asked
    assert decode(ForwardRequestBody, body) == ForwardRequestBody(
        PortRange(9000, 9010),
        PortRange(8000, 8010),
        IPv4Address("203.0.113.1"),
        ForwardProtocol.BOTH,
        IPv4Address("192.168.122.5"),
        kept=False,
    )
    assert decode(ForwardRequestBody, plain) == ForwardRequestBody(PortRange(22, 22))


def test_forward_list_and_remove(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/forwards?state=active&limit=3&match=web%2A&node=host1&address=203.0.113.1", [FORWARD])
    words = "forward list web* --node host1 --address 203.0.113.1 --state active --limit 3"
    assert virt_ports(*words.split()).out == FORWARDS
    manager.on("POST /v1/domains/web1/forwards/remove", [])
    assert virt_ports("forward", "remove", "web1", "8000-8010", "-o", "json").json == []
    assert decode(ForwardRemoval, manager.asked[-1][1]) == ForwardRemoval(PortRange(8000, 8010))


@pytest.mark.parametrize(
    "words", ["add web1 22x", "add web1 22 --port 70000", "add web1 22 --to guest", "remove web1 9-8"]
)
def test_forward_refuses_what_is_no_port_or_address_without_a_request(
    manager: CannedManager, virt_ports: Command, words: str
) -> None:
    assert virt_ports("forward", *words.split()).code == 2
    assert manager.asked == []


def test_pool_list(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/pool", [ADDRESS])
    assert virt_ports("pool", "list").out == (
        " Address       Pool      Ports   Allocated   Leaving   Longest free   VMs   Own   Reserved\n"
        "--------------------------------------------------------------------------------------------------\n"
        " 203.0.113.1   default   64511   320         64        60000          2     0     5060,8000-8100\n"
        "\n"
    )


def test_the_addresses_of_one_pool(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/pool?pool=mail", [msgspec.structs.replace(ADDRESS, pool="mail")])
    assert virt_ports("pool", "list", "--pool", "mail", "-o", "json").json[0]["pool"] == "mail"


def test_pool_show(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/pool/203.0.113.1", ADDRESS_DETAIL)
    assert virt_ports("pool", "show", "203.0.113.1").out == (
        "Address:        203.0.113.1\n"
        "Pool:           default\n"
        "Ports:          64511\n"
        "Allocated:      320\n"
        "Leaving:        64\n"
        "Longest free:   60000\n"
        "VMs:            2\n"
        "Own:            0\n"
        "Reserved:       5060,8000-8100\n"
        "\n"
        " Ports         Name   UUID                                   Node    State      Since\n"
        "-----------------------------------------------------------------------------------------------------------\n"
        " 1024-1087     db     0c2b4d5e-1111-4222-8333-444455556666   host1   draining   2025-11-23T07:38:00+01:00\n"
        " 20000-20255   web1   6695eb01-f6a4-8304-79aa-97f2502e193f   host1   active     2025-11-23T06:38:00+01:00\n"
        "\n"
    )
    shown = virt_ports("pool", "show", "203.0.113.1", "-o", "json").json
    assert (shown["address"], shown["ranges"][0]["name"], shown["ranges"][0]["first_port"]) == (
        "203.0.113.1",
        "db",
        1024,
    )
    assert virt_ports("pool", "show", "203.0.113").err == "error: not an IPv4 address: '203.0.113'; write 203.0.113.1\n"


def test_pool_show_filters_and_pages(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/pool/203.0.113.1?limit=2&match=web%2A&state=active&after=1023", ADDRESS_DETAIL)
    words = ("pool", "show", "203.0.113.1", "web*", "--state", "active", "--after", "1023")
    shown = virt_ports(*words, "--limit", "1").out
    assert "1024-1087" in shown
    assert "20000-20255" not in shown
    assert shown.endswith("There are more: add --after 1024\n")
    manager.on("GET /v1/pool/203.0.113.1?limit=1&match=web%2A&state=active&after=1023", ADDRESS_DETAIL)
    assert virt_ports(*words, "--limit", "1", "-o", "json").code == 0


def test_pool_show_has_the_ports_that_edges_use_themselves(manager: CannedManager, virt_ports: Command) -> None:
    own = (
        OwnPortsView(8080, 8080, OwnUse.LISTENER, NodeName("edge1"), NOW),
        OwnPortsView(32768, 60999, OwnUse.EPHEMERAL, NodeName("edge1"), None),
    )
    detail = msgspec.structs.replace(ADDRESS_DETAIL, own=own, ports_own=28233, ranges=())
    manager.on("GET /v1/pool/203.0.113.1", detail)
    shown = virt_ports("pool", "show", "203.0.113.1").out
    assert "Own:            28233\n" in shown
    assert shown.endswith(
        " Own ports     Node    For         State\n"
        "-----------------------------------------------------------------------------\n"
        " 8080-8080     edge1   listener    not used since 2025-11-23T07:38:00+01:00\n"
        " 32768-60999   edge1   ephemeral   in use\n"
        "\n"
    )


def test_pool_add(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("POST /v1/pool", [ADDRESS])
    result = virt_ports(
        "pool", "add", "203.0.113.4-203.0.113.5", "203.0.113.0/31", "--reserved", "8000-8100,5060", "-o", "json"
    )
    assert result.json[0]["reserved"] == [{"first": 5060, "last": 5060}, {"first": 8000, "last": 8100}]
    ((_, body),) = manager.asked
    wanted = tuple(IPv4Address(f"203.0.113.{last}") for last in (4, 5, 0, 1))
    assert decode(PoolRequest, body) == PoolRequest(wanted, ADDRESS.reserved)


def test_pool_add_refuses_invalid_addresses_without_a_request(manager: CannedManager, virt_ports: Command) -> None:
    result = virt_ports("pool", "add", "203.0.113.1", "224.0.0.1")
    assert result.code == 2
    assert result.err.startswith("error: 224.0.0.1 is multicast and can be no external address; write ")
    assert virt_ports("pool", "add", "203.0.113.1", "--reserved", "x").err.startswith("error: not a port range: 'x'")
    assert manager.asked == []


def test_pool_remove(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("POST /v1/pool/remove", [])
    result = virt_ports("pool", "remove", "203.0.113.2-203.0.113.3", "-o", "json")
    assert (result.code, result.json) == (0, [])
    ((_, body),) = manager.asked
    assert decode(PoolRemoval, body) == PoolRemoval((IPv4Address("203.0.113.2"), IPv4Address("203.0.113.3")))


def test_pool_remove_of_an_address_in_use(manager: CannedManager, virt_ports: Command) -> None:
    sentence = "cannot remove 203.0.113.1: VMs hold 2 ranges on it; have new connections leave it"
    manager.on("POST /v1/pool/remove", refusal(409, "address-in-use", sentence))
    assert virt_ports("pool", "remove", "203.0.113.1") == (1, "", f"error: {sentence}\n")


def test_node_list_says_what_nodes_found_wrong(manager: CannedManager, virt_ports: Command) -> None:
    ill = msgspec.structs.replace(NODES[0], warnings=("packets of VMs on virbr0 leave by wg0", "evil \x1b[2J"))
    manager.on("GET /v1/nodes", [ill, NODES[1]])
    *_, empty, first, second = virt_ports("node", "list").out.splitlines()
    assert (empty, first) == ("", "host1: packets of VMs on virbr0 leave by wg0")
    assert "\x1b" not in second


def test_node_show_says_where_the_fast_path_is_and_why_not_elsewhere(
    manager: CannedManager, virt_ports: Command
) -> None:
    paths = (FastPathView("eth0"), FastPathView("ppp0", "its packets have no Ethernet \x1b[2Jheader"))
    manager.on("GET /v1/nodes", [NODES[0], msgspec.structs.replace(NODES[1], fast_path=paths)])
    lines = virt_ports("node", "show", "edge1").out.splitlines()
    assert [line.split(maxsplit=4)[3:] for line in lines if line.startswith("Fast path at")] == [
        ["eth0:", "in force"], ["ppp0:", "its packets have no Ethernet \\x1b[2Jheader"]
    ]  # fmt: skip
    assert virt_ports("node", "show", "edge9").err.startswith("error: ")


def test_node_list_says_why_a_node_is_out_of_service_and_what_waits_for_it(
    manager: CannedManager, virt_ports: Command
) -> None:
    trouble = "out of service: it has refused what it was sent for 61 seconds: program nftables: evil \x1b[2J"
    edge = msgspec.structs.replace(NODES[1], trouble=trouble, held_ports=4096, held_since=NOW)
    host = msgspec.structs.replace(NODES[0], answering=False)
    manager.on("GET /v1/nodes", [host, edge])
    _, _, first, _, _, why, held = virt_ports("node", "list").out.splitlines()
    assert "not answering" in first
    assert why == "edge1: " + trouble.replace("\x1b", "\\x1b")
    assert held == (
        "edge1: 4096 ports have waited for it since 2025-11-23T07:38:00+01:00: start its natd; or, if it forwards "
        "nothing any more, `virt-ports node fence edge1`"
    )


def test_audit(manager: CannedManager, virt_ports: Command) -> None:
    act = AuditView(7, UtcSeconds(NOW), "ann\x1b[2J", 1000, 4711, "PATCH /v1/domains/web1", '{"cap":512}')
    manager.on("GET /v1/audit", [act])
    words = virt_ports("audit").out.splitlines()[2].split()
    assert words == [
        "7", "2025-11-23T07:38:00+01:00", "ann\\x1b[2J", "4711", "PATCH", "/v1/domains/web1", '{"cap":512}'
    ]  # fmt: skip
    assert virt_ports("audit", "-o", "json").json[0]["user"] == "ann\x1b[2J"


def test_node_events(manager: CannedManager, virt_ports: Command) -> None:
    why = "it has refused what it was sent for 5 seconds: evil \x1b[2J"
    manager.on("GET /v1/node-events", [NodeEventView(7, UtcSeconds(NOW), NodeName("edge1"), "out-of-service", why)])
    words = virt_ports("node", "events").out.splitlines()[2]
    assert words.split()[:3] == ["2025-11-23T07:38:00+01:00", "edge1", "out-of-service"]
    assert words.endswith("evil \\x1b[2J")
    assert virt_ports("node", "events", "-o", "json").json[0]["why"] == why


def test_node_list(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/nodes", [NODES[1], NEW_EDGE, NODES[0], REVOKED, STRANGER])
    assert virt_ports("node", "list").out == (
        " Name    Roles   Underlay      State                  Synced   Generation   VMs      Ports         Dropped\n"
        "--------------------------------------------------------------------------------------------------------------\n"
        " edge1   edge    172.30.0.21   out of service         no       6/7          -        -             unowned 7\n"
        " edge3   edge    172.30.0.23   away                   no       0/0          -        -             -\n"
        " host1   host    172.30.0.11   connected              yes      7/7          3/1000   512/1000000   -\n"
        " host2   host    172.30.0.12   revoked                no       0/0          -        -             -\n"
        " host3   host    172.30.0.13   waiting for approval   no       0/0          -        -             -\n"
        "\n"
        "host3: is not approved and asks to be host at 172.30.0.13; if it may: `virt-ports node approve host3`\n"
    )
    assert [node["dropped"] for node in virt_ports("node", "list", "-o", "json").json] == [
        {"unowned": 7, "strangers": 0}, {}, {}, {}, {},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "state"),
    [({"fenced": True}, "fenced"), ({"connected": False}, "away"), ({}, "connected")],
)
def test_node_fence_and_unfence(
    manager: CannedManager, virt_ports: Command, changes: dict[str, Any], state: str
) -> None:
    facts = {"connected": True, "in_service": True, "fenced": False, "synced": True, **changes}
    roles, underlay = (Role.HOST, Role.EDGE), IPv4Address("172.30.0.11")
    approval = ApprovalView(roles, underlay)
    node = NodeView(HOST1, roles, underlay, generation=7, applied=7, domains=2, approval=approval, **facts)
    manager.on("POST /v1/nodes/host1/fence", node)
    manager.on("DELETE /v1/nodes/host1/fence", node)
    for action in ("fence", "unfence"):
        words = virt_ports("node", action, "host1").out.splitlines()[2].split()
        assert words[:4] == ["host1", "host,edge", "172.30.0.11", state]
        assert virt_ports("node", action, "host1", "-o", "json").json["name"] == "host1"


def test_node_revoke_and_remove(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("DELETE /v1/nodes/host2/approval", REVOKED)
    manager.on("DELETE /v1/nodes/host2", [NODES[0]])
    assert "revoked" in virt_ports("node", "revoke", "host2").out
    assert "host1" in virt_ports("node", "remove", "host2").out


APPROVE = "PUT /v1/nodes/host3/approval"


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (
            ("--role", "host", "--role", "edge", "--underlay", "172.30.0.13"),
            {"roles": ["host", "edge"], "underlay": "172.30.0.13"},
        ),
        (("--max-vms", "20", "--max-ports", "0"), {"max_vms": 20, "max_ports": 0}),
        (("--yes",), {"roles": ["host"], "underlay": "172.30.0.13", "machine": "0123456789abcdef"}),
    ],
)
def test_node_approve_sends_what_was_named_or_exactly_what_is_asked(
    manager: CannedManager, virt_ports: Command, words: tuple[str, ...], body: dict[str, Any]
) -> None:
    manager.on("GET /v1/nodes", [NODES[0], STRANGER])
    manager.on(APPROVE, msgspec.structs.replace(NODES[0], name=NodeName("host3")))
    result = virt_ports("node", "approve", "host3", *words)
    assert (result.code, result.err) == (0, "")
    assert manager.asked[-1][0] == APPROVE
    assert json.loads(manager.asked[-1][1]) == body


@pytest.mark.parametrize(("answer", "is_approved"), [("y\n", True), ("YES\n", True), ("n\n", False), ("", False)])
def test_node_approve_shows_what_is_asked_and_approves_it_once_confirmed(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch, answer: str, *, is_approved: bool
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    manager.on("GET /v1/nodes", [STRANGER])
    manager.on(APPROVE, msgspec.structs.replace(NODES[0], name=NodeName("host3")))
    result = virt_ports("node", "approve", "host3")
    assert result.err.startswith(
        "host3 is not approved and asks to be host at 172.30.0.13, machine 0123456789abcdef\n"
        "approve host3 as host at 172.30.0.13? [y/N] "
    )
    assert (result.code, APPROVE in dict(manager.asked)) == ((0, True) if is_approved else (2, False))


def test_node_approve_without_a_terminal_or_a_request_says_what_to_add(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    manager.on("GET /v1/nodes", [NODES[0], STRANGER])
    assert "add --yes, or --role and --underlay" in virt_ports("node", "approve", "host3").err
    assert virt_ports("node", "approve", "host1").err == (
        "error: no request of node 'host1'; it is approved as host at 172.30.0.11; "
        "to change that, name --role and --underlay\n"
    )
    assert virt_ports("node", "approve", "host9").err.startswith("error: no node 'host9'; start its natd and wait ")
    assert virt_ports("node", "approve", "host3", "--role", "manager").code == 2
    assert "not an IPv4 address: 'eth1'" in virt_ports("node", "approve", "host3", "--underlay", "eth1").err


def test_status(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/status", StatusView("0.1.0", 12, NOW, 3, 4, 2, "/var/lib/virt-ports/ledger.db"))
    assert virt_ports("status").out == (
        "Version:        0.1.0\n"
        "Epoch:          12\n"
        "Running since:  2025-11-23T07:38:00+01:00\n"
        "VMs:            3\n"
        "Nodes:          2 connected of 4\n"
        "Ledger:         /var/lib/virt-ports/ledger.db\n"
        "Timeouts:       -\n"
    )
    assert virt_ports("status", "-o", "json").json["epoch"] == 12


def test_status_says_what_holds_the_site_up(manager: CannedManager, virt_ports: Command) -> None:
    problems = ("edge2: out of service: it has been away for 5 minutes", "evil \x1b[2J")
    manager.on("GET /v1/status", StatusView("0.1.0", 12, NOW, 3, 4, 2, "ledger.db", problems=problems))
    assert virt_ports("status").out.splitlines()[-2:] == [problems[0], "evil \\x1b[2J"]


def test_status_prints_the_timeouts(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/status", StatusView("0.1.0", 12, NOW, 3, 4, 2, "ledger.db", Timeouts(udp_s=300)))
    assert virt_ports("status").out.splitlines()[-1] == (
        "Timeouts:       TCP 7440 s, opening or half closed 240 s, TIME_WAIT 120 s, reset 10 s; "
        "UDP 300 s, to port 53 30 s; ICMP 60 s"
    )
    assert virt_ports("status", "-o", "json").json["timeouts"]["udp_s"] == 300


def test_status_says_what_is_wrong_with_ledger_and_clock(manager: CannedManager, virt_ports: Command) -> None:
    step = ClockStepView(UtcSeconds(NOW + 3600), NOW, -3600.0)
    manager.on("GET /v1/status", StatusView("0.1.0", 12, NOW, 3, 4, 2, "ledger.db", None, "it is full", 3, (step,)))
    assert (
        "Ledger problem: it is full\n"
        "Clock:          was set 3 times, last back by 3600.0 s to 2025-11-23T07:38:00+01:00\n"
    ) in virt_ports("status").out


@pytest.mark.parametrize(
    ("action", "request_"), [("fence", "POST /v1/nodes/host1/fence"), ("revoke", "DELETE /v1/nodes/host1/approval")]
)
def test_what_is_dangerous_is_asked_on_a_terminal_only(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch, action: str, request_: str
) -> None:
    manager.on(request_, NODES[0])
    terminal = io.StringIO("n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    result = virt_ports("node", action, "host1")
    assert (result.code, manager.asked) == (2, [])
    assert result.err.endswith("error: nothing was changed\n")
    assert virt_ports("node", action, "host1", "--yes").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a script
    assert virt_ports("node", action, "host1").code == 0
    assert [request for request, _ in manager.asked] == [request_, request_]
