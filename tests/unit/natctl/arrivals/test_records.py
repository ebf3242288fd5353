"""Each record of a VM's arrivals owns its fields: no other module, and no other object, assigns them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from natctl.arrivals.budget import Budget
from natctl.arrivals.deferral import Deferral
from natctl.arrivals.estimate import Estimate
from natctl.arrivals.refusal import Refusal
from natctl.arrivals.requests import Requests
from natctl.arrivals.vm import VMArrivals

PRODUCT = Path(__file__).parents[4] / "natctl"
RECORDS = (Budget, Deferral, Estimate, Refusal, Requests, VMArrivals)
MODULES = sorted([*PRODUCT.glob("arrivals/*.py"), *PRODUCT.glob("core/*.py")])
ARRIVALS = sorted(PRODUCT.glob("arrivals/*.py"))


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_of_a_record_is_private_and_declared(record: type) -> None:
    fields = record.__dict__["__slots__"]
    assert fields
    assert all(field.startswith("_") for field in fields)
    assert "__dict__" not in vars(record)


@pytest.mark.parametrize("record", RECORDS)
def test_no_property_of_a_record_can_be_assigned(record: type) -> None:
    properties = [value for value in vars(record).values() if isinstance(value, property)]
    assert properties
    assert all(each.fset is None and each.fdel is None for each in properties)


@pytest.mark.parametrize("module", ARRIVALS, ids=lambda path: path.stem)
def test_arrivals_assign_no_field_of_another_object(module: Path) -> None:
    assert [ast.unparse(target) for target in _assigned(module) if not _is_self(target.value)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nobody_reaches_for_a_private_field_of_another_object(module: Path) -> None:
    attributes = (node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Attribute))
    private = (node for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__"))
    assert [ast.unparse(node) for node in private if not _is_self(node.value)] == []


def _assigned(module: Path) -> Iterator[ast.Attribute]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node
        if isinstance(node, ast.Name):
            assert node.id not in {"setattr", "delattr"}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}
