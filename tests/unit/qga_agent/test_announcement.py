from __future__ import annotations

import json
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from qga_agent import announcement
from qga_agent.announcement import DEFAULT_PATH, FILE_BYTES, LOCAL_PORT_RANGE, Announcement
from qga_agent.guest_agent import AgentSilent, InvalidReply
from tests.fakes.guest import FakeGuest

SMALL = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20255))
LARGE = Announcement(IPv4Address("203.0.113.254"), PortRange(40000, 65535), local_port_range=True)
WRITES = {"guest-file-write", "guest-file-flush"}


async def test_the_file_has_address_and_ports(guest: FakeGuest) -> None:
    assert await announcement.announce(guest, SMALL) == ()
    assert json.loads(guest.files[DEFAULT_PATH]) == {
        "version": 1, "external_address": "203.0.113.1", "first_port": 20000, "last_port": 20255,
    }  # fmt: skip
    assert guest.files[LOCAL_PORT_RANGE] == b"32768\t60999\n"
    assert guest.open_files == 0


async def test_what_the_guest_has_is_not_written_again(guest: FakeGuest) -> None:
    await announcement.announce(guest, LARGE)
    guest.asked.clear()
    assert await announcement.announce(guest, LARGE) == ()
    assert not WRITES & set(guest.asked)


async def test_after_a_resize_the_file_is_overwritten_in_place_by_one_write(guest: FakeGuest) -> None:
    await announcement.announce(guest, SMALL)
    guest.asked.clear()
    guest.contents.clear()
    await announcement.announce(guest, LARGE)
    before, after = announcement.file_content(SMALL), announcement.file_content(LARGE)
    assert guest.contents[DEFAULT_PATH] == [before, after], "opening it for writing does not empty it"
    assert guest.asked.count("guest-file-write") == 2  # the file, the sysctl
    assert guest.files[DEFAULT_PATH] == after
    assert guest.files[LOCAL_PORT_RANGE] == b"40000\t65535\n"


@pytest.mark.parametrize("there", [b"", b"somebody else's", b"x" * FILE_BYTES, b"y" * 5000])
async def test_whatever_was_there_is_replaced_entirely(guest: FakeGuest, there: bytes) -> None:
    guest.files[DEFAULT_PATH] = there
    assert await announcement.announce(guest, SMALL) == ()
    assert guest.files[DEFAULT_PATH] == announcement.file_content(SMALL)


def test_the_file_has_the_same_length_for_the_longest_and_the_shortest() -> None:
    shortest = Announcement(IPv4Address("1.1.1.1"), PortRange(1024, 1025))
    longest = Announcement(IPv4Address("203.113.113.113"), PortRange(10000, 65535))
    assert {len(announcement.file_content(each)) for each in (shortest, longest)} == {FILE_BYTES}


async def test_without_a_path_no_file_is_written(guest: FakeGuest) -> None:
    await announcement.announce(guest, SMALL, "")
    assert DEFAULT_PATH not in guest.files


async def test_a_range_that_the_guests_kernel_refuses_is_a_refusal(guest: FakeGuest) -> None:
    low = Announcement(SMALL.external, PortRange(900, 1000), local_port_range=True)
    (refusal,) = await announcement.announce(guest, low)
    assert "Invalid argument" in refusal
    assert guest.files[DEFAULT_PATH] == announcement.file_content(low)


async def test_an_agent_that_may_not_open_files_refuses_each_part(guest: FakeGuest) -> None:
    guest.disabled = {"guest-file-open"}
    assert await announcement.announce(guest, LARGE) == ("Command guest-file-open has been disabled",) * 2


async def test_silence_and_invalid_replies_are_raised(guest: FakeGuest) -> None:
    guest.frozen = True
    with pytest.raises(AgentSilent):
        await announcement.announce(guest, SMALL)
    guest.frozen = False
    guest.override["guest-file-write"] = {"count": 10**9}
    with pytest.raises(InvalidReply):
        await announcement.announce(guest, SMALL)


@pytest.mark.parametrize(
    ("said", "default", "holds"),
    [("yes", False, True), ("no", True, False), (" yes ", False, True), (None, True, True), ("perhaps", False, False)],
)
def test_the_vms_metadata_overrides_the_hosts_default(said: str | None, default: bool, holds: bool) -> None:
    assert announcement.wants_local_port_range(said, default=default) is holds
