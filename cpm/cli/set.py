"""``virt-ports set``: what the operator wishes for one VM."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cpm.cli import parsing, render, show
from cpm.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from cpm.api.views import WishesRequest

_ABOUT = """\
KEY=VALUE, as many as you like:
  floor=PORTS          never below, and what it starts with when ports are short
  cap=PORTS            never above
  weight=N             its part, compared with other VMs, of what is left above
                       the floors when ports are short (1 to 10000, usual 100)
  policy=NAME          how its range grows and shrinks:
{policies}
  drain-limit=SECONDS  cut what still uses a range that is on its way out after
                       so long; none: never, whatever the pool's default is

What the VM's domain XML says wins over this, and this over the pool's defaults;
`virt-ports show` says where each value came from. It is followed from the next
measurement on and kept until it is unset. No connection is cut by it, except by
drain-limit."""

_EXAMPLES = """\
  virt-ports set web1 floor=256 cap=4096
  virt-ports set web1 weight=200 drain-limit=none
  virt-ports set web1 --unset cap --unset weight"""


def add_parser(subparsers: parsing.Subparsers) -> None:
    """Add the verb."""
    verb = parsing.add_verb(
        subparsers, "set", "say what one VM shall have: floor, cap, weight ...", about=_about, examples=_EXAMPLES
    )
    verb.add_argument("vm", metavar="VM", help="name or UUID")
    verb.add_argument("wishes", metavar="KEY=VALUE", nargs="*", help="what it shall have")
    verb.add_argument("--unset", metavar="KEY", action="append", default=[], help="no longer say this; may be repeated")


def _about() -> str:
    return _ABOUT.format(policies=parsing.policies(indent=4))


def run(args: argparse.Namespace) -> int:
    """Say it to the manager, and print the VM as it is from now on."""
    request = _request(args.wishes, args.unset)
    from cpm.api.client import path_of
    from cpm.api.views import DomainDetail

    detail = parsing.client(args).patch(DomainDetail, path_of("domains", args.vm), request)
    if parsing.wants_json(args):
        render.emit_document(show.flat(render.plain(detail)))
    else:
        render.emit(render.fields(show.wishes(detail)))
    return 0


def _request(words: list[str], unset: list[str]) -> WishesRequest:
    from cpm.api.views import WishesRequest
    from cpm.protocol.wishes import KEYS, strictly_understood

    raw = dict(_split(word) for word in words)
    for key in unset:
        if key not in KEYS or key in raw:
            raise InvalidRequest(f"cannot unset {key!r}; use one of {', '.join(KEYS)} that is not set at the same time")
    if not raw and not unset:
        raise InvalidRequest("nothing to set; write KEY=VALUE, for example floor=256, or --unset KEY")
    wishes = strictly_understood(raw)
    changes: dict[str, Any] = {KEYS[key]: getattr(wishes, KEYS[key]) for key in raw}
    return WishesRequest(**changes, **dict.fromkeys(KEYS[key] for key in unset))


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise InvalidRequest(f"{word!r} is no KEY=VALUE; write for example floor=256")
    return key, value
