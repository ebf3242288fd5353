"""``virt-ports status``: the state of the manager. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import StatusView
    from cpm.protocol.timeouts import Timeouts

_EXAMPLES = """\
  virt-ports status
  virt-ports status -o json | jq .nodes_connected
  virt-ports status >/dev/null || echo "exit code $?"    3: cpmd cannot be reached"""

VERB = parsing.Verb(140, "show the state of the manager", examples=_EXAMPLES)


def add_arguments(_: parsing.Parser) -> None:
    """Add the verb's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Print the state of the manager."""
    from cpm.api.operations import STATUS

    view = parsing.reader(args).call(STATUS)
    return parsing.print_answer(args, view, lambda: _facts(view) + _problems(view))


def _problems(view: StatusView) -> str:
    return "".join(f"{render.cell(problem)}\n" for problem in view.problems)


def _facts(view: StatusView) -> str:
    return render.fields((
        ("Version", view.version),
        ("Epoch", view.epoch),
        ("Running since", render.moment(view.started)),
        ("VMs", view.domains),
        ("Nodes", f"{view.nodes_connected} connected of {view.nodes}"),
        ("Ledger", view.ledger),
        *(("Ledger problem", problem) for problem in (view.ledger_problem,) if problem),
        *(("Clock", _clock(view)) for _ in view.last_clock_steps[-1:]),
        ("Timeouts", _timeouts(view.timeouts)),
    ))  # fmt: skip


def _clock(view: StatusView) -> str:
    step = view.last_clock_steps[-1]
    count = f"{view.clock_steps} times" if view.clock_steps > 1 else "once"
    direction = "forward" if step.by_s > 0 else "back"
    return f"was set {count}, last {direction} by {abs(step.by_s):.1f} s to {render.moment(step.after)}"


def _timeouts(timeouts: Timeouts | None) -> str | None:
    if timeouts is None:
        return None
    return (
        f"TCP {timeouts.tcp_established_s} s, opening or half closed {timeouts.tcp_transitory_s} s, "
        f"TIME_WAIT {timeouts.tcp_time_wait_s} s, reset {timeouts.tcp_reset_s} s; "
        f"UDP {timeouts.udp_s} s, to port 53 {timeouts.dns_s} s; ICMP {timeouts.icmp_s} s"
    )
