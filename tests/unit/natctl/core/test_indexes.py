from __future__ import annotations

from cpm.protocol.model import DomainUUID
from natctl.core.indexes import FORGOTTEN_S, Indexes

A, B, C, D = (DomainUUID(f"00000000-0000-4000-8000-00000000000{number}") for number in range(4))


def test_vms_get_the_lowest_indexes_and_keep_them() -> None:
    indexes = Indexes(7)
    assert [indexes.assign(vm) for vm in (A, B, A)] == [1, 2, 1]
    assert indexes.owners == {1: A, 2: B}
    assert (indexes.get(A), indexes.get(C)) == (1, None)


def test_an_index_found_in_the_kernel_is_nobody_elses() -> None:
    indexes = Indexes(7)
    indexes.adopt(A, 1)
    assert [indexes.assign(vm) for vm in (B, A)] == [2, 1]


def test_a_vm_that_is_back_has_its_index_again() -> None:
    indexes = Indexes(7)
    indexes.assign(A)
    indexes.keep(A)
    assert (indexes.get(A), indexes.owners) == (None, {})
    assert [indexes.assign(vm) for vm in (B, A)] == [2, 1]


def test_an_index_is_given_on_when_connections_have_been_deleted() -> None:
    indexes = Indexes(7)
    indexes.assign(A)
    indexes.keep(A)
    indexes.on_freed(A, 100.0)
    indexes.on_tick(100.0 + FORGOTTEN_S / 2)
    assert indexes.assign(B) == 2
    indexes.on_tick(100.0 + FORGOTTEN_S)
    assert indexes.assign(C) == 1


def test_a_vm_that_is_back_in_time_does_not_lose_its_index_when_it_goes_again() -> None:
    indexes = Indexes(7)
    indexes.assign(A)
    indexes.keep(A)
    indexes.on_freed(A, 100.0)
    indexes.assign(A)
    indexes.keep(A)
    indexes.on_tick(100.0 + FORGOTTEN_S)
    assert indexes.assign(B) == 2


def test_when_all_are_in_use_or_kept_the_one_kept_for_longest_is_given_on() -> None:
    indexes = Indexes(2)
    for vm in (A, B):
        indexes.assign(vm)
        indexes.keep(vm)
    assert [indexes.assign(vm) for vm in (C, A)] == [1, 2]
    assert indexes.assign(D) is None
    assert indexes.owners == {1: C, 2: A}
