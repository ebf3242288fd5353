"""A ledger with a small pool."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.core.changes import PutAddress, PutNode, PutVM
from cpm.ledger import SqliteLedger
from tests.unit.cpm.ledger.words import A, B, external, node, vm


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[SqliteLedger]:
    with SqliteLedger(path) as ledger:
        ledger.commit(
            [
                PutNode(node("host1")),
                PutNode(node("host2")),
                PutAddress(external(A, "5060-5061")),
                PutAddress(external(B)),
                PutVM(vm("x")),
                PutVM(vm("y")),
            ],
            now=0.0,
        )
        yield ledger
