"""
Foreign text (names of VMs and nodes, errors of other programs) for terminals, logs and metrics. Pure.

Each of the three has one place that escapes whatever passes: :func:`cpm.cli.render.emit`, the formatters in
:mod:`cpm.service.logs`, and :mod:`cpm.queries.metrics`. Answers in JSON are exact.
"""

from __future__ import annotations


def escaped(text: str, keep: str = "") -> str:
    r"""
    Return a text in which nothing controls a terminal or changes the order of what is shown.

    What is not printable (control characters, line breaks, marks of direction and other format characters, surrogates)
    is written as in Python: ``\x1b``, ``\u202e``.

    :param keep: Characters that stay as they are.
    """
    if (text.replace(keep, "") if len(keep) == 1 else text).isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)
