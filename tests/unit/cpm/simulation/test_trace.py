"""Traces are read back as written, and errors name the line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.errors import InvalidRequest
from cpm.simulation import Line, Trace, read, trace_lines

NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
COUNTS = st.integers(0, 10**6)
LINES = st.builds(Line, NAMES, COUNTS, COUNTS, COUNTS, COUNTS)
STEPS = st.lists(LINES, max_size=4, unique_by=lambda line: line.vm).map(tuple)

HEAD = "# virt-ports trace 1, step 1 s\ntime,vm,opened,closed,packets,bytes\n"


def parse(text: str) -> Trace:
    return read(text.splitlines(keepends=True), "load.csv")


@given(STEPS.filter(bool), st.lists(STEPS, max_size=6), STEPS.filter(bool), st.sampled_from([0.5, 1.0, 5.0]))
def test_a_written_trace_is_read_back(first: tuple[Line, ...], more: list[tuple[Line, ...]],
                                      last: tuple[Line, ...], step_s: float) -> None:  # fmt: skip
    trace = Trace(step_s, (first, *more, last))
    assert parse("".join(trace_lines(trace))) == trace


def test_times_count_from_the_first_line_and_steps_without_a_line_are_empty() -> None:
    trace = parse(HEAD + "1700000000,a,1,0,10,8000\n# a remark\n\n1700000002,a,2,1,20,900\n1700000002,b,3,0,1,1\n")
    assert trace.steps == (
        (Line("a", 1, 0, 10, 8000),),
        (),
        (Line("a", 2, 1, 20, 900), Line("b", 3, 0, 1, 1)),
    )
    assert (trace.vms, trace.seconds, trace.connections) == (("a", "b"), 3.0, 6)


def test_lines_of_one_vm_in_one_step_add_up() -> None:
    assert parse(HEAD + "0,a,1,2,3,4\n0.4,a,10,20,30,40\n").steps == ((Line("a", 11, 22, 33, 44),),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must be like"),
        ("time,vm\n", "its first line must be like"),
        ("# virt-ports trace 1, step 0 s\n", "its first line must be like"),
        ("# virt-ports trace 1, step 1 s\ntime,vm\n", "line 2: must be"),
        (HEAD, "has no lines"),
        (HEAD + "0,a,1,2,3\n", "line 3: 5 fields"),
        (HEAD + "0,a,1,2,3,4\nnan,a,1,2,3,4\n", "line 4: time is 'nan'"),
        (HEAD + "x,a,1,2,3,4\n", "line 3: time is 'x'"),
        (HEAD + "0,a,1,-2,3,4\n", "line 3: closed is '-2'"),
        (HEAD + "0,a,1,2.5,3,4\n", "line 3: closed is '2.5'"),
        (HEAD + "5,a,1,2,3,4\n0,a,1,2,3,4\n", "line 4: time 0 is before"),
        (HEAD + "0,a,1,2,3,4\n1e12,a,1,2,3,4\n", "line 4: time 1e+12 is"),
    ],
)
def test_errors_name_file_and_line(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert str(caught.value).startswith("load.csv")
    assert message in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_refused_or_read(text: str) -> None:
    for garbage in (text, HEAD + text):
        try:
            parse(garbage)
        except InvalidRequest:
            continue
