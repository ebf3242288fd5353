"""Named pools and pinned addresses on a whole site: where a VM gets ports, and how it changes to another place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest
from msgspec import structs

from cpm.api.views import DomainView
from cpm.core.forwards import ForwardRequest
from cpm.core.journal import JournalEvent
from cpm.core.manager import Manager
from cpm.protocol.errors import Conflict, InvalidRequest, VirtPortsError
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, ForwardOrigin, PortRange, Wishes
from cpm.queries import explain_facts, vms
from tests.fakes.site import EXTERNAL, Site
from tests.unit.site.test_order import FOURTH, HOST1, HOST2, OTHER, THIRD, VM, journal, resize, settle, started

MAIL = IPv4Address("203.0.113.8")
MAIL2 = IPv4Address("203.0.113.9")
FEW = PortRange(1024, 1024 + 8 * 64 - 1)


def add(site: Site, address: IPv4Address, pool: str = "mail", usable: PortRange | None = None) -> None:
    reserved = () if usable is None else PortRange(1024, 65535).minus(usable)
    site.ask(lambda manager: manager.pool.add_addresses([ExternalAddress(address, reserved, pool)], site.now))
    site.run()


def wish(site: Site, uuid: DomainUUID = VM, **wishes: object) -> None:
    site.ask(lambda manager: manager.set_wishes(uuid, Wishes(**wishes)))  # type: ignore[arg-type]
    turn(site)


def turn(site: Site, seconds: float = 6.0) -> None:
    site.pass_time(seconds)
    settle(site)


def manager_of(site: Site) -> Manager:
    assert site.manager is not None
    return site.manager


def held(site: Site, uuid: DomainUUID = VM) -> list[tuple[IPv4Address, str]]:
    return sorted((each.external, each.state.value) for each in manager_of(site).fleet.of(uuid))


def refusal_of(site: Site, act: Callable[[Manager], None]) -> str:
    errors: list[VirtPortsError] = []

    def attempt(manager: Manager) -> None:
        try:
            act(manager)
        except VirtPortsError as error:
            errors.append(error)

    site.ask(attempt)
    return str(errors[0])


def list_again(site: Site, uuid: DomainUUID, wishes: Wishes) -> None:
    site.machines[HOST1].wishes[uuid] = wishes
    site.list_domains(HOST1)
    site.run()
    turn(site)


def shown(site: Site, uuid: DomainUUID = VM) -> DomainView:
    manager = manager_of(site)
    return vms.summary(manager, manager.fleet.vms[uuid], site.now)


def test_a_vm_gets_ports_of_the_pool_that_it_wishes_and_of_no_other() -> None:
    site = Site(ports=FEW)
    add(site, MAIL, usable=FEW)
    for uuid in (VM, OTHER, THIRD):
        site.start_vm(HOST1, uuid)
        site.run()
    site.start_vm(HOST1, FOURTH, Wishes(pool="mail"))
    site.run()
    assert [held(site, uuid)[0][0] for uuid in (VM, OTHER)] == [EXTERNAL] * 2
    assert held(site, FOURTH) == [(MAIL, "active")]
    space = manager_of(site).fleet.space
    resize(site, 4096, VM)
    settle(site)
    assert all(external == EXTERNAL for external, _ in held(site))
    assert space.free_ports("mail") == FEW.size - 256


def test_a_vm_that_wishes_another_pool_gets_its_new_connections_there_and_keeps_the_open_ones() -> None:
    site = Site()
    add(site, MAIL)
    started(site)
    former = [site.open(VM, offset) for offset in range(100)]
    wish(site, pool="mail")
    assert held(site) == [(EXTERNAL, "draining"), (MAIL, "active")]
    new = site.open(VM, 1)
    assert new is not None
    assert new.external == MAIL
    site.check()
    assert site.connections >= {each for each in former if each is not None}
    wish(site)
    assert {(EXTERNAL, "active"), (MAIL, "draining")} <= set(held(site))
    site.check()


def test_the_wish_of_the_xml_is_followed_while_the_vm_runs() -> None:
    site = Site()
    add(site, MAIL)
    site.start_vm(HOST1, VM, Wishes())
    site.run()
    list_again(site, VM, Wishes(pool="mail"))
    assert (MAIL, "active") in held(site)


def test_an_operator_is_told_which_pools_there_are_and_how_to_make_one() -> None:
    site = Site()
    add(site, MAIL)
    started(site)
    text = refusal_of(site, lambda manager: manager.set_wishes(VM, Wishes(pool="web")))
    assert "no pool web" in text
    assert "virt-ports pool add ADDRESS --pool web" in text
    assert "default, mail" in text
    text = refusal_of(site, lambda manager: manager.set_wishes(VM, Wishes(address=MAIL2)))
    assert "virt-ports pool add 203.0.113.9" in text
    text = refusal_of(site, lambda manager: manager.set_wishes(VM, Wishes(pool="default", address=MAIL)))
    assert "is in pool mail" in text
    with pytest.raises(InvalidRequest, match="a letter"):
        manager_of(site).pool.add_addresses([ExternalAddress(MAIL, (), "mail; reboot")], site.now)


def test_a_pool_in_the_xml_that_does_not_exist_leaves_a_vm_where_it_is_and_is_told() -> None:
    site = Site()
    site.start_vm(HOST1, VM, Wishes())
    site.run()
    list_again(site, VM, Wishes(pool="mial"))
    assert held(site) == [(EXTERNAL, "active")]
    assert "pool mial" in shown(site).leaving
    assert JournalEvent.MISPLACED in journal(site)
    resize(site, 1024)
    settle(site)
    assert held(site) == [(EXTERNAL, "active")], "it grows where it is"
    assert any(
        "Mial" in line or "mial" in line for line in explain_facts.explanation(manager_of(site), VM, site.now).lines
    )
    add(site, MAIL, "mial")
    turn(site)
    assert (MAIL, "active") in held(site)
    assert not shown(site).leaving
    turn(site, 70.0)
    assert JournalEvent.PLACED in journal(site)


def test_a_vm_that_starts_with_a_pool_that_does_not_exist_waits_for_it() -> None:
    site = Site()
    site.start_vm(HOST1, VM, Wishes(pool="mail"))
    site.run()
    assert held(site) == []
    assert (shown(site).state, "pool mail" in shown(site).problem) == ("waiting", True)
    started(site, OTHER)
    resize(site, 1024, OTHER)
    settle(site)
    assert not manager_of(site).sizer.contention_in("default").is_short(site.now), "nobody gives back for it"
    add(site, MAIL)
    site.run()
    assert held(site) == [(MAIL, "active")]


def test_a_vm_that_is_pinned_to_an_address_never_gets_ports_on_another() -> None:
    site = Site()
    add(site, MAIL, usable=FEW)
    add(site, MAIL2)
    started(site)
    wish(site, address=MAIL)
    assert (MAIL, "active") in held(site)
    resize(site, 4096)
    settle(site)
    assert {external for external, state in held(site) if state in ("active", "reserved")} == {MAIL}
    contention = manager_of(site).sizer.contention_in("mail")
    assert not contention.is_short(site.now), "others are not limited because of one address"


def test_a_vm_that_starts_pinned_to_a_full_address_waits_for_it() -> None:
    site = Site()
    add(site, MAIL, usable=PortRange(1024, 1024 + 255))
    add(site, MAIL2)
    site.start_vm(HOST1, OTHER, Wishes(address=MAIL))
    site.run()
    site.start_vm(HOST1, VM, Wishes(address=MAIL))
    site.run()
    assert held(site) == []
    site.start_vm(HOST1, THIRD, Wishes(pool="mail"))
    site.run()
    assert held(site, THIRD) == [(MAIL2, "active")]
    assert not manager_of(site).sizer.contention_in("mail").is_short(site.now)
    wish(site, OTHER, pool="mail")
    assert held(site, OTHER) == [(MAIL, "active")], "its XML takes precedence"
    site.stop_vm(OTHER)
    settle(site)
    turn(site, 130.0)
    turn(site)
    assert held(site) == [(MAIL, "active")]


def test_a_vm_for_which_its_pool_has_no_room_stays_and_others_give_back_for_it() -> None:
    site = Site(start_reserve=0.0)
    add(site, MAIL, usable=FEW)
    site.start_vm(HOST1, OTHER, Wishes(pool="mail"))
    site.run()
    resize(site, FEW.size, OTHER)
    settle(site)
    started(site)
    assert manager_of(site).fleet.space.free_ports("mail") < 64
    assert site.open(VM, 3) is not None
    wish(site, pool="mail")
    assert held(site) == [(EXTERNAL, "active")]
    assert "pool mail" in shown(site).leaving
    resize(site, 512)
    settle(site)
    assert held(site) == [(EXTERNAL, "active")]
    for _ in range(40):
        turn(site)
    assert held(site) == [(EXTERNAL, "draining"), (MAIL, "active")]
    site.check()


def test_an_address_that_goes_to_another_pool_is_left_by_vms_that_do_not_wish_it() -> None:
    site = Site()
    add(site, MAIL, "default")
    started(site)
    assert held(site) == [(EXTERNAL, "active")]
    assert site.open(VM, 0) is not None
    add(site, EXTERNAL, "mail")
    turn(site)
    assert held(site) == [(EXTERNAL, "draining"), (MAIL, "active")]
    site.check()


def test_an_address_is_emptied_by_putting_it_into_a_pool_that_nobody_wishes() -> None:
    site = Site()
    add(site, MAIL, "default")
    started(site)
    add(site, EXTERNAL, "leaving")
    turn(site)
    turn(site, site.settings.pool.hold_down_s)
    assert held(site) == [(MAIL, "active")]
    site.ask(lambda manager: manager.pool.remove_addresses([EXTERNAL]))
    assert not manager_of(site).fleet.space.has_address(EXTERNAL)
    site.check()


def test_a_shortage_of_one_pool_limits_nobody_in_another() -> None:
    site = Site()
    add(site, MAIL, usable=FEW)
    site.start_vm(HOST1, OTHER, Wishes(pool="mail"))
    site.run()
    started(site)
    resize(site, 2048, OTHER)
    settle(site, reports=0)
    sizer = manager_of(site).sizer
    assert sizer.contention_in("mail").is_short(site.now)
    assert not sizer.contention_in("default").is_short(site.now)
    resize(site, 2048)
    site.run()
    assert max(each.ports.size for each in manager_of(site).fleet.of(VM)) == 2048


def test_the_start_reserve_is_kept_in_each_pool() -> None:
    site = Site(start_reserve=0.25)
    add(site, MAIL, usable=FEW)
    site.start_vm(HOST1, OTHER, Wishes(pool="mail"))
    site.run()
    resize(site, 2048, OTHER)
    site.run()
    assert manager_of(site).fleet.space.free_ports("mail") >= FEW.size // 4


def test_a_migration_while_there_is_no_room_leaves_a_vm_in_its_pool() -> None:
    site = Site()
    add(site, MAIL, usable=PortRange(1024, 1024 + 63))
    site.start_vm(HOST1, OTHER, Wishes(pool="mail"))
    site.run()
    started(site)
    wish(site, pool="mail")
    assert held(site) == [(EXTERNAL, "active")]
    site.migrate(VM, HOST2)
    site.run()
    site.left(VM, HOST1)
    site.resume(VM, HOST2)
    settle(site)
    [active] = [each for each in manager_of(site).fleet.of(VM) if each.state is AllocationState.ACTIVE]
    assert (active.external, active.node) == (EXTERNAL, HOST2)


def test_forwards_stay_where_they_are_and_new_ones_are_where_the_vm_is() -> None:
    site = Site()
    add(site, MAIL)
    started(site)
    ssh = ForwardRequest(to=PortRange(22, 22), guest=IPv4Address("192.168.122.5"))
    smtp = dataclasses.replace(ssh, to=PortRange(25, 25), ports=PortRange(25, 25))
    mapped = dataclasses.replace(ssh, to=PortRange(4000, 4000), origin=ForwardOrigin.PCP, ends=site.now + 9999.0)
    site.ask(lambda manager: void(manager.forwards.add(manager.fleet.vms[VM], ssh, site.now)))
    wish(site, pool="mail")
    for each in (smtp, mapped):
        site.ask(lambda manager, each=each: void(manager.forwards.add(manager.fleet.vms[VM], each, site.now)))  # type: ignore[misc]
    forwards = {each.forward.to: each for each in manager_of(site).fleet.forwards_of(VM) if each.forward is not None}
    assert {to: each.external for to, each in forwards.items()} == {22: EXTERNAL, 25: MAIL, 4000: MAIL}
    settle(site)
    states = {each.ports.first: each.state.value for each in manager_of(site).fleet.forwards_of(VM)}
    assert (states[forwards[22].ports.first], states[25]) == ("active", "active")
    turn(site, 130.0)
    assert [external for external, _ in held(site)] == [MAIL], "the former range is free, the forward stays"


def test_pools_and_wishes_survive_a_restart_and_a_wish_is_followed_though_pairing_is_strict() -> None:
    site = Site()
    site.settings = structs.replace(site.settings, pool=structs.replace(site.settings.pool, pairing="strict"))
    site.crash_manager()
    site.heal()
    add(site, MAIL)
    started(site)
    wish(site, pool="mail")
    site.crash_manager()
    site.heal()
    assert manager_of(site).fleet.space.pool_of(MAIL) == "mail"
    assert (MAIL, "active") in held(site)
    assert held(site)[-1][0] == MAIL


def test_no_address_can_be_taken_away_from_a_pool_while_vms_have_ports_on_it() -> None:
    site = Site()
    add(site, MAIL)
    site.start_vm(HOST1, VM, Wishes(pool="mail"))
    site.run()
    with pytest.raises(Conflict):
        manager_of(site).pool.remove_addresses([MAIL])


def test_the_journal_tells_each_entry_with_the_pool_that_its_address_belonged_to_then() -> None:
    site = Site()
    add(site, MAIL)
    site.start_vm(HOST1, VM, Wishes(pool="mail"))
    site.run()
    add(site, MAIL, "web")
    resize(site, 512)
    settle(site)
    with site.ledger.reader() as reader:
        told = [(each.event, each.pool) for each in reader.history(VM)]
        owner = reader.whois(MAIL, 1024)
    assert told[:2] == [(JournalEvent.RESERVED, "mail"), (JournalEvent.ACTIVE, "mail")]
    assert (JournalEvent.RESERVED, "web") in told
    assert owner is not None
    assert owner.pool == "web"


def void(_: object) -> None:
    """Forget a result."""
