"""``virt-ports simulate``: its table and its JSON. It needs no manager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm.cli import main
from tests.unit.cpm.cli.conftest import NOW

TRACE = "# virt-ports trace 1, step 1 s\ntime,vm,opened,closed,packets,bytes\n0,web,200,0,100,80000\n1,web,0,200,9,1\n"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "load.csv"
    path.write_text(TRACE)
    return str(path)


def test_the_table_of_results(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["simulate", trace, "--policy", "static:128", "--policy", "static"], now=NOW) == 0
    assert (
        capsys.readouterr().out
        == f"""\
{trace}: 1 VMs, 2 s, 200 connections

 Policy       Refused   Growths   Moves   Held mean   Held peak   Held/used   VMs/address
-------------------------------------------------------------------------------------------
 static:128   72        0         0       128         128         2.00        -
 static:256   0         0         0       256         256         2.56        252.0

"""
    )


def test_json_picture_and_saved_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, saved = tmp_path / "load.svg", tmp_path / "load.csv"
    made = ["simulate", "--generate", "steady", "--vms", "3", "--seconds", "30", "--no-packing", "-o", "json"]
    assert main.execute([*made, "--svg", str(svg), "--save", str(saved), "--policy", "predictive"], now=NOW) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["vms"], document["seconds"], document["seed"]) == (3, 30.0, 1)
    assert [policy["policy"] for policy in document["policies"]] == ["predictive"]
    assert svg.read_text().startswith("<svg")
    assert main.execute(["simulate", str(saved), "--no-packing", "-o", "json", "--policy", "predictive"], now=NOW) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["policies"] == document["policies"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["simulate"], "one of the arguments TRACE --generate is required"),
        (["simulate", "/nowhere.csv"], "cannot read /nowhere.csv"),
        (["simulate", "--generate", "lunar"], "there is no load 'lunar'; use steady, diurnal"),
        (["simulate", "--generate", "steady", "--policy", "tidal"], "there is no policy 'tidal'; use static[:PORTS]"),
        (["simulate", "--generate", "steady", "--vms", "0"], "0 VMs"),
    ],
)
def test_invalid_arguments_are_refused_with_a_remedy(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.execute(words, now=NOW) == 2
    assert complaint in capsys.readouterr().err


def test_a_binary_file_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    assert main.execute(["simulate", str(path)], now=NOW) == 2
    assert "is not a trace" in capsys.readouterr().err
