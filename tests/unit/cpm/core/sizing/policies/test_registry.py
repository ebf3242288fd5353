"""A policy is one module and one line: once registered it can be used everywhere, and no other file names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cpm
from cpm import settings
from cpm.cli import main
from cpm.core.sizing import Demand, Memory, policies
from cpm.core.sizing.policies import REGISTERED, Registration, default_policy, register, registrations, registry
from cpm.core.wishes import EffectiveValue, Origin
from cpm.protocol.errors import ConfigError
from cpm.protocol.model import DomainUUID, NodeName, Wishes
from cpm.simulation import contenders
from tests.fakes.site import Site

TOY = "toy"
ONE, HOST1 = DomainUUID("00000000-0000-0000-0000-000000000001"), NodeName("host1")


class ToyPolicy:
    """Every VM gets 640 ports."""

    name = TOY
    counts_ports = True

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        return 640, None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register(Registration(ToyPolicy(), "640 ports for every VM", short="t"))
    return TOY


def test_the_settings_accept_a_registered_policy(toy: str, tmp_path: Path) -> None:
    file = tmp_path / "cpmd.toml"
    for name in (toy, "t"):
        file.write_text(f'[scaling]\npolicy = "{name}"\n')
        assert settings.load(file).scaling.policy == name
    file.write_text('[scaling]\npolicy = "nothing"\n')
    with pytest.raises(ConfigError, match=f"use .*, {toy}"):
        settings.load(file)


def test_a_registered_policy_can_be_set_and_then_decides(toy: str) -> None:
    site = Site()
    site.start_vm(HOST1, ONE)
    site.run()
    site.ask(lambda manager: manager.set_wishes(ONE, Wishes(policy=toy)))
    assert site.manager is not None
    assert site.manager.wishes(site.manager.fleet.vms[ONE]).policy == EffectiveValue(toy, Origin.SET)
    site.report(HOST1, busy=False)
    site.run()
    decision = site.manager.sizer.observed[ONE].decision
    assert decision is not None
    assert (decision.asked, decision.target, decision.rule) == (640, 640, toy)


@pytest.mark.parametrize("verb", ["set", "simulate"])
def test_the_help_lists_a_registered_policy(toy: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.execute([verb, "--help"], now=0.0)
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r" +toy \(or t\) +640 ports for every VM", line) for line in lines)
    for each in registrations():
        assert any(each.policy.name in line and each.summary in line for line in lines)
    assert all(len(line) <= 80 for line in lines if any(each.summary in line for each in registrations()))


def test_the_simulation_replays_a_registered_policy(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy in contenders()
    words = ["simulate", "--generate", "steady", "--vms", "2", "--seconds", "30", "--no-packing", "--policy", toy]
    assert main.execute(words, now=0.0) == 0
    assert toy in capsys.readouterr().out


def test_no_name_is_registered_twice(toy: str) -> None:
    for registration in (Registration(ToyPolicy(), "again"), REGISTERED[0]):
        with pytest.raises(ValueError, match="already"):
            register(registration)


def test_the_first_is_the_default() -> None:
    assert default_policy() == policies()[0] == REGISTERED[0].policy.name


def test_no_other_product_file_names_a_policy() -> None:
    # "specification" is also a word of the language.
    names = re.compile(rf"\b({'|'.join(name for name in policies() if name != 'specification')})\b")
    root = Path(cpm.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file.parent == root / "core" / "sizing" / "policies":
            continue
        lines = [line for line in file.read_text().splitlines() if not line.startswith(("from ", "import "))]
        assert not names.search("\n".join(lines)), file
