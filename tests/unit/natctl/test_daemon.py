"""What natd's daemon does with the messages of the manager that have come together."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cpm.protocol.messages import PROTOCOL, Delta, PathState, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, PortRange
from natctl import settings
from natctl.daemon import Natd
from natctl.model.commands import Program, Replace
from tests.fakes.intents import edge_intent

VM, OTHER = DomainUUID("11111111-1111-4111-8111-111111111111"), DomainUUID("22222222-2222-4222-8222-222222222222")
PORTS = PortRange(2048, 2111)
EXTERNAL, HOST = IPv4Address("203.0.113.1"), IPv4Address("172.30.0.11")
CONFIG = """
underlay_address = "172.30.0.21"
roles = ["edge"]
state = "{folder}"
[manager]
url = "unix:///nowhere"
[edge]
uplinks = ["eth1"]
underlay = ["eth0"]
"""


def natd_in(folder: Path) -> Natd:
    (folder / "natd.toml").write_text(CONFIG.format(folder=folder))
    return Natd(settings.load(folder / "natd.toml"))


def test_what_the_manager_sent_while_we_were_behind_is_one_transaction(tmp_path: Path) -> None:
    """An edge that has missed that a port is another VM's by now drops no answer in between."""

    async def story() -> None:
        natd = natd_in(tmp_path)
        natd.on_connected()
        natd.on_message(Welcome(PROTOCOL, 1, "test"))
        before = edge_intent(VM, "one", IPv4Address("100.64.0.1"), HOST, [(EXTERNAL, PORTS)])
        natd.on_message(Snapshot(1, 1, PathState(IPv4Network("100.64.0.0/10"), (), (EXTERNAL,)), edge=(before,)))
        await asyncio.sleep(0)
        assert isinstance(natd._kernel_work.get_nowait(), Replace)
        natd._node.on_kernel_programmed(0.0)
        after = edge_intent(OTHER, "two", IPv4Address("100.64.0.2"), HOST, [(EXTERNAL, PORTS)])
        # Both frames were in the socket, and are read without a pause.
        natd.on_message(Delta(1, 2, edge_gone=(VM,)))
        natd.on_message(Delta(1, 3, edge=(after,)))
        await asyncio.sleep(0)
        command = natd._kernel_work.get_nowait()
        assert isinstance(command, Program)
        assert command.change.edge == {VM: None, OTHER: after}
        assert natd._kernel_work.empty()

    asyncio.run(story())
