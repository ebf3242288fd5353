"""The OpenAPI document: fresh, valid, and true of what a real cpmd answers and what the command line prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import openapi_spec_validator
import pytest

from cpm.api import openapi, operations
from cpm.api.operations import OPERATIONS, Operation
from cpm.api.views import DomainDetail
from tests.fakes.canned_manager import CannedManager, lines
from tests.unit.cpm.cli.conftest import Command, manager, virt_ports
from tests.unit.cpm.cli.test_verbs import EVENTS
from tests.unit.cpm.cli.test_with_server import ANSWERS

__all__ = ["manager", "virt_ports"]  # fixtures

REPOSITORY = Path(__file__).parents[4]
DOCUMENT = openapi.document()
RECORDED = json.loads((Path(__file__).parent / "recorded_answers.json").read_text())


def schema_of(method: str, path: str, status: int) -> Any:
    """Return what the document says of the answer to a request."""
    for template, methods in DOCUMENT["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in methods:
            responses = methods[method.lower()]["responses"]
            return next(iter(responses.get(str(status), responses["default"])["content"].values()))["schema"]
    return None


def complaints(value: object, schema: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    whole = {**schema, "components": DOCUMENT["components"]}
    return [
        error.message for error in jsonschema.Draft202012Validator(whole, format_checker=checker).iter_errors(value)
    ]


def test_the_page_is_generated_from_the_declarations() -> None:
    assert (REPOSITORY / "docs" / "reference" / "openapi.json").read_text() == openapi.text(), "run make manuals"


def test_it_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


def test_it_has_every_operation() -> None:
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {(operation.method, operation.path) for operation in OPERATIONS}


def test_it_notices_what_is_wrong() -> None:
    schema = schema_of("GET", "/v1/domains", 200)
    assert complaints([], schema) == []
    assert complaints([{"name": 1}], schema) != []
    assert complaints({}, schema) != []
    assert complaints({"code": 1}, schema_of("GET", "/v1/domains", 404)) != []


def _values(answer: dict[str, Any]) -> Iterator[Any]:
    if "ndjson" in answer["content_type"]:
        yield from map(json.loads, answer["answer"].splitlines())
    elif "json" in answer["content_type"]:
        yield json.loads(answer["answer"])


@pytest.mark.parametrize("answer", RECORDED, ids=lambda answer: str(answer["request"])[:60])
def test_what_a_real_cpmd_answers_is_as_described(answer: dict[str, Any]) -> None:
    method, target = answer["request"].split(" ")[:2]
    schema = schema_of(method, urlsplit(target).path, answer["status"])
    if schema is None:
        assert answer["status"] in (404, 405), "there is no such operation"
        schema = {"$ref": "#/components/schemas/ErrorView"}
    for value in _values(answer):
        assert complaints(value, schema) == []


VERBS: dict[str, Operation[Any]] = {
    "list": operations.LIST_VMS,
    "show web1": operations.SHOW_VM,
    "set web1 floor=64": operations.SET_WISHES,
    "resize web1 512": operations.RESIZE,
    "relocate web1": operations.RELOCATE,
    "explain web1": operations.EXPLAIN,
    "history web1": operations.HISTORY,
    "whois 203.0.113.1 20817": operations.WHOIS,
    "pool list": operations.LIST_POOL,
    "pool show 203.0.113.1": operations.SHOW_ADDRESS,
    "pool add 203.0.113.1": operations.ADD_TO_POOL,
    "pool remove 203.0.113.1": operations.REMOVE_FROM_POOL,
    "node list": operations.LIST_NODES,
    "node events": operations.NODE_EVENTS,
    "node fence host1 --yes": operations.FENCE,
    "node unfence host1": operations.UNFENCE,
    "audit": operations.AUDIT,
    "events": operations.EVENTS,
    "status": operations.STATUS,
}


@pytest.mark.parametrize("words", VERBS)
def test_what_verbs_print_as_json_is_as_described(manager: CannedManager, virt_ports: Command, words: str) -> None:
    operation = VERBS[words]
    path = operation.path.replace("{name}", "host1" if "nodes" in operation.path else "web1").replace(
        "{address}", "203.0.113.1"
    )
    query = "?address=203.0.113.1&port=20817" if operation is operations.WHOIS else ""
    answer = ANSWERS.get(operation, EVENTS)
    manager.on(f"{operation.method} {path}{query}", lines(list(answer)) if operation.streams else answer)  # type: ignore[call-overload]
    result = virt_ports(*words.split(), "-o", "json")
    assert result.code == 0, result.err
    schema = schema_of(operation.method, path, 200)
    if operation.answer is DomainDetail:
        schema = {"$ref": f"#/components/schemas/{openapi.FLAT}"}
    assert complaints(result.json, {"type": "array", "items": schema} if operation.streams else schema) == []
    refused = virt_ports(*words.split(), "-o", "json", "--socket", "/nonexistent")
    assert complaints(json.loads(refused.err), {"$ref": "#/components/schemas/ErrorView"}) == []
