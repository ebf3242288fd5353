"""What cpmd says at its socket. Tested in ``tests/unit/machine_doctor/test_readers.py``."""

from __future__ import annotations

from cpm.api.client import Client
from cpm.api.operations import LIST_NODES, LIST_POOL, STATUS
from cpm.protocol.errors import VirtPortsError
from machine_doctor.facts import ManagerFacts, Unread


def manager(client: Client) -> ManagerFacts | Unread:
    """Ask cpmd for its status, nodes and addresses."""
    try:
        status, nodes, pool = client.call(STATUS), client.call(LIST_NODES), client.call(LIST_POOL)
    except VirtPortsError as error:
        return Unread(str(error))
    return ManagerFacts(status, tuple(nodes), tuple(pool))
