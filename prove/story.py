"""
A story: a site and a list of events, as values. The same story always goes the same way, whatever is left out of it.

Events do not depend on the state of the site: one that makes no sense at its moment does nothing. So any part of a
story is a story too, which is what makes shrinking possible (:mod:`prove.shrink`).
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Kind(enum.StrEnum):
    """What happens in one event. ``n`` is the event's number, of which each kind makes its own use."""

    # The ordinary run of things.
    DELIVER_UP = "deliver up"
    """The manager takes n + 1 messages of a node from one of its sessions, as one batch."""
    DELIVER_DOWN = "deliver down"
    """A node takes n + 1 messages of the manager."""
    KERNEL = "kernel"
    """A node's kernel carries out what is queued, or natd counts or deletes connections when nothing is."""
    PASS = "pass"
    """Time passes, and everybody's timers run."""
    SETTLE = "settle"
    """Everything that is under way arrives."""
    MEASURE = "measure"
    """One stage of a host's measuring: remember what is in force, count, report; n = 0: all three."""
    PRESENT = "present"
    """The periodic check of a node: its kernel is made to hold what it should, and the manager told of the VMs."""
    LIST = "list"
    """libvirt is asked for its list, or the answer arrives; n = 0: both at once."""
    # Guests.
    START = "start"
    STOP = "stop"
    STOP_UNSEEN = "stop unseen"
    """A VM ends and no hook runs."""
    PLUG = "plug"
    """The only interface of a VM is taken away, or plugged in again."""
    OPEN = "open"
    """A VM opens a connection."""
    HOLD_ALL = "hold all"
    """A guest opens connections on every port it may use, and keeps them."""
    CLOSE = "close"
    MIGRATE = "migrate"
    """A live migration begins; n = 1, 4, …: the destination's natd sees no hook; n = 2, 5, …: only the last one."""
    RESUME = "resume"
    """The guest runs at the destination; n odd: libvirt is not asked there yet."""
    LEFT = "left"
    """The source's hook says that the VM is gone."""
    ABORT = "abort"
    """The migration comes to nothing: the destination's hook says that the VM is gone; n odd: no hook."""
    # Operators and sizing.
    RESIZE = "resize"
    RELOCATE = "relocate"
    NEED = "need"
    OWN_PORTS = "own ports"
    """A program of an edge begins or ends to use ports of the pool."""
    # Faults of the network and of processes.
    LOSE_AT_NODE = "lose at node"
    """A node notices the loss of its session first; the manager still gets the first n messages under way."""
    LOSE_AT_MANAGER = "lose at manager"
    CONNECT = "connect"
    PARTITION = "partition"
    """A node and the manager cannot reach each other until the next ``heal``; neither notices yet."""
    HEAL = "heal"
    KILL_NATD = "kill natd"
    """natd dies after n more writes: messages sent, or changes of the kernel."""
    START_NATD = "start natd"
    KILL_CPMD = "kill cpmd"
    """cpmd dies after n more writes: before a commit, after it, or after a message."""
    START_CPMD = "start cpmd"
    # Faults of machines.
    REFUSE = "refuse"
    """A kernel refuses its next n + 1 changes, or its next changes of one VM."""
    FLUSH = "flush"
    """Somebody removes all tables of a node."""
    POWER_OFF = "power off"
    POWER_ON = "power on"
    FENCE = "fence"
    """The operator fences a node if it is off."""
    LIBVIRT = "libvirt"
    """natd loses libvirt, or has it again."""
    DISK_FULL = "disk full"
    """The next n + 1 commits fail; with an odd VM because the disk does not work at all."""
    # Faults of the manager's machine.
    CLOCK = "clock"
    """The wall clock of the manager's machine is set."""
    REBOOT_MANAGER = "reboot manager"
    """The machine on which cpmd runs boots again, and is off for some time."""
    # What is not mended yet, or says what is not so.
    BACKUP = "backup"
    """Somebody copies the ledger."""
    RESTORE = "restore"
    """cpmd is stopped, the ledger replaced by that copy, cpmd started."""
    LIE = "lie"
    """A host says what is not so: of its VMs, of counts, or of what its kernel holds."""


class Event(NamedTuple):
    """One event."""

    kind: Kind
    who: str = ""
    """A node, if the kind is about one."""
    vm: int = 0
    """The number of a VM, if the kind is about one."""
    n: int = 0

    def __str__(self) -> str:
        words = f"{self.kind} {self.who}".strip()
        about_vm = f" vm{self.vm}" if self.kind in ABOUT_VM else ""
        return f"{words}{about_vm} {self.n}"


ABOUT_VM = frozenset(
    {
        Kind.START, Kind.STOP, Kind.STOP_UNSEEN, Kind.PLUG, Kind.OPEN, Kind.HOLD_ALL, Kind.CLOSE, Kind.MIGRATE,
        Kind.RESUME, Kind.LEFT, Kind.ABORT, Kind.RESIZE, Kind.RELOCATE, Kind.NEED, Kind.LIE,
    }
)  # fmt: skip

HOSTS = ("host1", "host2")
EDGES = ("edge1", "edge2")
NODES = HOSTS + EDGES
VMS = 5

_WEIGHTS: Mapping[Kind, tuple[float, Sequence[str]]] = {
    Kind.DELIVER_UP: (24, NODES),
    Kind.DELIVER_DOWN: (22, NODES),
    Kind.KERNEL: (20, NODES),
    Kind.PASS: (7, ()),
    Kind.SETTLE: (1.5, ()),
    Kind.MEASURE: (9, HOSTS),
    Kind.PRESENT: (2, NODES),
    Kind.LIST: (2, HOSTS),
    Kind.START: (6, HOSTS),
    Kind.STOP: (2, HOSTS),
    Kind.STOP_UNSEEN: (0.7, HOSTS),
    Kind.PLUG: (1, HOSTS),
    Kind.OPEN: (7, ()),
    Kind.HOLD_ALL: (1.5, ()),
    Kind.CLOSE: (2, ()),
    Kind.MIGRATE: (3, HOSTS),
    Kind.RESUME: (3, ()),
    Kind.LEFT: (2.5, ()),
    Kind.ABORT: (0.8, ()),
    Kind.RESIZE: (4, ()),
    Kind.RELOCATE: (1, ()),
    Kind.NEED: (1, ()),
    Kind.OWN_PORTS: (0.5, EDGES),
    Kind.LOSE_AT_NODE: (1.5, NODES),
    Kind.LOSE_AT_MANAGER: (1.5, NODES),
    Kind.CONNECT: (8, NODES),
    Kind.PARTITION: (0.5, NODES),
    Kind.HEAL: (1, ()),
    Kind.KILL_NATD: (1, NODES),
    Kind.START_NATD: (3, NODES),
    Kind.KILL_CPMD: (0.8, ()),
    Kind.START_CPMD: (2.5, ()),
    Kind.REFUSE: (1, NODES),
    Kind.FLUSH: (0.3, NODES),
    Kind.POWER_OFF: (0.3, NODES),
    Kind.POWER_ON: (1.5, NODES),
    Kind.FENCE: (1, NODES),
    Kind.LIBVIRT: (0.6, HOSTS),
    Kind.DISK_FULL: (0.3, ()),
    Kind.CLOCK: (0.5, ()),
    Kind.REBOOT_MANAGER: (0.3, ()),
    Kind.BACKUP: (0.5, ()),
    Kind.RESTORE: (0.3, ()),
    Kind.LIE: (0.5, HOSTS),
}
"""How often each kind happens, and to whom."""

_K = Kind
THEMES: Mapping[str, Mapping[Kind, float]] = {
    "everything": {},
    "sessions": {
        **dict.fromkeys((_K.LOSE_AT_NODE, _K.LOSE_AT_MANAGER, _K.MEASURE, _K.REFUSE, _K.RESIZE), 4.0),
        **dict.fromkeys((_K.CONNECT, _K.OPEN), 2.0),
        **dict.fromkeys((_K.KERNEL, _K.STOP, _K.POWER_OFF, _K.KILL_CPMD), 0.5),
    },
    "power": {
        **dict.fromkeys((_K.POWER_OFF, _K.FENCE), 6.0),
        **dict.fromkeys((_K.POWER_ON, _K.START, _K.STOP, _K.PARTITION, _K.PASS), 2.0),
        **dict.fromkeys((_K.CONNECT, _K.HEAL, _K.SETTLE), 0.5),
    },
    "crashes": {
        **dict.fromkeys((_K.KILL_CPMD, _K.DISK_FULL, _K.KILL_NATD), 5.0),
        **dict.fromkeys((_K.START_CPMD, _K.START_NATD, _K.CONNECT, _K.RESIZE, _K.OPEN), 2.0),
    },
    "moves": {
        **dict.fromkeys((_K.MIGRATE, _K.RESUME, _K.LEFT, _K.ABORT, _K.RELOCATE, _K.LIST), 4.0),
        **dict.fromkeys((_K.OPEN, _K.STOP_UNSEEN), 2.0),
    },
    "shortage": {
        **dict.fromkeys((_K.START, _K.STOP, _K.PASS, _K.HOLD_ALL, _K.CLOSE, _K.RESIZE, _K.MEASURE), 3.0),
    },
}
"""What happens more often, or less, in a story; one in as many stories has each theme."""

NOT_YET: frozenset[Kind] = frozenset({Kind.BACKUP, Kind.RESTORE, Kind.LIE})
"""Kinds that are known to break something today; they are drawn only when asked for."""
USUAL: frozenset[Kind] = frozenset(Kind) - NOT_YET


class Story(NamedTuple):
    """A site and what happens there."""

    seed: int
    externals: int
    """External addresses of the pool."""
    events: tuple[Event, ...]


_VMS_OF_A_STORY = (1, 2, 1, 3, VMS, 2, 1)
"""How many VMs appear: the fewer, the more happens to each."""
_ANY = -1
"""As an event's number: any."""
PHRASES: tuple[tuple[tuple[Kind, int], ...], ...] = (
    # A session ends while a host is to give something up, and the next one begins slowly.
    (
        *((_K.RESIZE, 0), (_K.LOSE_AT_NODE, _ANY), (_K.DELIVER_UP, 0), (_K.REFUSE, 0), (_K.CONNECT, 0)),
        *((_K.DELIVER_UP, 0), (_K.DELIVER_DOWN, 4), (_K.KERNEL, 0), (_K.MEASURE, 0), (_K.DELIVER_UP, 4)),
        *((_K.MEASURE, 0), (_K.DELIVER_UP, 4), (_K.OPEN, _ANY), (_K.OPEN, _ANY), (_K.PASS, 6), (_K.SETTLE, 0)),
    ),
    # A machine is off, the operator says so, it comes back, and its session ends.
    (
        *((_K.POWER_OFF, 0), (_K.FENCE, 0), (_K.POWER_ON, 0), (_K.CONNECT, 0), (_K.SETTLE, 0)),
        *((_K.LOSE_AT_MANAGER, 0), (_K.PARTITION, 0), (_K.STOP, 0), (_K.SETTLE, 0), (_K.PASS, 9), (_K.SETTLE, 0)),
        *((_K.START, 0), (_K.START, 0), (_K.SETTLE, 0)),
    ),
    # What a step was decided for is there, and cannot be written down.
    (
        *((_K.START, 0), (_K.SETTLE, 0), (_K.RESIZE, _ANY), (_K.DELIVER_DOWN, 1), (_K.DELIVER_DOWN, 1)),
        *((_K.KERNEL, 0), (_K.KERNEL, 0), (_K.DELIVER_UP, 1), (_K.DELIVER_DOWN, 1), (_K.KERNEL, 0)),
        *((_K.DISK_FULL, 0), (_K.OPEN, _ANY), (_K.DELIVER_UP, 1), (_K.SETTLE, 0)),
    ),
    # A range is replaced while the clean-up after the start is still queued.
    (
        *(
            (_K.START, 0),
            (_K.DELIVER_UP, 1),
            (_K.DELIVER_DOWN, 1),
            (_K.DELIVER_DOWN, 1),
            (_K.KERNEL, 0),
            (_K.KERNEL, 0),
        ),
        *((_K.DELIVER_UP, 1), (_K.DELIVER_DOWN, 0), (_K.KERNEL, 0), (_K.OPEN, _ANY), (_K.DELIVER_UP, 1)),
        *((_K.RELOCATE, 0), (_K.DELIVER_DOWN, 0), (_K.DELIVER_DOWN, 0), (_K.KERNEL, 0), (_K.KERNEL, 0)),
        *((_K.DELIVER_UP, 1), (_K.DELIVER_DOWN, 0), (_K.KERNEL, 0), (_K.KERNEL, 0)),
    ),
    # A guest ends that held all it could, and another one wants that.
    (
        *(
            (_K.HOLD_ALL, 0),
            (_K.RESIZE, 11),
            (_K.SETTLE, 0),
            (_K.STOP, 0),
            (_K.SETTLE, 0),
            (_K.START, 0),
            (_K.START, 0),
        ),
        *((_K.SETTLE, 0), (_K.PASS, 9), (_K.SETTLE, 0), (_K.OPEN, _ANY)),
    ),
    # A guest stops and starts again while its range is on its way.
    (
        *((_K.START, 0), (_K.DELIVER_UP, 1), (_K.DELIVER_DOWN, 1), (_K.DELIVER_DOWN, 1), (_K.KERNEL, 0)),
        *((_K.KERNEL, 0), (_K.DELIVER_UP, 1), (_K.STOP, 0), (_K.START, 0), (_K.DELIVER_DOWN, 0), (_K.KERNEL, 0)),
        *((_K.OPEN, _ANY), (_K.SETTLE, 0), (_K.OPEN, _ANY)),
    ),
    # A guest waits for ports, and ends while nobody takes note of it.
    (
        *((_K.OPEN, _ANY), (_K.HOLD_ALL, 0), (_K.RESIZE, 11), (_K.SETTLE, 0), (_K.HOLD_ALL, 0), (_K.START, 0)),
        *((_K.SETTLE, 0), (_K.KILL_CPMD, 0), (_K.STOP, 0), (_K.START_CPMD, 0), (_K.CONNECT, 0)),
    ),
    # A live migration, and the look of libvirt's list at its end.
    (
        *((_K.MIGRATE, _ANY), (_K.SETTLE, 0), (_K.LIST, 0), (_K.OPEN, _ANY), (_K.RESUME, _ANY), (_K.LEFT, 0)),
        *((_K.LIST, 0), (_K.SETTLE, 0), (_K.OPEN, _ANY)),
    ),
)
"""What often happens in that order. Stories have parts of them, with other things between."""
_PHRASE = 0.02
"""Share of a story's events at which one begins."""
_KEPT = 0.85
"""Share of a phrase that happens."""
_BETWEEN = 0.25
"""How often something else happens between."""
_FOCUS = 0.6
"""Share of the events about nodes that are about the same one: what is rare needs many of them there."""
STEPS = 200
"""Steps of a story: events in which something happens."""
EVENTS = 600
"""Events that are drawn for it: usually enough."""


def generate(seed: int, events: int = EVENTS, kinds: Iterable[Kind] = USUAL) -> Story:
    """
    Return the story of a seed.

    :param events: How many are drawn; those that would do nothing at their moment included.
    :param kinds: The kinds that may happen.
    """
    rng = random.Random(seed)
    chosen = [kind for kind in Kind if kind in set(kinds)]
    theme = list(THEMES.values())[seed // 2 % len(THEMES)]
    cumulative = list(itertools.accumulate(_WEIGHTS[kind][0] * theme.get(kind, 1.0) for kind in chosen))
    draws = rng.choices(chosen, cum_weights=cumulative, k=events)
    uniform = rng.random
    vms = _VMS_OF_A_STORY[seed % len(_VMS_OF_A_STORY)]
    focus = NODES[int(uniform() * len(NODES))] if uniform() < _FOCUS else HOSTS[0]
    drawn = []
    phrase: list[tuple[Kind, int]] = []
    about = 1
    for kind in draws:
        if not phrase and uniform() < _PHRASE:
            phrase = [
                each for each in PHRASES[int(uniform() * len(PHRASES))] if uniform() < _KEPT and each[0] in chosen
            ]
            about = 1 + int(uniform() * vms)
        # Small numbers often, large ones sometimes.
        number, vm, share = int(uniform() ** 2 * 12), 1 + int(uniform() * vms), _FOCUS
        if phrase and uniform() >= _BETWEEN:
            kind, wanted = phrase.pop(0)
            vm, share = about, 0.9
            number = number if wanted == _ANY else wanted
        whom = _WEIGHTS[kind][1]
        who = focus if focus in whom and uniform() < share else whom[int(uniform() * len(whom))] if whom else ""
        drawn.append(Event(kind, who, vm, number))
    return Story(seed, 1 + seed % 2, tuple(drawn))
