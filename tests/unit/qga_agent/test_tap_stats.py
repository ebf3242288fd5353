from __future__ import annotations

import pytest

from cpm.protocol.errors import Unreachable
from qga_agent.samples import InterfaceCounters
from qga_agent.tap_stats import LIBVIRT_MAX_VMS, Source, TapReader, first_source, read_taps

KNOWN = {"vnet0": InterfaceCounters(1, 2, 3, 4), "vnet9": InterfaceCounters(5, 6, 7, 8)}


async def libvirt() -> dict[str, InterfaceCounters]:
    return KNOWN


async def unreachable() -> dict[str, InterfaceCounters]:
    raise Unreachable("qemu:///system", "gone", "wait")


async def hung() -> dict[str, InterfaceCounters]:
    raise TimeoutError


async def must_not_be_called() -> dict[str, InterfaceCounters]:
    pytest.fail("libvirt was asked")


def test_a_configured_source_is_used_for_any_number_of_vms() -> None:
    assert first_source(Source.LIBVIRT, 10_000) is Source.LIBVIRT
    assert first_source(Source.PSUTIL, 1) is Source.PSUTIL


def test_auto_asks_libvirt_up_to_the_limit() -> None:
    assert first_source(Source.AUTO, 0) is Source.LIBVIRT
    assert first_source(Source.AUTO, LIBVIRT_MAX_VMS) is Source.LIBVIRT
    assert first_source(Source.AUTO, LIBVIRT_MAX_VMS + 1) is Source.PSUTIL


def test_an_interface_that_does_not_exist_is_left_out() -> None:
    assert set(read_taps(["lo", "vp-nonexistent"])) == {"lo"}


async def test_auto_reads_from_the_kernel_what_libvirt_does_not_know() -> None:
    found = await TapReader(Source.AUTO, libvirt).read(["vnet0", "lo", "vp-nonexistent"], vms=2)
    assert found["vnet0"] == KNOWN["vnet0"]
    assert set(found) == {"vnet0", "lo"}


async def test_libvirt_alone_leaves_out_what_it_does_not_know() -> None:
    assert set(await TapReader(Source.LIBVIRT, libvirt).read(["vnet0", "lo"], vms=2)) == {"vnet0"}


@pytest.mark.parametrize("broken", [unreachable, hung, None])
async def test_auto_does_without_libvirt(broken: object) -> None:
    reader = TapReader(Source.AUTO, broken)  # type: ignore[arg-type] # one of the three above
    assert set(await reader.read(["lo"], vms=1)) == {"lo"}


@pytest.mark.parametrize(("broken", "error"), [(unreachable, Unreachable), (hung, TimeoutError), (None, Unreachable)])
async def test_a_configured_libvirt_that_does_not_answer_is_an_error(broken: object, error: type[Exception]) -> None:
    reader = TapReader(Source.LIBVIRT, broken)  # type: ignore[arg-type] # one of the three above
    with pytest.raises(error):
        await reader.read(["lo"], vms=1)


async def test_with_more_vms_than_the_limit_libvirt_is_not_asked() -> None:
    assert set(await TapReader(Source.AUTO, must_not_be_called).read(["lo"], vms=101)) == {"lo"}
