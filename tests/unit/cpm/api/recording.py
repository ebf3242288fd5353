"""
Records cpmd's answer to every request that operators can make::

    python -m tests.unit.cpm.api.recording > tests/unit/cpm/api/recorded_answers.json

The requests are sent in this order to one manager whose clock does not advance. Record again only for an intended
change of an answer; a reviewer then checks the difference.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from cpm.protocol.messages import Attach, Draining, Measured, Report
from cpm.protocol.model import DomainUUID, PortRange, Role, Wishes
from tests.fakes import cpmd
from tests.fakes.cpmd import Answer, Node, Site

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
DB = DomainUUID("0c2b4d5e-1111-4222-8333-444455556666")

Request = tuple[str, str, bytes | None]

FIRST: list[Request] = [
    ("GET", "/v1/status", None),
    ("GET", "/v1/domains", None),
    ("GET", "/v1/pool", None),
    ("GET", "/v1/nodes", None),
    ("GET", "/v1/events", None),
    ("GET", "/metrics", None),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.1","203.0.113.2"],"reserved":[{"first":5060,"last":5060}]}'),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.9"]}'),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.1","203.0.113.2"]}'),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.8","100.64.0.1"]}'),
    ("POST", "/v1/pool/remove", b'{"addresses":["203.0.113.9"]}'),
]

WITH_VMS: list[Request] = [
    ("GET", "/v1/status", None),
    ("GET", "/v1/domains", None),
    ("GET", "/v1/domains?all=1", None),
    ("GET", "/v1/domains?all=false", None),
    ("GET", "/v1/domains/web1", None),
    ("GET", f"/v1/domains/{WEB.upper()}", None),
    ("GET", "/v1/domains/db", None),
    ("GET", "/v1/domains/web1/explain", None),
    ("GET", "/v1/domains/db/explain", None),
    ("GET", "/v1/domains/web1/history", None),
    ("GET", "/v1/domains/web1/history?limit=1", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=1100", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=1100&at=1763879880.0&protocol=tcp", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=1100&at=", None),
    ("GET", "/v1/pool", None),
    ("GET", "/v1/nodes", None),
    ("GET", "/v1/events", None),
    ("GET", "/v1/events?limit=2", None),
    ("GET", "/v1/events?after=1&limit=1", None),
    ("GET", "/v1/events?limit=0", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/pool/203.0.113.1", None),
    ("GET", "/v1/pool/203.0.113.2", None),
    ("GET", "/v1/pool/203.0.113.1?match=db", None),
    ("GET", "/v1/pool/203.0.113.1?state=draining&state=held", None),
    ("GET", "/v1/pool/203.0.113.1?limit=1&after=1024", None),
]

CHANGES: list[Request] = [
    ("POST", "/v1/domains/web1/forwards", b'{"guest_ports":{"first":22,"last":22},"ports":{"first":2222,"last":2222}}'),
    ("POST", "/v1/domains/web1/forwards", b'{"guest_ports":{"first":22,"last":22},"guest_address":"192.168.122.5"}'),
    ("POST", "/v1/domains/db/forwards", b'{"guest_ports":{"first":53,"last":53},"protocol":"both","kept":false}'),
    ("GET", "/v1/forwards", None),
    ("GET", "/v1/forwards?match=web*&node=host1&address=203.0.113.1&state=starting&limit=1", None),
    ("GET", "/v1/domains/web1", None),
    ("POST", "/v1/domains/web1/forwards/remove", b'{"ports":{"first":2222,"last":2222}}'),
    ("GET", "/v1/forwards?state=leaving", None),
    ("PATCH", "/v1/domains/web1", b'{"floor":128,"drain_limit_s":0}'),
    ("PATCH", "/v1/domains/web1", b'{"floor":null,"weight":7}'),
    ("POST", "/v1/domains/web1/resize", b'{"ports":300}'),
    ("POST", "/v1/domains/web1/relocate", None),
    ("GET", "/v1/domains/web1", None),
    ("DELETE", "/v1/nodes/edge2/fence", None),
    ("POST", "/v1/nodes/edge2/fence", None),
    ("GET", "/v1/nodes", None),
    ("GET", "/v1/events", None),
    ("PUT", "/v1/nodes/host1/approval", b'{"max_vms":7,"max_ports":0}'),
    ("PUT", "/v1/nodes/host3/approval", b'{"roles":["host"],"underlay":"172.30.0.13","machine":"0123456789abcdef"}'),
    ("DELETE", "/v1/nodes/host3/approval", None),
    ("GET", "/v1/nodes", None),
    ("DELETE", "/v1/nodes/host3", None),
]

REFUSED: list[Request] = [
    ("POST", "/v1/domains/web2/forwards", b'{"guest_ports":{"first":22,"last":22}}'),
    ("POST", "/v1/domains/db/forwards", b'{"guest_ports":{"first":22,"last":22},"ports":{"first":2222,"last":2222}}'),
    ("POST", "/v1/domains/db/forwards", b'{"guest_ports":{"first":22,"last":23},"ports":{"first":2222,"last":2222}}'),
    ("POST", "/v1/domains/db/forwards", b'{"guest_ports":{"first":22,"last":22},"address":"203.0.113.77"}'),
    ("POST", "/v1/domains/db/forwards", b'{"guest_ports":{"first":22,"last":22},"protocol":"icmp"}'),
    ("POST", "/v1/domains/db/forwards/remove", b'{"ports":{"first":9,"last":9}}'),
    ("GET", "/v1/forwards?node=host9", None),
    ("GET", "/v1/forwards?address=203.0.113.77", None),
    ("GET", "/v1/domains/web2", None),
    ("GET", "/v1/domains/web2/explain", None),
    ("GET", "/v1/domains/web2/history", None),
    ("GET", "/v1/domains/web1/history?limit=0", None),
    ("GET", "/v1/domains/web1/history?limit=100001", None),
    ("GET", "/v1/domains/web1/history?limit=", None),
    ("PATCH", "/v1/domains/web1", b'{"floor":9,"cap":8}'),
    ("PATCH", "/v1/domains/web1", b'{"colour":"red"}'),
    ("PATCH", "/v1/domains/web1", b""),
    ("PATCH", "/v1/domains/web2", b'{"floor":64}'),
    ("POST", "/v1/domains/web2/resize", b'{"ports":300}'),
    ("POST", "/v1/domains/web1/resize", b'{"ports":0}'),
    ("POST", "/v1/domains/web1/resize", b'{"ports":65536}'),
    ("POST", "/v1/domains/web1/resize", b'{"ports":'),
    ("POST", "/v1/domains/web1/resize", None),
    ("POST", "/v1/domains/web2/relocate", None),
    ("GET", "/v1/whois", None),
    ("GET", "/v1/whois?address=203.0.113.1", None),
    ("GET", "/v1/whois?address=203.0.113&port=80", None),
    ("GET", "/v1/whois?port=80", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=65536", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=99999999999999999999999", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=http", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=80&at=noon", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=65535", None),
    ("GET", "/v1/whois?address=203.0.113.1&port=1100&at=0", None),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113"]}'),
    ("POST", "/v1/pool", b'{"addresses":[17]}'),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.1"],"reserved":[{"first":1024,"last":65535}]}'),
    ("POST", "/v1/pool", b'{"addresses":["203.0.113.7","203.0.113.1"],"reserved":[{"first":1024,"last":65535}]}'),
    ("POST", "/v1/pool/remove", b'{"addresses":["203.0.113.2","203.0.113.1"]}'),
    ("POST", "/v1/pool/remove", b'{"addresses":["203.0.113.2","203.0.113.77"]}'),
    ("POST", "/v1/pool/remove", b'{"addresses":["203.0.113"]}'),
    ("DELETE", "/v1/pool/203.0.113.1", None),
    ("GET", "/v1/pool/203.0.113.77", None),
    ("GET", "/v1/pool/203.0.113", None),
    ("POST", "/v1/nodes/host1/fence", None),
    ("POST", "/v1/nodes/host9/fence", None),
    ("DELETE", "/v1/nodes/host9/fence", None),
    ("PUT", "/v1/nodes/host9/approval", b"{}"),
    ("PUT", "/v1/nodes/host9/approval", b'{"roles":["manager"],"underlay":"172.30.0.19"}'),
    ("PUT", "/v1/nodes/host9/approval", b'{"roles":["host"],"underlay":"172.30.0.11"}'),
    ("PUT", "/v1/nodes/host9/approval", b'{"roles":["host"],"underlay":"100.64.0.9"}'),
    ("PUT", "/v1/nodes/host9/approval", b'{"roles":["host"],"underlay":"203.0.113.1"}'),
    ("PUT", "/v1/nodes/host1/approval", b'{"roles":["host"]}'),
    ("PUT", "/v1/nodes/$(reboot)/approval", b'{"roles":["host"],"underlay":"172.30.0.19"}'),
    ("DELETE", "/v1/nodes/host1/approval", None),
    ("DELETE", "/v1/nodes/host9/approval", None),
    ("DELETE", "/v1/nodes/host1", None),
    ("DELETE", "/v1/nodes/host9", None),
    ("GET", "/v1/node-events?limit=2", None),
    ("GET", "/v1/node-events?limit=0", None),
    ("GET", "/v1/events?after=x", None),
    ("GET", "/v1/events?limit=-1", None),
    ("GET", "/v1/measurements", None),
    ("GET", "/v1/measurements?follow=0", None),
    ("GET", "/v1/nothing", None),
    ("GET", "/", None),
    ("DELETE", "/v1/status", None),
    ("PUT", "/v1/domains/web1", b"{}"),
    ("POST", "/v1/session", None),
]


async def record() -> list[dict[str, Any]]:
    """Ask everything of a new manager; return requests and answers."""
    # Ranges change while an edge is away, and no time passes for which they could wait for it.
    async with cpmd.running(edge_grace_s=0.0, edge_wait_s=0.0) as site:
        answers = [await _recorded(site, request) for request in FIRST]
        async with site.node("host1", "172.30.0.11") as node:
            async with site.node("edge2", "172.30.0.22", frozenset((Role.EDGE,))):
                await start_vms(site, node)
                answers += [await _recorded(site, request) for request in WITH_VMS]
                answers += [await _measurements(site, node)]
            while '"connected":false' not in (await site.ask("GET", "/v1/nodes")).body:
                await asyncio.sleep(0.002)
            for request in CHANGES:
                answers.append(await _recorded(site, request))
                await site.settle()
            answers += [await _recorded(site, request) for request in REFUSED]
            target = "/v1/events?after=0&follow=1"
            answers.append(_entry(site, "GET", target, None, await site.lines(target, 3)))
        return answers


async def start_vms(site: Site, node: Node) -> None:
    """Start two VMs, ``web1`` with a cap of 4,096 in its XML, and have the first one measured."""
    await site.settle()
    wishes = Wishes(cap=4096, nonsense=("weight 'x': it is not a whole number",))
    for attach in (Attach(WEB, "web1", wishes=wishes), Attach(DB, "db")):
        await node.say(attach)
        while '"active"' not in (await site.ask("GET", f"/v1/domains/{attach.domain}")).body:
            await asyncio.sleep(0.002)
    await site.settle()
    await node.say(_report(node))
    while '"ports_in_use":17' not in (await site.ask("GET", "/v1/domains")).body:
        await asyncio.sleep(0.002)
    await site.settle()


def _report(node: Node) -> Report:
    measured = Measured(WEB, packets_per_s=500.0, megabits_per_s=10.0, ports_in_use=17,
                        draining=(Draining(PortRange(1024, 1087), 3),), new_connections_per_s=2.5)  # fmt: skip
    return Report(node.generation, 1.0, (measured,))


async def _measurements(site: Site, node: Node) -> dict[str, Any]:
    target, started = "/v1/measurements?follow=1", asyncio.Event()
    reading = asyncio.create_task(site.lines(target, 1, started))
    await started.wait()
    # The headers come before the manager has begun to listen for us: report until a line came.
    while not (await asyncio.wait({reading}, timeout=0.02))[0]:
        await node.say(_report(node))
    await site.settle()
    return _entry(site, "GET", target, None, reading.result())


async def _recorded(site: Site, request: Request) -> dict[str, Any]:
    return _entry(site, *request, await site.ask(*request))


def _entry(site: Site, method: str, target: str, body: bytes | None, answer: Answer) -> dict[str, Any]:
    return {
        "request": f"{method} {target}",
        "body": body.decode() if body is not None else None,
        "status": answer.status,
        "content_type": answer.content_type,
        "answer": answer.body.replace(str(site.directory), "DIRECTORY"),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(record()), indent=1) + "\n")
