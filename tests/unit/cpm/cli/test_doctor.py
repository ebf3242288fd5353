"""What ``virt-ports doctor`` and ``virt-ports report`` print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cpm.cli import main
from machine_doctor import bundle, checks, examination
from machine_doctor.bundle import Member
from machine_doctor.facts import ClockFacts, Facts, FilterFacts, ForwardChain, Unread
from tests.unit.cpm.cli.conftest import Command
from tests.unit.machine_doctor.healthy import FACTS, but

DOCKER = ForwardChain("ip", "filter", "FORWARD", "policy drop", frozenset({"docker0"}))
PROBLEM = but(filters=FilterFacts((DOCKER,), has_docker=True, legacy=False, begun=0))
WARNING = but(clock=ClockFacts(is_synchronised=False, maximum_error_s=16.0))
UNREAD = but(clock=Unread("the kernel does not say"))


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> list[Facts]:
    """The facts that are gathered: the last of the list."""
    facts = [FACTS]
    monkeypatch.setattr(examination, "gather", lambda _: facts[-1])
    return facts


@pytest.mark.parametrize(("facts", "code"), [(FACTS, 0), (WARNING, 1), (UNREAD, 1), (PROBLEM, 2)])
def test_the_exit_code_is_for_monitoring(virt_ports: Command, look: list[Facts], facts: Facts, code: int) -> None:
    look.append(facts)
    assert virt_ports("doctor").code == virt_ports("doctor", "-o", "json").code == code


def test_what_is_well_is_only_counted(virt_ports: Command, look: list[Facts]) -> None:
    out = virt_ports("doctor").out
    assert out.startswith("server: edge, host, manager; virt-ports 0.1.0\n")
    assert "forwarding" not in out
    assert out.endswith(" ok, 2 not applicable\n"), out


def test_a_problem_has_its_remedy(virt_ports: Command, look: list[Facts]) -> None:
    look.append(PROBLEM)
    out = virt_ports("doctor").out
    assert (
        "\nforward-filters: problem\n"
        "  problem: chain ip filter FORWARD drops what it does not accept (policy drop), "
        "and no rule there names virbr0\n"
        "    `iptables -I DOCKER-USER -i virbr0 -j ACCEPT`, `iptables -I DOCKER-USER -o virbr0 -j ACCEPT`\n"
    ) in out
    assert ", 1 problem, " in out


def test_what_could_not_be_told_says_why(virt_ports: Command, look: list[Facts]) -> None:
    look.append(UNREAD)
    assert "\nclock: could not tell: the kernel does not say\n" in virt_ports("doctor").out


def test_a_check_of_ones_choice_is_shown_also_when_all_is_well(virt_ports: Command, look: list[Facts]) -> None:
    out = virt_ports("doctor", "--check", "forwarding", "--check", "clock").out
    assert "forwarding: ok\n    net.ipv4.ip_forward: 1\n" in out
    assert out.endswith("\n2 ok\n")
    assert "hook" in virt_ports("doctor", "--all").out


def test_only_chosen_checks_count(virt_ports: Command, look: list[Facts]) -> None:
    look.append(PROBLEM)
    assert virt_ports("doctor", "--check", "clock").code == 0


def test_an_unknown_check_is_wrong_usage(virt_ports: Command) -> None:
    found = virt_ports("doctor", "--check", "clok")
    assert (found.code, found.out) == (2, "")
    assert found.err == "error: no check clok; `virt-ports doctor --list` has their names\n"


def test_the_document(virt_ports: Command, look: list[Facts]) -> None:
    look.append(PROBLEM)
    document = virt_ports("doctor", "-o", "json").json
    assert (document["result"], document["machine"], document["roles"]) == (
        "problem", "server", ["edge", "host", "manager"],
    )  # fmt: skip
    (finding,) = (each for each in document["findings"] if each["result"] == "problem")
    assert set(finding) == {"check", "result", "reason", "troubles", "facts"}
    assert [set(each) for each in finding["troubles"]] == [{"result", "what", "remedy"}]
    assert [each["check"] for each in document["findings"]] == [each.name for each in checks.all_checks()]


def test_the_list(virt_ports: Command) -> None:
    listed = virt_ports("doctor", "--list", "-o", "json").json
    assert [each["check"] for each in listed] == [each.name for each in checks.all_checks()]
    assert "forward-filters" in virt_ports("doctor", "--list").out


def test_another_user_can_look(tmp_path: Path) -> None:
    """Really as another user: nothing fails, and what needs root is said to."""
    command = [sys.executable, "-m", "cpm.cli.main", "doctor", "-o", "json", "--natd-config", str(tmp_path / "none")]
    identity = {"user": 65534, "group": 65534, "extra_groups": ()} if os.geteuid() == 0 else {}
    root = Path(main.__file__).parents[2]
    (tmp_path / "cpmd.toml").write_text("")
    command += ["--cpmd-config", str(tmp_path / "cpmd.toml")]
    tmp_path.chmod(0o700)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, **identity)  # type: ignore[call-overload]
    assert done.returncode in (1, 2), done.stderr
    results = {each["check"]: each["result"] for each in json.loads(done.stdout)["findings"]}
    assert (results["settings"], results["forward-filters"]) == ("could not tell", "could not tell")
    assert results["forwarding"] != "could not tell"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    asked: list[dict[str, object]] = []

    def collect(sources: object, say: object, **options: object) -> list[Member]:
        asked.append(options)
        assert callable(say)
        say("checks")
        return [Member("doctor.json", "{}\n")]

    monkeypatch.setattr(bundle, "collect", collect)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_report_is_written_here(virt_ports: Command, collected: list[dict[str, object]], tmp_path: Path) -> None:
    done = virt_ports("report")
    path = tmp_path / "virt-ports-report-20251123-073800.tar.gz"
    assert (done.code, done.out, done.err) == (0, f"{path.name}\n", "checks …\n")
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["virt-ports-report-20251123-073800/doctor.json"]
    assert collected == [{"is_anonymous": False}]


def test_a_report_replaces_no_file(virt_ports: Command, collected: list[dict[str, object]], tmp_path: Path) -> None:
    (tmp_path / "r.tar.gz").write_text("mine")
    done = virt_ports("report", "--file", "r.tar.gz", "--anonymous")
    assert (done.code, done.out) == (1, "")
    assert "r.tar.gz: exists already; give --file another name" in done.err
    assert (tmp_path / "r.tar.gz").read_text() == "mine"
    assert virt_ports("report", "--file", "/nowhere/r.tar.gz").code == 1


def test_a_report_as_json_says_where_it_is(virt_ports: Command, collected: list[dict[str, object]]) -> None:
    done = virt_ports("report", "--file", "x.tar.gz", "-o", "json")
    assert done.json["file"] == "x.tar.gz"
    assert done.json["files"] == 1


def test_other_verbs_do_not_import_the_doctor() -> None:
    code = "import sys; from cpm.cli import parser; parser.build(); sys.exit('machine_doctor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
