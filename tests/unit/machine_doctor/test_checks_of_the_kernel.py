from __future__ import annotations

import pytest

from machine_doctor.facts import Unread
from machine_doctor.findings import Result
from tests.unit.machine_doctor.healthy import FACTS, OPTIONS, but
from tests.unit.machine_doctor.judging import Case, assert_found, finding

PROBLEM, WARNING = Result.PROBLEM, Result.WARNING


def without(*names: str) -> dict[str, str]:
    return {name: "y" for name in OPTIONS if name not in names}


AS_MODULES = dict.fromkeys(OPTIONS, "m")

CASES = [
    Case("kernel-version", but(kernel__release="5.15.0-91-generic"), WARNING, "older than 6.1", "later kernel"),
    Case("kernel-features", but(kernel__options=without("NFT_CONNLIMIT", "TUN")), PROBLEM,
         "CONFIG_NFT_CONNLIMIT, CONFIG_TUN", "standard kernel"),
    Case("kernel-features", but(kernel__options=without("NFT_QUEUE")), WARNING, "CONFIG_NFT_QUEUE", "standard kernel"),
    Case("kernel-modules", but(kernel__options={**AS_MODULES, "NF_TABLES": "y"}, kernel__loaded=frozenset({"nft_ct"}),
                               kernel__modules=frozenset()), PROBLEM, "/lib/modules/6.1.0-28-amd64", "reboot"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trouble_is_found(case: Case) -> None:
    assert_found(case)


@pytest.mark.parametrize("release", ["6.1.0-28-amd64", "6.12.5", "7.0-rc1", "10.0"])
def test_later_kernels_are_fine(release: str) -> None:
    assert finding("kernel-version", but(kernel__release=release)).result is Result.OK


def test_a_release_that_is_no_version_cannot_be_judged() -> None:
    assert finding("kernel-version", but(kernel__release="custom")).result is Result.COULD_NOT_TELL


def test_the_extension_is_enough_for_queues() -> None:
    facts = but(kernel__options={**without("NFT_QUEUE"), "NETFILTER_XT_TARGET_NFQUEUE": "m"})
    assert finding("kernel-features", facts).result is Result.OK


def test_a_module_on_disk_or_loaded_is_there() -> None:
    there = frozenset({"nf_tables", "nft_ct", "bridge", "tun"})
    on_disk = but(kernel__options={"NFT_CT": "m", "BRIDGE": "m"}, kernel__modules=there)
    loaded = but(kernel__options={"NFT_CT": "m", "BRIDGE": "m"}, kernel__modules=frozenset(), kernel__loaded=there)
    assert finding("kernel-modules", on_disk).facts["not loaded"] == ["bridge", "nft_ct"]
    assert finding("kernel-modules", on_disk).result is finding("kernel-modules", loaded).result is Result.OK


def test_without_the_options_nothing_is_said() -> None:
    facts = but(FACTS, kernel__options=Unread("neither here nor there"))
    for name in ("kernel-features", "kernel-modules"):
        found = finding(name, facts)
        assert (found.result, found.reason) == (Result.COULD_NOT_TELL, "neither here nor there")
