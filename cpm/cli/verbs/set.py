"""``virt-ports set``: the operator's wishes for one VM. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render
from cpm.cli.verbs import show
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cpm.api.requests import WishesRequest

_ABOUT = """\
One or more of:
  floor=PORTS          its minimum, and its size at start when ports are short
  cap=PORTS            its maximum
  weight=N             its share, relative to other VMs, of what is left above the
                       floors when ports are short (1 to 10000, normally 100)
  policy=NAME          how its range grows and shrinks:
{policies}
  drain-limit=SECONDS  after so long, while another VM lacks ports, cut the
                       connections that still use a draining range; none:
                       never, whatever the pool's default
  connections=N        connections that it may have at once
  connection-rate=N    connections that it may begin in a second; twenty times
                       as many at once
  filtering=HOW        who reaches its sockets from outside (RFC 4787):
                       endpoint-independent: anybody who sends to the external
                       port that a socket has ("full cone");
                       address-and-port-dependent: only whom it has sent to
  pcp=on|off|PORTS     whether its guest may have ports mapped when it asks by
                       PCP or NAT-PMP (normally off), and how many (on: {mapped})
  pool=NAME            the pool that its ports come from (normally default; 'pool
                       list' has them)
  address=ADDRESS      the only external address that it may have ports on

A VM that has ports when 'pool' or 'address' changes gets its new connections in
the new place and keeps the open ones where they are. As long as there is no room
it stays where it is, and 'list' and 'explain' say so; a VM that has no ports yet
waits for them. Neither is ever given ports in another place instead.

The VM's domain XML takes precedence over this, and this over the pool's
defaults; `virt-ports show` prints the origin of each value. It applies from the
next measurement on, until it is unset. It cuts no connection, except by
drain-limit."""

_EXAMPLES = """\
  virt-ports set web1 floor=256 cap=4096
  virt-ports set web1 weight=200 drain-limit=none
  virt-ports set web1 connections=262144 connection-rate=5000
  virt-ports set web1 filtering=endpoint-independent
  virt-ports set game1 pcp=on
  virt-ports set web2 pool=mail
  virt-ports set web2 address=203.0.113.8
  virt-ports set web1 --unset cap --unset weight"""


def _about() -> str:
    from cpm.protocol.wishes import MAPPED_PORTS

    return _ABOUT.format(policies=parsing.policies(indent=4), mapped=MAPPED_PORTS)


VERB = parsing.Verb(30, "set the floor, cap, weight ... of one VM", about=_about, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID")
    verb.add_argument("wishes", metavar="KEY=VALUE", nargs="*", help="one of the settings above")
    verb.add_argument(
        "--unset", metavar="KEY", action="append", default=[], help="remove this setting; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Change the wishes, and print those in effect from now on."""
    request = _request(args.wishes, args.unset)
    from cpm.api.operations import SET_WISHES

    detail = parsing.client(args).call(SET_WISHES, request, name=args.vm)
    return parsing.print_answer(args, show.flat(detail), lambda: render.fields(show.wishes(detail)))


def _request(words: list[str], unset: list[str]) -> WishesRequest:
    from cpm.api.requests import WishesRequest
    from cpm.protocol.wishes import KEYS, parse_strictly

    raw = dict(_split(word) for word in words)
    for key in unset:
        if key not in KEYS or key in raw:
            raise InvalidRequest(f"cannot unset {key!r}; use one of {', '.join(KEYS)} that is not set at the same time")
    if not raw and not unset:
        raise InvalidRequest("nothing to set; write KEY=VALUE, for example floor=256, or --unset KEY")
    wishes = parse_strictly(raw)
    changes: dict[str, Any] = {KEYS[key]: getattr(wishes, KEYS[key]) for key in raw}
    return WishesRequest(**changes, **dict.fromkeys(KEYS[key] for key in unset))


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise InvalidRequest(f"{word!r} is no KEY=VALUE; write for example floor=256")
    return key, value
