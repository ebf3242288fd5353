from __future__ import annotations

from cpm.protocol.model import DomainUUID, PortRange
from natctl.core.signal_times import SignalTimes

VM = DomainUUID("00000000-0000-4000-8000-000000000001")
BEFORE, AFTER = PortRange(1024, 1279), PortRange(1024, 1535)


def test_the_time_runs_from_the_signal_to_the_new_ports() -> None:
    times = SignalTimes()
    times.on_signal(VM, 10.0)
    times.on_asked(VM, BEFORE, 10.25)
    times.on_programmed(VM, BEFORE, 10.5)
    assert times.histogram.count == 0, "another budget, and the same ports"
    times.on_asked(VM, BEFORE, 11.5)
    times.on_programmed(VM, AFTER, 12.0)
    assert (times.histogram.count, times.histogram.sum_s) == (1, 2.0)
    times.on_programmed(VM, BEFORE, 13.0)
    assert times.histogram.count == 1


def test_an_old_signal_is_not_what_a_request_follows_from() -> None:
    times = SignalTimes()
    times.on_signal(VM, 10.0)
    times.on_asked(VM, BEFORE, 100.0)
    times.on_programmed(VM, AFTER, 100.5)
    assert times.histogram.sum_s == 0.5


def test_a_request_that_was_turned_down_or_whose_vm_is_gone_is_not_counted() -> None:
    times = SignalTimes()
    for end in (times.on_turned_down, times.forget):
        times.on_asked(VM, BEFORE, 1.0)
        end(VM)
        times.on_programmed(VM, AFTER, 2.0)
    assert times.histogram.count == 0
