"""
Generates ``docs/reference/openapi.json`` (OpenAPI 3.1) from the declarations of operations::

    python -m cpm.api.openapi > docs/reference/openapi.json

It has the JSON Schema of every answer; what ``virt-ports VERB -o json`` prints is in :mod:`cpm.cli.output_reference`.
"""

from __future__ import annotations

import json
import sys
from ipaddress import IPv4Address
from typing import Any, Final

import msgspec

from cpm.api.operations import OPERATIONS, Operation
from cpm.api.views import Document, ErrorView
from cpm.protocol.error_codes import CODES
from cpm.protocol.errors import Busy, InvalidRequest, VirtPortsError

_PREFIX: Final = "#/components/schemas/"
_ABOUT: Final = (
    "The API of virt-ports, on cpmd's unix socket (/run/virt-ports/cpmd.sock). GET changes nothing; other methods "
    "are for root and the members of [listen] admin_group. Later versions may add keys: ignore those you do not know."
)


def document() -> dict[str, Any]:
    """Return the document. Its version is that of the API's paths, not of a release."""
    kinds = [ErrorView, *(op.answer for op in OPERATIONS), *(op.body for op in OPERATIONS if op.body is not None)]
    json_kinds = [kind for kind in kinds if kind is not Document]
    schemas, components = msgspec.json.schema_components(
        json_kinds, ref_template=f"{_PREFIX}{{name}}", schema_hook=schema_of
    )
    known = dict(zip(map(repr, json_kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, known)
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "virt-ports", "version": "1", "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items()))},
    }  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(made))  # tuples, the defaults of some fields, become lists
    return plain


def schema_of(kind: type) -> dict[str, Any]:
    """Return the schema of a type that msgspec does not know."""
    if kind is IPv4Address:
        return {"type": "string", "format": "ipv4"}
    raise NotImplementedError(kind)


def _operation(operation: Operation[Any], known: dict[str, Any]) -> dict[str, Any]:
    name = f"{operation.method}_{operation.path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}".lower()
    described: dict[str, Any] = {"operationId": name, "summary": operation.summary}
    if operation.parameters:
        described["parameters"] = [_parameter(operation, each) for each in operation.parameters]
    if operation.body is not None:
        schema = known[repr(operation.body)]
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    described["responses"] = _responses(operation, known)
    return described


def _parameter(operation: Operation[Any], each: Any) -> dict[str, Any]:
    in_path = f"{{{each.name}}}" in operation.path
    is_required = in_path or (getattr(each, "required", False) is True)
    return {
        "name": each.name, "in": "path" if in_path else "query", "required": is_required,
        "description": f"{each.meaning}; {each.takes}", "schema": each.schema,
    }  # fmt: skip


def _responses(operation: Operation[Any], known: dict[str, Any]) -> dict[str, Any]:
    if operation.answer is Document:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    elif operation.streams:
        # Each line is a value of this schema.
        content = {"application/x-ndjson": {"schema": known[repr(operation.answer)]}}
    else:
        content = {"application/json": {"schema": known[repr(operation.answer)]}}
    is_line = operation.streams and operation.answer is not Document
    description = "One such value a line." if is_line else "The answer."
    failures: dict[int, list[str]] = {}
    kinds: tuple[type[VirtPortsError], ...] = (InvalidRequest, Busy, *operation.errors)
    for kind in kinds:
        codes = failures.setdefault(kind.http_status, [])
        codes += [kind.code] if kind.code not in codes else []
    error = {"application/json": {"schema": {"$ref": f"{_PREFIX}{ErrorView.__name__}"}}}
    refused = {
        str(status): {"description": f"Refused: {', '.join(codes)}.", "content": error}
        for status, codes in sorted(failures.items())
    }
    other = {"description": f"Failed. All codes: {', '.join(CODES)}.", "content": error}
    return {"200": {"description": description, "content": content}, **refused, "default": other}


def text() -> str:
    """Return the document as it is in the repository."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
