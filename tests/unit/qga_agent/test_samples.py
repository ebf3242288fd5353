from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cpm.protocol.model import DomainUUID
from qga_agent.samples import DESCRIPTIONS, InterfaceCounters, Kind, Rates, Sampler, rates

ONE, TWO = DomainUUID("11111111-1111-1111-1111-111111111111"), DomainUUID("22222222-2222-2222-2222-222222222222")

figures = st.integers(0, 2**64 - 1)
readings = st.builds(InterfaceCounters, figures, figures, figures, figures)
periods = st.floats(-1e6, 1e6, allow_nan=False)


def counters(packets: int, size: int = 1000) -> InterfaceCounters:
    """As many packets both ways, half of them sent."""
    return InterfaceCounters(packets // 2, packets // 2 * size, packets - packets // 2, (packets - packets // 2) * size)


@given(readings, readings, periods)
def test_rates_are_never_negative(before: InterfaceCounters, after: InterfaceCounters, elapsed_s: float) -> None:
    found = rates(before, after, elapsed_s)
    if found is not None:
        assert found.packets_per_s >= 0
        assert found.megabits_per_s >= 0


@given(readings, readings, st.floats(1e-3, 1e6))
def test_rates_exist_exactly_when_no_counter_decreased(
    before: InterfaceCounters, after: InterfaceCounters, elapsed_s: float
) -> None:
    pairs = zip(dataclasses.astuple(before), dataclasses.astuple(after), strict=True)
    went_back = any(later < earlier for earlier, later in pairs)
    assert (rates(before, after, elapsed_s) is None) == went_back


@given(readings, readings, st.floats(-1e6, 0))
def test_two_readings_at_one_time_have_no_rates(
    before: InterfaceCounters, after: InterfaceCounters, elapsed_s: float
) -> None:
    assert rates(before, after, elapsed_s) is None


def test_both_directions_count_and_a_megabit_is_ten_to_the_sixth() -> None:
    before = InterfaceCounters(rx_packets=10, rx_bytes=1_000, tx_packets=20, tx_bytes=2_000)
    after = InterfaceCounters(rx_packets=110, rx_bytes=126_000, tx_packets=220, tx_bytes=127_000)
    assert rates(before, after, 2.0) == Rates(packets_per_s=150.0, megabits_per_s=1.0)


def test_the_first_reading_of_a_vm_gives_no_rates() -> None:
    sampler = Sampler()
    assert sampler.sample(10.0, {"vnet0": counters(10**9)}, {ONE: ["vnet0"]}) == {}
    assert sampler.sample(11.0, {"vnet0": counters(10**9 + 50)}, {ONE: ["vnet0"]})[ONE].packets_per_s == 50


def test_the_rates_of_a_vm_are_the_sum_of_its_interfaces() -> None:
    sampler = Sampler()
    taps = {ONE: ["vnet0", "vnet1"], TWO: ["vnet2"]}
    sampler.sample(0.0, {"vnet0": counters(0), "vnet1": counters(0), "vnet2": counters(0)}, taps)
    found = sampler.sample(1.0, {"vnet0": counters(100), "vnet1": counters(20), "vnet2": counters(3)}, taps)
    assert {uuid: each.packets_per_s for uuid, each in found.items()} == {ONE: 120, TWO: 3}


def test_an_interface_plugged_in_later_counts_from_its_second_reading() -> None:
    sampler = Sampler()
    sampler.sample(0.0, {"vnet0": counters(0)}, {ONE: ["vnet0"]})
    both = {ONE: ["vnet0", "vnet1"]}
    assert sampler.sample(1.0, {"vnet0": counters(10), "vnet1": counters(9999)}, both)[ONE].packets_per_s == 10
    assert sampler.sample(2.0, {"vnet0": counters(20), "vnet1": counters(10005)}, both)[ONE].packets_per_s == 16


def test_a_vm_that_starts_anew_is_unknown_for_one_period() -> None:
    sampler = Sampler()
    sampler.sample(0.0, {"vnet0": counters(5000)}, {ONE: ["vnet0"]})
    assert sampler.sample(1.0, {"vnet0": counters(70)}, {ONE: ["vnet0"]}) == {}
    assert sampler.sample(2.0, {"vnet0": counters(170)}, {ONE: ["vnet0"]})[ONE].packets_per_s == 100


def test_the_next_owner_of_a_tap_name_does_not_inherit_its_counters() -> None:
    sampler = Sampler()
    sampler.sample(0.0, {"vnet0": counters(10)}, {ONE: ["vnet0"]})
    assert sampler.sample(1.0, {"vnet0": counters(1_000_000)}, {TWO: ["vnet0"]}) == {}
    assert sampler.sample(2.0, {"vnet0": counters(1_000_001)}, {ONE: ["vnet0"]}) == {}


def test_the_reading_after_a_missing_one_covers_both_periods() -> None:
    sampler = Sampler()
    sampler.sample(0.0, {"vnet0": counters(0)}, {ONE: ["vnet0"]})
    assert sampler.sample(1.0, {}, {ONE: ["vnet0"]}) == {}
    assert sampler.sample(2.0, {"vnet0": counters(100)}, {ONE: ["vnet0"]})[ONE].packets_per_s == 50


def test_a_reading_out_of_order_is_ignored() -> None:
    sampler = Sampler()
    sampler.sample(5.0, {"vnet0": counters(0)}, {ONE: ["vnet0"]})
    assert sampler.sample(5.0, {"vnet0": counters(100)}, {ONE: ["vnet0"]}) == {}
    assert sampler.sample(4.0, {"vnet0": counters(100)}, {ONE: ["vnet0"]}) == {}
    assert sampler.sample(6.0, {"vnet0": counters(100)}, {ONE: ["vnet0"]})[ONE].packets_per_s == 100


def test_an_idle_vm_has_rates_of_zero() -> None:
    sampler = Sampler()
    sampler.sample(0.0, {"vnet0": counters(7)}, {ONE: ["vnet0"]})
    assert sampler.sample(1.0, {"vnet0": counters(7)}, {ONE: ["vnet0"]}) == {ONE: Rates(0.0, 0.0)}


class SamplerAgainstBookkeeping(RuleBasedStateMachine):
    """Under any traffic, restarts, gaps and clocks: never more packets reported than passed, never a negative rate."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampler()
        self.now = 0.0
        self.read_at = 0.0
        self.counter = 0
        self.passed = 0
        self.reported = 0.0

    @rule(packets=st.integers(0, 10_000))
    def traffic(self, packets: int) -> None:
        self.counter += packets
        self.passed += packets

    @rule()
    def restart(self) -> None:
        self.counter = 0

    @rule(elapsed_s=st.integers(-3, 10), readable=st.booleans())
    def read(self, elapsed_s: int, readable: bool) -> None:
        self.now += elapsed_s
        seen = {"vnet0": counters(self.counter)} if readable else {}
        for each in self.sampler.sample(self.now, seen, {ONE: ["vnet0"]}).values():
            assert each.packets_per_s >= 0
            self.reported += each.packets_per_s * (self.now - self.read_at)
        if readable and self.now > self.read_at:
            self.read_at = self.now

    @invariant()
    def no_packet_is_counted_twice(self) -> None:
        assert self.reported <= self.passed * (1 + 1e-9) + 1e-6


TestSamplerAgainstBookkeeping = SamplerAgainstBookkeeping.TestCase


def test_every_figure_is_described_with_unit_and_kind() -> None:
    fields = [field.name for kind in (InterfaceCounters, Rates) for field in dataclasses.fields(kind)]
    assert [each.name for each in DESCRIPTIONS] == fields
    assert {each.name for each in DESCRIPTIONS if each.kind is Kind.GAUGE} == {"packets_per_s", "megabits_per_s"}
    assert all(each.unit and each.help for each in DESCRIPTIONS)
