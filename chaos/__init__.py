"""
Disturbs a whole site at random, under traffic, and judges whether the two sentences held: ``python -m chaos``.

``plan`` turns a seed into timed faults, ``kinds`` says what each may do to traffic, ``faults`` injects them into a lab
(``site``), ``programs`` run inside its machines: traffic, the server, hostile senders, packet witnesses.
``observations`` reads what they X/how-to/chaos.md has more.
"""
