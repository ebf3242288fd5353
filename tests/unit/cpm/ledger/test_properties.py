"""Random changes, compared with a simple model: a dictionary of ports."""

import dataclasses
import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cpm.core.changes import AddAllocation, Change, FreeAllocation, MoveAllocation, PutAddress, PutNode, PutVM
from cpm.core.journal import JournalEntry, PortOwner, Selection
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import Conflict, Overloading
from cpm.protocol.ledger_errors import JournalNotKept
from cpm.protocol.model import Allocation, AllocationId, AllocationState, DomainUUID, NodeName, PortRange
from tests.unit.cpm.ledger import words
from tests.unit.cpm.ledger.words import A, B, external, node, vm

FIRST, LAST = 1024, 1055
"""All ranges lie here, so that they meet."""
RESERVED = PortRange(1040, 1041)
HOSTS = ("host1", "host2")
Owner = tuple[str, str, AllocationState, PortRange]


class Ledger(RuleBasedStateMachine):
    """Every batch is predicted: accepted, or refused without a trace."""

    domains = st.sampled_from("xyz")
    addresses = st.sampled_from([A, B])
    ranges = st.tuples(st.integers(FIRST, LAST), st.integers(0, 12)).map(
        lambda it: PortRange(it[0], min(it[0] + it[1], LAST))
    )
    states = st.sampled_from(AllocationState)
    picks = st.integers(0, 1000)

    @initialize()
    def start(self) -> None:
        self.ledger = SqliteLedger(":memory:")
        self.vms = {name: vm(name) for name in "xyz"}
        self.held: dict[AllocationId, Allocation] = {}
        self.ids = 0
        self.now = 0.0
        self.past: list[tuple[float, dict[tuple[IPv4Address, int], Owner]]] = [(0.0, {})]
        setup: list[Change] = [PutNode(node(name)) for name in HOSTS]
        setup += [PutAddress(external(A, str(RESERVED))), PutAddress(external(B))]
        self.ledger.commit([*setup, *(PutVM(each) for each in self.vms.values())], self.now)

        self.folder = tempfile.TemporaryDirectory()
        self.kept_since = 0.0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def _allowed(self, after: dict[AllocationId, Allocation]) -> bool:
        everything = list(after.values())
        for index, one in enumerate(everything):
            if one.external == A and one.ports.overlaps(RESERVED):
                return False
            for other in everything[:index]:
                same_place = one.external == other.external or one.domain == other.domain
                if same_place and one.ports.overlaps(other.ports):
                    return False
        return True

    def _single(self, after: dict[AllocationId, Allocation]) -> bool:
        for state in (AllocationState.ACTIVE, AllocationState.RESERVED):
            owners = [each.domain for each in after.values() if each.state is state]
            if len(owners) != len(set(owners)):
                return False
        return True

    def _commit(self, changes: Sequence[Change], stages: Sequence[dict[AllocationId, Allocation]]) -> None:
        """Stages: what is held after each of the changes; each must be right by itself."""
        self.now += 1.0
        before, seq = self.ledger.load(), self.ledger.reader().latest_seq()
        if all(self._allowed(stage) and self._single(stage) for stage in stages):
            self.ledger.commit(changes, self.now)
            self.held = stages[-1]
            self._remember()
            return
        single = all(self._single(stage) for stage in stages)
        with pytest.raises(Overloading if single else Conflict):
            self.ledger.commit(changes, self.now)
        assert (self.ledger.load(), self.ledger.reader().latest_seq()) == (before, seq)

    def _remember(self) -> None:
        owners = {
            (each.external, port): (str(each.domain), str(each.node), each.state, each.ports)
            for each in self.held.values()
            for port in each.ports
        }
        self.past.append((self.now, owners))

    @rule(domain=domains, address=addresses, ports=ranges, state=states)
    def add(self, domain: str, address: IPv4Address, ports: PortRange, state: AllocationState) -> None:
        number = AllocationId(self.ids + 1)
        new = Allocation(number, DomainUUID(domain), self.vms[domain].node, address, ports, state, self.now)
        self._commit([AddAllocation(new)], [self.held | {number: new}])
        self.ids += number in self.held

    @rule(pick=picks, ports=ranges, state=states, host=st.sampled_from([None, *HOSTS]))
    def move(self, pick: int, ports: PortRange, state: AllocationState, host: str | None) -> None:
        for old in self._picked(pick):
            new = dataclasses.replace(
                old, ports=ports, state=state, since=self.now, node=NodeName(host) if host else old.node
            )
            change = MoveAllocation(
                old.id, (old.ports, old.state), ports, state, self.now, NodeName(host) if host else None
            )
            self._commit([change], [self.held | {old.id: new}])

    @rule(pick=picks, at=st.integers(1, 12), state=states)
    def split(self, pick: int, at: int, state: AllocationState) -> None:
        for old in self._picked(pick):
            if at >= old.ports.size:
                continue
            head = dataclasses.replace(old, ports=PortRange(old.ports.first, old.ports.first + at - 1), since=self.now)
            number = AllocationId(self.ids + 1)
            tail = dataclasses.replace(
                old, id=number, ports=PortRange(head.ports.last + 1, old.ports.last), state=state, since=self.now
            )
            trim = MoveAllocation(old.id, (old.ports, old.state), head.ports, head.state, self.now)
            trimmed = self.held | {old.id: head}
            self._commit([trim, AddAllocation(tail)], [trimmed, trimmed | {number: tail}])
            self.ids += number in self.held

    @rule(pick=picks)
    def free(self, pick: int) -> None:
        for old in self._picked(pick):
            after = {number: each for number, each in self.held.items() if number != old.id}
            self._commit([FreeAllocation(old.id, (old.ports, old.state))], [after])

    @rule(domain=domains, name=st.sampled_from("pqr"))
    def rename(self, domain: str, name: str) -> None:
        self.vms[domain] = dataclasses.replace(self.vms[domain], name=name)
        self._commit([PutVM(self.vms[domain])], [self.held])

    @rule()
    def reserve_what_is_held(self) -> None:
        on_b = [each.ports for each in self.held.values() if each.external == B]
        if on_b:
            before = self.ledger.load()
            with pytest.raises(Overloading):
                self.ledger.commit([PutAddress(external(B, str(on_b[0])))], self.now)
            assert self.ledger.load() == before

    def _picked(self, pick: int) -> list[Allocation]:
        return [list(self.held.values())[pick % len(self.held)]] if self.held else []

    @rule(entries=st.integers(1, 6), age=st.integers(0, 10))
    def pack(self, entries: int, age: int) -> None:
        before = self._journal()
        reader = self.ledger.reader()
        while (packing := reader.next_packing(self.now - age, entries)) is not None:
            self.ledger.pack(packing)
            assert self._journal() == before

    @rule(age=st.integers(0, 10))
    def give_up(self, age: int) -> None:
        before, reader = set(self.ledger.reader().events(limit=100_000)), self.ledger.reader()
        plans = reader.export_old(self.now - age, Path(self.folder.name))
        for plan in plans:
            self.ledger.give_up(plan)
            self.kept_since = max(self.kept_since, plan.last_at)
        gone = before - set(reader.events(limit=100_000))
        assert {entry.seq for entry in gone} <= {line["seq"] for line in self._exported()}
        assert all(entry.at.seconds <= self.kept_since < self.now - age for entry in gone)

    def _journal(self) -> tuple[object, ...]:
        reader, every = self.ledger.reader(), list[JournalEntry]()
        while some := reader.events(every[-1].seq if every else 0, limit=7):
            every += some
        assert every == reader.events(limit=100_000)
        for selection in _selections(every):
            fitting = [entry for entry in every if selection.has(entry)]
            assert reader.newest(1000, selection) == fitting
            assert reader.newest(3, selection) == fitting[-3:]
            assert reader.history("x", 3, selection) == [e for e in reader.history("x") if selection.has(e)][-3:]
        return every, [reader.history(vm, limit) for vm in "xyzpqr" for limit in (3, 1000)]

    def _exported(self) -> list[dict[str, object]]:
        texts = (gzip.decompress(path.read_bytes()) for path in Path(self.folder.name).iterdir())
        return [json.loads(line) for text in texts for line in text.splitlines()]

    @rule(back=st.integers(0, 30), address=addresses, half=st.booleans())
    def whois(self, back: int, address: IPv4Address, half: bool) -> None:
        at, owners = self.past[max(len(self.past) - 1 - back, 0)]
        for port in range(FIRST, LAST + 1):
            asked = at + 0.5 if half else at
            try:
                found = self.ledger.reader().whois(address, port, words.at(asked))
            except JournalNotKept:
                assert asked < self.kept_since
            else:
                assert _owner(found) == owners.get((address, port))

    @invariant()
    def ledger_is_the_model(self) -> None:
        if not hasattr(self, "ledger"):
            return
        state = self.ledger.load()
        assert {each.id: each for each in state.allocations} == self.held
        assert {str(each.uuid): each for each in state.vms} == self.vms
        assert state.next_allocation_id > max(self.held, default=0)

    @invariant()
    def journal_knows_the_present(self) -> None:
        if not hasattr(self, "ledger"):
            return
        owners = self.past[-1][1]
        for address in (A, B):
            for port in range(FIRST, LAST + 1, 3):
                assert _owner(self.ledger.reader().whois(address, port)) == owners.get((address, port))


def _selections(every: Sequence[JournalEntry]) -> Iterator[Selection]:
    """Yield selections of a journal's entries that have some of them, where it has any."""
    yield Selection()
    if every:
        some = every[len(every) // 2]
        yield Selection(before=some.seq)
        yield Selection(begin=some.at, fits=lambda entry: entry.event is some.event)
        yield Selection(end=some.at, fits=lambda entry: entry.domain == some.domain)


def _owner(holding: PortOwner | None) -> Owner | None:
    if holding is None:
        return None
    return str(holding.domain), str(holding.node), holding.state, holding.ports


TestLedger = Ledger.TestCase
Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
