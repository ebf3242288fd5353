"""The story of a failure as people read it: when, who, what; and what the kernels held at the end."""

from __future__ import annotations

from collections.abc import Iterator

from prove import words
from prove.network import BEGIN
from prove.runner import run
from prove.story import ABOUT_VM, Event, Story
from prove.world import World


def transcript(story: Story) -> str:
    """Run a story and return its transcript."""
    lines: list[str] = []
    last: list[World] = []

    def at() -> str:
        return f"{last[0].now - BEGIN:8.1f} s" if last else "   begin  "

    def tell(world: World, event: Event) -> None:
        if not last:
            lines.clear()
            lines.append("(two hosts, two edges, everybody connected)")
        last[:] = [world]
        lines.append(f"{at()}  * {describe(event)}")

    def say(who: str, what: str) -> None:
        lines.append(f"{at()}      {who}: {what}")

    verdict = run(story, tell, say)
    lines.append(f"{at()}  ! {verdict.violation or 'all went well'}")
    lines += kernels(last[0]) if last else ()
    return "\n".join(lines)


def kernels(world: World) -> Iterator[str]:
    """Yield what the kernels hold."""
    yield "            what the kernels hold:"
    for name, machine in world.machines.items():
        for uuid, entry in sorted(machine.kernel.host.items()):
            yield f"            {name}: hands {entry.intent.ports} out to vm{uuid[-1:]}, index {entry.index}"
        for uuid, vm in sorted(machine.kernel.edge.items()):
            yield f"            {name}: maps {words.edge_intent(vm)} to {words.vm(uuid)}"
        if not machine.is_on:
            yield f"            {name}: is off"
    for flow in world.judge.all_flows:
        yield f"            {flow.host}: vm{flow}"


def describe(event: Event) -> str:
    """Return an event in words."""
    words = f"{event.kind}"
    if event.who:
        words += f" {event.who}"
    if event.kind in ABOUT_VM:
        words += f" vm{event.vm}"
    return f"{words} ({event.n})"
