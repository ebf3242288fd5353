"""What the operator changes of the pool is changed as a whole or not at all, and keeps what was not named."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.api.requests import PoolRemoval, PoolRequest
from cpm.commands import pool
from cpm.core.manager import Manager
from cpm.protocol.errors import PortsInUse, VirtPortsError
from cpm.protocol.model import DomainUUID, NodeName, PortRange
from tests.fakes.site import EXTERNAL, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
FRESH = IPv4Address("203.0.113.7")
OTHER = IPv4Address("203.0.113.8")
SIP = (PortRange(5060, 5061),)


def reserved(site: Site) -> dict[IPv4Address, tuple[PortRange, ...]]:
    assert site.manager is not None
    return {each.address: each.reserved for each in site.manager.fleet.space.addresses}


def add(site: Site, *addresses: IPv4Address, ports: tuple[PortRange, ...] | None = None) -> list[VirtPortsError]:
    """As `virt-ports pool add`; return its error, which ends with nothing changed."""
    errors: list[VirtPortsError] = []

    def act(manager: Manager) -> None:
        try:
            pool.add(manager, site.now, PoolRequest(addresses, ports))
        except VirtPortsError as error:
            errors.append(error)
            raise

    site.ask(act)
    site.run()
    return errors


def restarted(site: Site) -> Site:
    """What the ledger holds counts, not what the manager has in memory."""
    site.crash_manager()
    site.heal()
    return site


def test_an_address_that_is_added_again_keeps_its_reserved_ports() -> None:
    site = Site()
    add(site, FRESH, ports=SIP)
    add(site, FRESH, OTHER)
    assert reserved(site)[FRESH] == SIP
    assert reserved(site)[OTHER] == ()
    assert reserved(restarted(site))[FRESH] == SIP


def test_reserved_ports_are_changed_and_given_back_by_naming_others_or_none() -> None:
    site = Site()
    add(site, FRESH, ports=SIP)
    add(site, FRESH, ports=(PortRange(8000, 8100),))
    assert reserved(site)[FRESH] == (PortRange(8000, 8100),)
    add(site, FRESH, ports=())
    assert reserved(restarted(site))[FRESH] == ()


def test_when_a_vm_holds_a_port_to_be_reserved_none_of_the_addresses_is_added() -> None:
    site = Site()
    site.start_vm(NodeName("host1"), VM)
    site.run()
    before = reserved(site)
    (error,) = add(site, FRESH, EXTERNAL, OTHER, ports=(PortRange(1024, 1100),))
    assert isinstance(error, PortsInUse), "the operator can mend it, and it is no bug"
    assert f"`virt-ports relocate {VM}`" in str(error)
    assert reserved(site) == before
    assert reserved(restarted(site)) == before


@pytest.mark.parametrize("wrong", [EXTERNAL, OTHER])
def test_when_one_address_cannot_be_removed_none_is(wrong: IPv4Address) -> None:
    """VMs hold ports on the one, the other is not in the pool."""
    site = Site()
    add(site, FRESH)
    site.start_vm(NodeName("host1"), VM)
    site.run()

    def remove(manager: Manager) -> None:
        with pytest.raises(VirtPortsError):
            pool.remove(manager, PoolRemoval((FRESH, wrong)))

    site.ask(remove)
    assert set(reserved(restarted(site))) == {EXTERNAL, FRESH}
