"""Code blocks of a page, read as commands and what they print (``tests/docs/transcript.py``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.transcript import Step, blocks, read

PAGE = """\
# A page

    indented: not read

```text
echo not read either
```

```ini
# /etc/a-file
virt-ports = no command
```

## First

```console
root@srv1:~# true
root@srv1:~/there# virt-ports pool list
 Address        Ports
----------------------
 203.0.113.10   64512

root@web1:~# nc 198.51.100.7 80
```

## Second

```console
root@srv1:~# ask
really? [y/N] y
done
$ cat > file <<END
first
END
$ cat file
first
```

```sh
# a comment
one --long \\
    line
two 'quoted
lines'   # and a comment
```

```sh
# /etc/cron.daily/a-script
three
```
"""


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    return read(page)


def test_commands_are_read_in_their_order(steps: list[Step]) -> None:
    assert [(step.chapter, step.machine, step.directory, step.command) for step in steps] == [
        ("First", "srv1", "~", "true"),
        ("First", "srv1", "~/there", "virt-ports pool list"),
        ("First", "web1", "~", "nc 198.51.100.7 80"),
        ("Second", "srv1", "~", "ask"),
        ("Second", "", "", "cat > file <<END\nfirst\nEND"),
        ("Second", "", "", "cat file"),
        ("Second", "", "", "one --long \\\n    line"),
        ("Second", "", "", "two 'quoted\nlines'   # and a comment"),
    ]


def test_a_block_that_begins_with_its_path_is_a_file(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert [block.file for block in blocks(page) if block.file] == ["/etc/a-file", "/etc/cron.daily/a-script"]


def test_a_uuid_and_a_time_may_be_others() -> None:
    line = "web 6695eb01-f6a4-8304-79aa-97f2502e193f since 2026-11-23T05:40:05+00:00 x7"
    other = "web 0c2b4d5e-1111-4222-8333-444455556666 since 2026-11-30T16:00:00+00:00 x7"
    assert Step("", "", "", "list", (line,)).is_printed_by(other)
    assert not Step("", "", "", "list", (line,)).is_printed_by(other.replace("web", "db"))


def test_what_is_typed_is_known(steps: list[Step]) -> None:
    assert [step.answers for step in steps][:4] == ["", "", "", "y\n"]
    assert steps[3].is_printed_by("really? [y/N] done\n")
    assert not steps[3].is_printed_by("done\n")


def test_a_command_without_output_is_not_compared(steps: list[Step]) -> None:
    assert steps[0].is_printed_by("anything\n")


def test_widths_and_numbers_may_differ_but_addresses_may_not(steps: list[Step]) -> None:
    assert steps[1].is_printed_by(" Address   Ports\n----------------------\n 203.0.113.10 36280\n")
    assert not steps[1].is_printed_by(" Address   Ports\n----------------------\n 203.0.113.11 64512\n")
    assert not steps[1].is_printed_by(" Address   Ports\n----------------------\n")
    assert not steps[1].is_printed_by(" Address   Ports\n----------------------\n 203.0.113.10 many\n")


@pytest.mark.parametrize(
    ("printed", "output", "fits"),
    [
        (("a ... c",), "a b c\n", True),
        (("a ... c",), "a b\n", False),
        (("first", "...", "last"), "first\nlast\n", True),
        (("first", "...", "last"), "first\nbetween\nand more\nlast\n", True),
        (("first", "...", "last"), "first\nbetween\n", False),
        (("1000-1255",), "61056-61311\n", True),
        (("web1",), "web2\n", False),
        (("version 0.1.0",), "version 0.2.0\n", False),
        (("srv1", "web1"), "web1\nsrv1\n", False),
    ],
)
def test_what_may_differ(printed: tuple[str, ...], output: str, *, fits: bool) -> None:
    assert Step("", "srv1", "~", "command", printed).is_printed_by(output) is fits


def test_widths_of_rules_below_headers_are_no_matter() -> None:
    assert Step("", "srv1", "~", "command", ("A B", "-----", "1 2")).is_printed_by("A B\n-------\n1 2\n")
