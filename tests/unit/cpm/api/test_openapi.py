"""The OpenAPI document: fresh, valid, and true of what a real cpmd answers."""

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

from cpm.api import openapi
from cpm.api.operations import OPERATIONS

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
