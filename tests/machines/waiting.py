"""How long tests of machines wait."""

LIMIT_S = 1200.0
"""
Seconds after which something that a machine has to do counts as failed.

Waiting ends when the thing has happened, so what a longer limit costs is the time until a failure is seen. With a load
of 15 on two cores nothing that was well took a third of it.
"""
