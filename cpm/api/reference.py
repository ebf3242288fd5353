"""
Generates ``docs/reference/api.md`` from the declarations of operations::

    python -m cpm.api.reference > docs/reference/api.md
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from msgspec import Meta, Struct, UnsetType

from cpm.api.operations import OPERATIONS, Operation
from cpm.api.views import Document, ErrorView
from cpm.protocol.error_codes import CODES

_HEAD = """\
# HTTP API

The API that `virt-ports` uses, for other programs. This page is generated from the declarations in
`cpm/api/operations.py` by `python -m cpm.api.reference`, and a test fails when it is stale.

The API is served on a unix socket, by default `/run/virt-ports/cpmd.sock`. Whoever can open it may ask (`GET`); any
other method is for root and for members of `[listen] admin_group` in `cpmd.toml`, and `forbidden` for others. On
`[listen] read_socket` it is forbidden for all. Requests and answers are JSON. Times are UTC seconds since 1970,
addresses are strings. A change is answered once it is durable.

```sh
curl --unix-socket /run/virt-ports/cpmd.sock http://localhost/v1/domains
```

Later versions may add keys; a program should ignore those it does not know.
"""

_ERRORS = """
## Errors

An answer with a status other than 200 has an [ErrorView](#errorview) as body. Besides the errors listed for an
operation, any request with parameters or a body can be answered by `invalid-request`, any change by `ledger` or
`forbidden`, and any request by `busy` or `error`. The table has all codes, with the HTTP status and the exit code of
`virt-ports`; some occur only as the latter.

| code | status | exit code |
|---|---|---|
"""

_SIMPLE: dict[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null",
    IPv4Address: "IPv4 address", IPv4Network: "IPv4 network",
}  # fmt: skip


def markdown() -> str:
    """Return the page."""
    errors = "".join(f"| `{code}` | {kind.http_status} | {int(kind.exit_code)} |\n" for code, kind in CODES.items())
    operations = "".join(map(_operation, OPERATIONS))
    return f"{_HEAD}\n## Operations\n{operations}{_ERRORS}{errors}\n## Types\n{''.join(map(_type, object_types()))}"


def _operation(operation: Operation[Any]) -> str:
    lines = [f"\n### `{operation}`\n", operation.summary, ""]
    for each in operation.parameters:
        place = "path" if f"{{{each.name}}}" in operation.path else "query"
        lines.append(f"- `{each.name}` ({place}): {each.meaning}; {each.takes}.")
    if operation.body is not None:
        lines.append(f"- Body: {type_name(operation.body)}.")
    lines.append(f"- Answer: {_answer(operation)}.")
    if operation.errors:
        lines.append(f"- Errors: {', '.join(f'`{kind.code}`' for kind in operation.errors)}.")
    return "\n".join(lines) + "\n"


def _answer(operation: Operation[Any]) -> str:
    if operation.answer is Document:
        return "text"
    return f"newline-delimited {type_name(operation.answer)}" if operation.streams else type_name(operation.answer)


def object_types() -> list[type]:
    """Return the types of all operations, and the types that these contain, in order of name."""
    found: set[type] = set()
    todo: list[Any] = [
        ErrorView,
        *(op.answer for op in OPERATIONS),
        *(op.body for op in OPERATIONS if op.body is not None),
    ]
    while todo:
        kind = todo.pop()
        todo += typing.get_args(kind)
        if kind not in found and _is_object(kind) and kind is not Document:
            found.add(kind)
            todo += typing.get_type_hints(kind).values()
    return sorted(found, key=lambda kind: kind.__name__)


def _type(kind: type) -> str:
    hints = typing.get_type_hints(kind, include_extras=True)
    known = dict(pair for base in kind.__mro__ if _is_object(base) and base is not Struct for pair in meanings(base))
    summary = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    rows = "".join(f"| `{name}` | {type_name(hint)} | {known.get(name, '')} |\n" for name, hint in hints.items())
    return f"\n### {kind.__name__}\n\n{summary}\n\n| key | value | |\n|---|---|---|\n{rows}"


def meanings(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of each attribute of a class that has one."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(below.value.value).replace("``", "`").split())


def type_name(hint: Any) -> str:
    """Return a type as JSON has it, in words; types of ours as links."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(each) for each in arguments if each is not UnsetType)
    if origin is typing.Annotated:
        [meta] = [each for each in arguments if isinstance(each, Meta)]
        return f"{type_name(arguments[0])}{_bounds(meta)}"
    if origin in (dict, Mapping):
        return f"object with values {type_name(arguments[1])}"
    if origin in (tuple, list, frozenset):
        return f"list of {type_name(arguments[0])}"
    if isinstance(hint, typing.NewType):
        return type_name(hint.__supertype__)
    if issubclass(hint, enum.Enum):
        return ", ".join(f"`{each.value}`" for each in hint)
    return f"[{hint.__name__}](#{hint.__name__.lower()})"


def _bounds(meta: Meta) -> str:
    if meta.max_length is not None:
        return f" (at most {meta.max_length:,})"
    if meta.ge is not None and meta.le is not None:
        return f" from {meta.ge} to {meta.le:.17g}"
    bounds = {"from": meta.ge, "above": meta.gt, "to": meta.le, "below": meta.lt}
    words = " ".join(f"{word} {bound:.17g}" for word, bound in bounds.items() if bound is not None)
    return f" {words}" if words else ""


def _is_object(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Struct) or dataclasses.is_dataclass(kind))


if __name__ == "__main__":
    sys.stdout.write(markdown())
