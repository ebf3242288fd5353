"""``virt-ports status``: the manager itself."""

from __future__ import annotations

import argparse

from cpm.cli import parsing, render

_EXAMPLES = """\
  virt-ports status
  virt-ports status -o json | jq .nodes_connected
  virt-ports status >/dev/null || echo "exit code $?"    3: cpmd cannot be reached"""


def add_parser(subparsers: parsing.Subparsers) -> None:
    """Add the verb."""
    parsing.add_verb(subparsers, "status", "say how the manager is", examples=_EXAMPLES)


def run(args: argparse.Namespace) -> int:
    """Print the manager's facts."""
    from cpm.api.client import path_of
    from cpm.api.views import StatusView

    view = parsing.client(args).get(StatusView, path_of("status"))
    if parsing.wants_json(args):
        render.emit_document(render.plain(view))
        return 0
    render.emit(render.fields((
        ("Version", view.version),
        ("Epoch", view.epoch),
        ("Running since", render.moment(view.started)),
        ("VMs", view.domains),
        ("Nodes", f"{view.nodes_connected} connected of {view.nodes}"),
        ("Ledger", view.ledger),
    )))  # fmt: skip
    return 0
