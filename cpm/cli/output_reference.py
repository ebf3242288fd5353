"""
Generates ``docs/reference/output.md`` and ``output.schema.json``: what every verb prints with ``-o json``::

    python -m cpm.cli.output_reference docs/reference

:data:`PRINTED` is the one place that says it. Tested in ``tests/unit/cpm/cli/test_output.py``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from cpm.api import openapi, reference
from cpm.api.operations import Operation
from cpm.api.views import DomainDetail, DomainView, ErrorView
from cpm.cli import documents
from cpm.cli.completion import parsers
from cpm.cli.verbs import doctor

FLAT: Final = "FlatDomainDetail"
"""A VM's detail in which what is listed of it stands beside the rest."""

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_HERE: Final = "#/$defs/{name}"
_ABOUT: Final = "What virt-ports prints with -o json. Later versions may add keys: ignore those that you do not know."
_FLAT_ABOUT: Final = "What show, set, resize and relocate print: the keys of list, and everything else known of one VM."


class Printed(NamedTuple):
    """What a verb prints."""

    kind: Any
    """Type of the document; :data:`FLAT` where it is no type. None: no document."""
    is_lines: bool = False
    """There is one such document a line."""
    note: str = ""


def _answer(operation: Operation[Any], *, is_lines: bool = False, note: str = "") -> Printed:
    """Return what is printed of an operation's answer; of a stream that ends, a list."""
    kind = list[operation.answer] if operation.streams and not is_lines else operation.answer  # type: ignore[name-defined]
    return Printed(kind, is_lines, note)


def _printed() -> dict[str, Printed]:
    from cpm.api import operations as api

    flat = Printed(FLAT)
    settings = _answer(api.SETTINGS)
    certificates = Printed(list[documents.CertificateDocument])
    node = _answer(api.FENCE)
    return {
        "list": _answer(api.LIST_VMS),
        "top": Printed(list[documents.TopDocument], is_lines=True, note="all VMs, every `--delay` seconds"),
        "show": flat,
        "explain": _answer(api.EXPLAIN),
        "set": flat,
        "resize": flat,
        "relocate": flat,
        "forward add": _answer(api.ADD_FORWARD),
        "forward remove": _answer(api.REMOVE_FORWARDS),
        "forward list": _answer(api.LIST_FORWARDS),
        "whois": _answer(api.WHOIS),
        "history": _answer(api.HISTORY),
        "pool list": _answer(api.LIST_POOL),
        "pool show": _answer(api.SHOW_ADDRESS),
        "pool add": _answer(api.ADD_TO_POOL),
        "pool remove": _answer(api.REMOVE_FROM_POOL),
        "audit": _answer(api.AUDIT),
        "node list": _answer(api.LIST_NODES),
        "node show": node,
        "node approve": node,
        "node revoke": node,
        "node remove": _answer(api.REMOVE_NODE),
        "node fence": node,
        "node unfence": node,
        "node events": _answer(api.NODE_EVENTS),
        "events": _answer(api.EVENTS),
        "events --follow": _answer(api.EVENTS, is_lines=True),
        "export": _answer(api.EXPORT, is_lines=True, note="without `-o json`, too; `--format` has other forms"),
        "record": Printed(
            documents.RecordDocument, note="the trace is in the file; with `-` it is all that is printed"
        ),
        "status": _answer(api.STATUS),
        "simulate": Printed(documents.SimulateDocument),
        "config check": Printed(list[documents.SettingsFileDocument]),
        "config diff": settings,
        "config reload": settings,
        "backup": Printed(documents.BackupDocument),
        "restore": Printed(documents.RestoreDocument),
        "install": Printed(documents.InstallDocument),
        "uninstall": Printed(documents.UninstallDocument),
        "doctor": Printed(doctor.document_type()),
        "doctor --list": Printed(list[documents.CheckDocument]),
        "pki init": certificates,
        "pki issue": certificates,
        "pki renew": certificates,
        "pki list": certificates,
        "report": Printed(
            documents.ReportDocument, note="the archive is in the file; with `--file -` it is all that is printed"
        ),
    }


PRINTED: Final = _printed()
"""By the words after ``virt-ports``: every verb and action, and what an option changes about it."""


def undocumented(parser: argparse.ArgumentParser) -> set[str]:
    """Return the verbs and actions of a parser of which nothing is said here."""
    words = {each.prog.partition(" ")[2] for each in parsers(parser) if not _has_actions(each)}
    return words - PRINTED.keys()


def _has_actions(parser: argparse.ArgumentParser) -> bool:
    return any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)  # noqa: SLF001


def schema_of(words: str) -> dict[str, Any]:
    """Return the schema of what a verb prints, with all definitions; of each line, where there are several."""
    document = schema()
    return {**document, **document["$defs"][_key(words)]}


def schema() -> dict[str, Any]:
    """Return the JSON Schema: a definition for each verb (``pool-add``), and for each type."""
    kinds = [DomainDetail, ErrorView, *(each.kind for each in PRINTED.values() if each.kind not in (FLAT, None))]
    schemas, types = msgspec.json.schema_components(kinds, ref_template=_HERE, schema_hook=openapi.schema_of)
    known = dict(zip(map(repr, kinds), schemas, strict=True))
    types[FLAT] = flat(types)
    verbs = {
        _key(words): {"$ref": _HERE.format(name=FLAT)} if each.kind == FLAT else known[repr(each.kind)]
        for words, each in PRINTED.items()
    }
    verbs["error"] = known[repr(ErrorView)]
    made = {"$schema": _DIALECT, "title": "virt-ports", "description": _ABOUT, "$defs": {**verbs, **_sorted(types)}}
    plain: dict[str, Any] = json.loads(json.dumps(made))  # tuples, the defaults of some fields, become lists
    return plain


def _key(words: str) -> str:
    return re.sub(r"[ -]+", "-", words)


def _sorted(types: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(types.items()))


def flat(types: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of :data:`FLAT`."""
    detail, listed = types[DomainDetail.__name__], types[DomainView.__name__]
    beside = {name: schema for name, schema in detail["properties"].items() if name != "domain"}
    needed = [name for name in (*listed["required"], *detail["required"]) if name != "domain"]
    return {
        "title": FLAT,
        "description": _FLAT_ABOUT,
        "type": "object",
        "properties": {**listed["properties"], **beside},
        "required": needed,
    }


_HEAD: Final = """\
# What -o json prints

Every verb of `virt-ports` takes `-o json`, and prints one JSON document then: indented on a terminal, otherwise on one
line. Where the table says *lines* there is one document on each line. An error is an [ErrorView](api.md#errorview) on
stderr, and the exit code is that of the verb. Times are UTC seconds since 1970, addresses are strings. Later versions
may add keys: a program should ignore those that it does not know.

[output.schema.json](output.schema.json) has the same as a JSON Schema (draft 2020-12): `$defs` has a definition for
each verb, `pool-add` for `virt-ports pool add`, and `error`. This page is generated by
`python -m cpm.cli.output_reference`; a test fails when it is stale, and another one validates what every verb prints.

| `virt-ports …` | prints | |
|---|---|---|
"""

_TYPES: Final = """
## Types

Those of the [HTTP API](api.md#types) are on its page.
"""


def markdown() -> str:
    """Return the page."""
    rows = "".join(_row(words, each) for words, each in PRINTED.items())
    types = "".join(map(_type, own_types()))
    return _HEAD + _linked(rows) + _TYPES + _linked(_flat_section() + types)


def _row(words: str, each: Printed) -> str:
    name = f"[{FLAT}](#{FLAT.lower()})" if each.kind == FLAT else reference.type_name(each.kind)
    return f"| `{words}` | {f'lines: {name}' if each.is_lines else name} | {each.note} |\n"


def own_types() -> list[type]:
    """Return the types that are not of the API, in order of name."""
    found: set[type] = set()
    todo: list[Any] = [each.kind for each in PRINTED.values() if each.kind != FLAT]
    while todo:
        kind = todo.pop()
        todo += typing.get_args(kind)
        if kind not in found and isinstance(kind, type) and kind not in _API and _has_fields(kind):
            found.add(kind)
            todo += typing.get_type_hints(kind).values()
    return sorted(found, key=lambda kind: kind.__name__)


def _has_fields(kind: type) -> bool:
    return typing.is_typeddict(kind) or issubclass(kind, msgspec.Struct)


_API: Final = frozenset(reference.object_types())


def _type(kind: type) -> str:
    known = dict(reference.meanings(kind))
    summary = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].replace("``", "`").split())
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = "".join(
        f"| `{name}` | {reference.type_name(hint)} | {known.get(name, '')} |\n" for name, hint in hints.items()
    )
    return f"\n### {kind.__name__}\n\n{summary}\n\n| key | value | |\n|---|---|---|\n{rows}"


def _flat_section() -> str:
    return (
        f"\n### {FLAT}\n\n{_FLAT_ABOUT} The keys are those of [DomainView](#domainview) and those of "
        "[DomainDetail](#domaindetail) but `domain`.\n"
    )


def _linked(text: str) -> str:
    """Return a text in which links to types of the API lead to its page."""
    names = {kind.__name__.lower() for kind in _API}
    return re.sub(r"\]\(#(\w+)\)", lambda found: f"](api.md#{found[1]})" if found[1] in names else found[0], text)


def files() -> Iterator[tuple[str, str]]:
    """Yield name and text of both files."""
    yield "output.md", markdown()
    yield "output.schema.json", json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, text in files():
        (Path(sys.argv[1]) / name).write_text(text)
