"""Every command of the documentation, typed in the order of its page, on a machine of its own."""

from __future__ import annotations

import pytest

from tests.docs.elsewhere import may_exit, why_not
from tests.docs.machine import LIMIT_S, follow
from tests.docs.pages import PAGES
from tests.docs.transcript import Step

pytestmark = [pytest.mark.netns, pytest.mark.timeout(LIMIT_S + 60)]


def typed(page: str) -> list[Step]:
    return [step for step in PAGES[page].steps if why_not(step.command) is None]


@pytest.mark.parametrize("page", sorted(filter(typed, PAGES)))
def test_every_command_does_what_the_page_says(page: str) -> None:
    steps, done = typed(page), follow(page)
    assert [each.command for each in done] == [step.command for step in steps]
    failed = [each for each in done if not may_exit(each.command, each.status)]
    assert not failed, "\n".join(f"{each.command}: exit status {each.status}\n{each.output}" for each in failed)
    shown = zip(steps, done, strict=True)
    other = [(step, each.output) for step, each in shown if not step.is_printed_by(each.output)]
    assert not other, "\n".join(f"{step.command} prints\n{output}" for step, output in other)
