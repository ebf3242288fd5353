"""The cloud-init example is valid by the schema of Debian's cloud-init, and what it runs is taken by virt-ports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cpm.cli.parser import build

REPOSITORY = Path(__file__).parents[3]
SCHEMA = (
    REPOSITORY / "build/cloud-init/usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"
)
EXAMPLE = REPOSITORY / "contrib/cloud-init/server.yaml"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft4Validator:
    if not SCHEMA.exists() and "CI" not in os.environ:
        pytest.skip("make setup fetches cloud-init's schema")
    return jsonschema.Draft4Validator(json.loads(SCHEMA.read_text()))


@pytest.fixture(scope="module")
def example() -> Any:
    return yaml.safe_load(EXAMPLE.read_text())


def test_it_begins_as_cloud_init_wants_it() -> None:
    assert EXAMPLE.read_text().startswith("#cloud-config\n")


def test_it_is_valid(validator: jsonschema.Draft4Validator, example: Any) -> None:
    assert list(validator.iter_errors(example)) == []


def test_a_mistake_would_be_found(validator: jsonschema.Draft4Validator, example: Any) -> None:
    assert list(validator.iter_errors(example | {"runcmd": "virt-ports install"}))


def test_virt_ports_takes_what_it_runs(example: Any) -> None:
    calls = [command[1:] for command in example["runcmd"] if command[0] == "virt-ports"]
    assert len(calls) == 1
    for call in calls:
        build().parse_args(call)
