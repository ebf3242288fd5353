"""The import contracts of setup.cfg: they cover files that do not exist yet, and the documented picture is theirs."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PRODUCT = ("cpm", "natctl", "qga_agent", "libvirt_hooks", "machine_doctor")
NEW = "tomorrow"
"""Name of the file that is added to every folder."""


def contracts() -> dict[str, configparser.SectionProxy]:
    """Return the contracts of setup.cfg by their name."""
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    sections = (parser[name] for name in parser.sections() if name.startswith("importlinter:contract:"))
    return {section["name"]: section for section in sections}


CONTRACTS = contracts()
LAYERED = {each["containers"].strip() for each in CONTRACTS.values() if each["type"] == "layers"}
"""Packages whose every module and folder has a layer."""


def words(section: configparser.SectionProxy, key: str) -> list[str]:
    return section.get(key, "").split()


def is_folder(module: str) -> bool:
    return (REPOSITORY / module.replace(".", "/") / "__init__.py").is_file()


def folders_below(module: str) -> Iterator[str]:
    root = REPOSITORY / module.replace(".", "/")
    for init in sorted(root.rglob("__init__.py")):
        yield str(init.parent.relative_to(REPOSITORY)).replace("/", ".")


def layers(section: configparser.SectionProxy) -> list[list[str]]:
    """Return the layers from top to bottom, each as full module names; a contract of another kind has none."""
    if section["type"] != "layers":
        return []
    (container,) = words(section, "containers")
    rows = [row for row in section["layers"].splitlines() if row.strip()]
    return [[f"{container}.{name.strip()}" for name in row.split(":")] for row in rows]


def forbidden_imports() -> Iterator[tuple[str, str, str]]:
    """Yield contract, folder and an import that the contract forbids there: for every folder and contract."""
    for name, section in CONTRACTS.items():
        if section["type"] == "forbidden":
            for source in filter(is_folder, words(section, "source_modules")):
                for folder in folders_below(source):
                    yield name, folder, words(section, "forbidden_modules")[0]
        if section["type"] == "protected":
            (allowed,) = words(section, "allowed_importers")
            for folder in (folder for package in PRODUCT for folder in folders_below(package)):
                if not f"{folder}.".startswith(f"{allowed}."):
                    yield name, folder, words(section, "protected_modules")[0]
        rows = layers(section)
        for above, row in pairwise(rows):
            for layer in filter(is_folder, row):
                for folder in folders_below(layer):
                    yield name, folder, above[0]


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the product that has one bad file more in every folder."""
    copy = tmp_path_factory.mktemp("product")
    for package in PRODUCT:
        shutil.copytree(REPOSITORY / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "setup.cfg", copy)
    bad: dict[str, set[str]] = {}
    for _, folder, imported in forbidden_imports():
        bad.setdefault(folder, set()).add(imported)
    for folder, imports in bad.items():
        lines = [f"import {imported}" for imported in sorted(imports)]
        (copy / folder.replace(".", "/") / f"{NEW}.py").write_text("\n".join(lines) + "\n")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_a_new_file_is_covered_by_every_contract_of_its_folder(verdict: str) -> None:
    _, _, details = verdict.partition("Broken contracts")
    for name, folder, imported in forbidden_imports():
        section = re.search(rf"^{re.escape(name)}\n-+\n(.*?)(?=^\S[^\n]*\n-{{5,}}$|\Z)", details, re.M | re.S)
        assert section, f"{name} is not broken"
        assert re.search(rf"{re.escape(f'{folder}.{NEW}')} -> {re.escape(imported)}\b", section[1]), (
            f"{name} does not see {folder}/{NEW}.py import {imported}"
        )


@pytest.mark.parametrize("name", [name for name, section in CONTRACTS.items() if section["type"] == "layers"])
def test_a_new_folder_needs_a_layer(name: str) -> None:
    assert CONTRACTS[name].getboolean("exhaustive")


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_no_contract_lists_the_files_of_a_folder(name: str) -> None:
    """A module is named only where it stands alone in its package, beside folders."""
    section = CONTRACTS[name]
    named = [module for row in layers(section) for module in row]
    named += [module for key in ("source_modules", "allowed_importers") for module in words(section, key)]
    for module in named:
        parent = module.rpartition(".")[0]
        assert is_folder(module) or parent in LAYERED, module


def documented_layers() -> dict[str, list[list[str]]]:
    """Return the diagram of docs/architecture.md: package, then its layers from top to bottom."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"^```layers\n(.*?)^```", text, re.M | re.S):
        package, *rows = block.rstrip().splitlines()
        found[package.strip()] = [
            [f"{package.strip()}.{name}" for name in re.split(r"\s*:\s*", re.split(r"\s{2,}", row.strip())[0])]
            for row in rows
        ]
    return found


def test_the_documented_layers_are_those_of_the_contracts() -> None:
    enforced = {
        words(section, "containers")[0]: layers(section)
        for section in CONTRACTS.values()
        if section["type"] == "layers"
    }
    assert documented_layers() == enforced
