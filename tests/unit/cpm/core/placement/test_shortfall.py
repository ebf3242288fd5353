"""The sentence for each obstacle, which operators, hooks and ``explain`` show."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.core.placement.shortfall import NoRoom, NoRoomError, Obstacle

A = IPv4Address("203.0.113.1")
SENTENCES = {
    NoRoom(64, 0, Obstacle.NO_ADDRESS): "no external address in the pool",
    NoRoom(64, 0, Obstacle.ADDRESS_GONE): "its address is gone",
    NoRoom(64, 0, Obstacle.NO_SUCH_POOL, wish="pool mail has no address"): "pool mail has no address",
    NoRoom(64, 8, Obstacle.NO_FREE_RUN, 1, A): "203.0.113.1 has no free run that long",
    NoRoom(64, 8, Obstacle.NO_FREE_RUN, 3, A): "the 3 addresses have no free run that long",
    NoRoom(64, 8, Obstacle.OWN_NUMBERS, 2, A): "the VM's own draining ports have these numbers on another address",
    NoRoom(64, 8, Obstacle.KEPT_FOR_STARTS): "the other free ports are kept for VMs that start",
    NoRoom(64, 8, Obstacle.AT_CAP): "its draining and held ports count towards its cap",
}


def test_every_obstacle_has_a_sentence() -> None:
    assert {no_room.obstacle for no_room in SENTENCES} == set(Obstacle)


@pytest.mark.parametrize(("no_room", "sentence"), SENTENCES.items())
def test_the_error_says_what_the_obstacle_is(no_room: NoRoom, sentence: str) -> None:
    error = NoRoomError(no_room)
    assert (error.wanted, error.longest_free, error.reason) == (64, no_room.longest_free, sentence)
