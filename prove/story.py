"""
A story: a site and a list of events, as values. The same story always goes the same way, whatever is left out of it.

Events do not depend on the state of the site: one that makes no sense at its moment does nothing. So any part of a
story is a story too, which is what makes shrinking possible (:mod:`prove.shrink`).
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal, NamedTuple

from cpm.protocol.model import Role
from prove.sites import names


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
    """The operator fences a node if it is off, or if it hangs, with the cables out but for that of its session."""
    LIBVIRT = "libvirt"
    """natd loses libvirt, or has it again."""
    DISK_FULL = "disk full"
    """The next n + 1 commits fail; with an odd VM because the disk does not work at all."""
    # Faults of the manager's machine.
    CLOCK = "clock"
    """The wall clock of the manager's machine is set."""
    RELOAD = "reload"
    """The operator has cpmd take its settings anew."""
    REBOOT_MANAGER = "reboot manager"
    """The machine on which cpmd runs boots again, and is off for some time."""
    # Faults of people.
    BACKUP = "backup"
    """The operator makes a backup of the ledger."""
    RESTORE = "restore"
    """cpmd is stopped, an earlier ledger takes the place of its own, cpmd is started: n = 0, 3, …: by ``virt-ports
    restore``; n = 1, 4, …: a plain copy, which nodes refuse, and with odd n its lock file as well; n = 2, 5, …:
    ``restore --accept``, the ledger stays."""
    APPROVE = "approve"
    """The operator approves a node that is not approved yet, or not any more."""
    COPY = "copy"
    """A second VM with the UUID of one that runs begins on another machine: a copy, or the same one restarted while
    its host only cannot be reached. While there are two, ``stop`` ends the first, the second or both, by n."""
    IMPOSTOR = "impostor"
    """Another machine says that it is this node; n odd: with the identity of its machine, while it is connected."""
    LIE = "lie"
    """A host says what is not so: of its VMs, of counts, or of what its kernel holds."""
    EDGE_LIES = "edge lies"
    """An edge does."""
    BREAK = "break"
    """A machine breaks, and stays so to the end of the story: n = 0, 3, …: its kernel refuses all; n = 1, 4, …: its
    natd goes on and its kernel is never changed, so it confirms nothing; n = 2, 5, …: it has no power."""
    # In some stories only.
    FORWARD = "forward"
    """A block of ports is let in to a VM, which may run or not; n odd: only while it runs; n = 3, 7, …: its guest asks
    for it (PCP), for so many times 20 s."""
    END_FORWARD = "end forward"
    """A forward of a VM is removed."""


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
        Kind.RESUME, Kind.LEFT, Kind.ABORT, Kind.RESIZE, Kind.RELOCATE, Kind.NEED, Kind.LIE, Kind.EDGE_LIES, Kind.COPY,
        Kind.FORWARD, Kind.END_FORWARD,
    }
)  # fmt: skip

VMS = 5

_Whom = Role | Literal["nodes", "nobody"]
HOSTS: Final = Role.HOST
EDGES: Final = Role.EDGE
NODES: Final = "nodes"
NOBODY: Final = "nobody"

_WEIGHTS: Mapping[Kind, tuple[float, _Whom]] = {
    Kind.DELIVER_UP: (24, NODES),
    Kind.DELIVER_DOWN: (22, NODES),
    Kind.KERNEL: (20, NODES),
    Kind.PASS: (7, NOBODY),
    Kind.SETTLE: (1.5, NOBODY),
    Kind.MEASURE: (9, HOSTS),
    Kind.PRESENT: (2, NODES),
    Kind.LIST: (2, HOSTS),
    Kind.START: (6, HOSTS),
    Kind.STOP: (2, HOSTS),
    Kind.STOP_UNSEEN: (0.7, HOSTS),
    Kind.PLUG: (1, HOSTS),
    Kind.OPEN: (7, NOBODY),
    Kind.HOLD_ALL: (1.5, NOBODY),
    Kind.CLOSE: (2, NOBODY),
    Kind.MIGRATE: (3, HOSTS),
    Kind.RESUME: (3, NOBODY),
    Kind.LEFT: (2.5, NOBODY),
    Kind.ABORT: (0.8, NOBODY),
    Kind.RESIZE: (4, NOBODY),
    Kind.RELOCATE: (1, NOBODY),
    Kind.NEED: (1, NOBODY),
    Kind.OWN_PORTS: (0.5, EDGES),
    Kind.LOSE_AT_NODE: (1.5, NODES),
    Kind.LOSE_AT_MANAGER: (1.5, NODES),
    Kind.CONNECT: (8, NODES),
    Kind.PARTITION: (0.5, NODES),
    Kind.HEAL: (1, NOBODY),
    Kind.KILL_NATD: (1, NODES),
    Kind.START_NATD: (3, NODES),
    Kind.KILL_CPMD: (0.8, NOBODY),
    Kind.START_CPMD: (2.5, NOBODY),
    Kind.REFUSE: (1, NODES),
    Kind.FLUSH: (0.3, NODES),
    Kind.POWER_OFF: (0.3, NODES),
    Kind.POWER_ON: (1.5, NODES),
    Kind.FENCE: (1, NODES),
    Kind.LIBVIRT: (0.6, HOSTS),
    Kind.DISK_FULL: (0.3, NOBODY),
    Kind.CLOCK: (0.5, NOBODY),
    Kind.RELOAD: (0.2, NOBODY),
    Kind.REBOOT_MANAGER: (0.3, NOBODY),
    Kind.BACKUP: (0.05, NOBODY),
    Kind.RESTORE: (0.03, NOBODY),
    Kind.APPROVE: (0.5, EDGES),
    Kind.COPY: (0.3, HOSTS),
    Kind.IMPOSTOR: (0.1, NODES),
    Kind.LIE: (0.01, HOSTS),
    Kind.BREAK: (0.05, NODES),
    Kind.EDGE_LIES: (0.01, EDGES),
    Kind.FORWARD: (0.0, NOBODY),
    Kind.END_FORWARD: (0.0, NOBODY),
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
        **dict.fromkeys((_K.KILL_CPMD, _K.DISK_FULL, _K.KILL_NATD, _K.RELOAD), 5.0),
        **dict.fromkeys((_K.START_CPMD, _K.START_NATD, _K.CONNECT, _K.RESIZE, _K.OPEN), 2.0),
    },
    "moves": {
        **dict.fromkeys((_K.MIGRATE, _K.RESUME, _K.LEFT, _K.ABORT, _K.RELOCATE, _K.LIST), 4.0),
        **dict.fromkeys((_K.OPEN, _K.STOP_UNSEEN), 2.0),
    },
    "shortage": {
        **dict.fromkeys((_K.START, _K.STOP, _K.PASS, _K.HOLD_ALL, _K.CLOSE, _K.RESIZE, _K.MEASURE), 3.0),
    },
    # A liar's own VMs are not judged, so most stories have none.
    "lies": {_K.LIE: 200.0, _K.EDGE_LIES: 200.0, **dict.fromkeys((_K.START, _K.OPEN, _K.IMPOSTOR), 2.0)},
    "restores": {
        **dict.fromkeys((_K.BACKUP, _K.RESTORE), 30.0),
        **dict.fromkeys((_K.PARTITION, _K.POWER_OFF, _K.KILL_NATD, _K.START_CPMD, _K.FENCE, _K.RESIZE), 2.0),
        **dict.fromkeys((_K.PASS, _K.CONNECT), 1.5),
    },
    "broken": {_K.BREAK: 30.0, **dict.fromkeys((_K.START, _K.STOP, _K.RESIZE, _K.PASS, _K.OPEN), 2.0)},
    "twins": {
        **dict.fromkeys((_K.COPY, _K.IMPOSTOR), 15.0),
        **dict.fromkeys((_K.PARTITION, _K.POWER_OFF, _K.STOP, _K.PASS), 3.0),
        **dict.fromkeys((_K.START, _K.OPEN, _K.HEAL, _K.CONNECT), 2.0),
    },
}
"""What happens more often, or less, in a story; one in as many stories has each theme."""

WITH_FORWARDS: Final = 16
"""One in so many stories has forwards; all others are what they were before there were any."""
_FORWARDS: Final[Mapping[Kind, float]] = {_K.FORWARD: 4.0, _K.END_FORWARD: 1.0}
"""How often they come and go there."""

ALL_KINDS: frozenset[Kind] = frozenset(Kind)


class Story(NamedTuple):
    """A site and what happens there."""

    seed: int
    externals: int
    """External addresses of the pool."""
    events: tuple[Event, ...]
    site: str = "apart"
    """One of :data:`prove.sites.SITES`."""
    late: str = ""
    """A machine that is not approved when the story begins; empty: none."""


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
_CALM: tuple[tuple[Kind, int], ...] = (
    *((_K.HEAL, 0), (_K.START_CPMD, 0), (_K.POWER_ON, 0), (_K.START_NATD, 0), (_K.CONNECT, 0), (_K.CONNECT, 0)),
    *((_K.SETTLE, 0), (_K.STOP, 2), (_K.SETTLE, 0)),
)
"""Everybody is there, and the guest is not."""
PHRASES_OF_CRASHES: tuple[tuple[tuple[Kind, int] | tuple[Kind, int, int], ...], ...] = (
    # A kernel refuses a range, cpmd starts anew, and natd tries again before it has heard what shall be.
    (
        *_CALM,
        *((_K.START, 0), (_K.REFUSE, 1), (_K.SETTLE, 0), (_K.KILL_CPMD, 0), (_K.START_CPMD, 0), (_K.DELIVER_DOWN, 0)),
        *((_K.CONNECT, 0), (_K.PASS, 6), (_K.KERNEL, 0), (_K.OPEN, _ANY), (_K.DELIVER_UP, 4), (_K.DELIVER_DOWN, 4)),
        *((_K.KERNEL, 0), (_K.SETTLE, 0)),
    ),
    # A guest that has ended is back before its host's kernel and the manager have followed either.
    (
        *_CALM,
        *((_K.START, 0), (_K.SETTLE, 0), (_K.STOP, 0), (_K.KILL_NATD, 0), (_K.START, 0), (_K.START_NATD, 0)),
        *((_K.KERNEL, 0), (_K.KERNEL, 0), (_K.OPEN, _ANY), (_K.DELIVER_UP, 0), (_K.CONNECT, 0), (_K.DELIVER_UP, 4)),
        *((_K.DELIVER_DOWN, 4), (_K.KERNEL, 0), (_K.SETTLE, 0)),
    ),
    # A guest has arrived by its source's word, and a commit fails before the destination has said so.
    (
        *_CALM,
        *((_K.START, 0), (_K.SETTLE, 0), (_K.MIGRATE, 0), (_K.SETTLE, 0), (_K.RESUME, 1), (_K.LEFT, 0)),
        *((_K.SETTLE, 0), (_K.OPEN, _ANY), (_K.DISK_FULL, 0), (_K.RESIZE, _ANY), (_K.SETTLE, 0)),
    ),
    # Two guests hold all that there is; a third one waits, and ends while cpmd is dead.
    (
        *_CALM,
        *((_K.START, 0, 1), (_K.START, 0, 2), (_K.SETTLE, 0), (_K.RESIZE, 11, 1), (_K.RESIZE, 11, 2)),
        *((_K.SETTLE, 0), (_K.HOLD_ALL, 0, 1), (_K.HOLD_ALL, 0, 2), (_K.START, 0), (_K.SETTLE, 0)),
        *((_K.KILL_CPMD, 0), (_K.STOP, 0), (_K.START_CPMD, 0), (_K.CONNECT, 0), (_K.SETTLE, 0)),
    ),
)
"""More of them, for stories of crashes. A third number says that it is about another VM than the rest."""
PHRASES_OF_RELOADS: tuple[tuple[tuple[Kind, int] | tuple[Kind, int, int], ...], ...] = (
    # A node says hello while the disk is full, and cpmd takes its settings anew.
    (
        *_CALM,
        *((_K.KILL_CPMD, 0), (_K.START_CPMD, 0), (_K.CONNECT, 0), (_K.SETTLE, 0), (_K.DISK_FULL, 2), (_K.START, 0)),
        *((_K.DELIVER_UP, 1), (_K.CONNECT, 0), (_K.DELIVER_UP, 1), (_K.RELOAD, 0), (_K.SETTLE, 0), (_K.PASS, 4)),
        *((_K.SETTLE, 0), (_K.CONNECT, 0), (_K.SETTLE, 0)),
    ),
)
"""More of them, for stories of crashes in which cpmd takes its settings anew."""
_SITES_OF_STORIES = ("apart", "apart", "apart", "mixed", "both")
_LATE = 0.15
"""Share of the stories in which one edge is approved while the story goes on."""
_PHRASE = 0.02
"""Share of a story's events at which one begins."""
_KEPT = 0.85
"""Share of a phrase that happens."""
_KEPT_OF_CRASHES = 0.97
"""The same for those of crashes, in which each event is needed."""
_BETWEEN = 0.25
"""How often something else happens between."""
_FOCUS = 0.6
"""Share of the events about nodes that are about the same one: what is rare needs many of them there."""
STEPS = 200
"""Steps of a story: events in which something happens."""
EVENTS = 600
"""Events that are drawn for it: usually enough."""


def generate(seed: int, events: int = EVENTS, kinds: Iterable[Kind] = ALL_KINDS) -> Story:
    """
    Return the story of a seed.

    :param events: How many are drawn; those that would do nothing at their moment included.
    :param kinds: The kinds that may happen.
    """
    rng = random.Random(seed)
    uniform = rng.random
    theme = list(THEMES)[seed // 2 % len(THEMES)]
    site = rng.choice(_SITES_OF_STORIES)
    whom = {NODES: names(site), HOSTS: names(site, Role.HOST), EDGES: names(site, Role.EDGE), NOBODY: ("",)}
    late = whom[EDGES][-1] if site == "apart" and uniform() < _LATE else ""
    vms = _VMS_OF_A_STORY[seed % len(_VMS_OF_A_STORY)]
    focus = whom[NODES][int(uniform() * len(whom[NODES]))] if uniform() < _FOCUS else whom[HOSTS][0]
    drawn = []
    extra = _FORWARDS if seed % WITH_FORWARDS == WITH_FORWARDS - 1 else {}
    for kind, wanted, about in _draw(rng, frozenset(kinds), theme, events, vms, extra):
        # Small numbers often, large ones sometimes.
        number = int(uniform() ** 2 * 12) if wanted == _ANY else wanted
        share = 0.9 if about else _FOCUS
        those = whom[_WEIGHTS[kind][1]]
        who = focus if focus in those and uniform() < share else those[int(uniform() * len(those))]
        drawn.append(Event(kind, who, about or 1 + int(uniform() * vms), number))
    return Story(seed, 1 + seed % 2, tuple(drawn), site, late)


def _draw(
    rng: random.Random, kinds: frozenset[Kind], theme: str, events: int, vms: int, extra: Mapping[Kind, float]
) -> Iterator[tuple[Kind, int, int]]:
    """Yield kinds, each with its number if a phrase says one, and with the VM that the phrase is about."""
    uniform = rng.random
    chosen = [kind for kind in Kind if kind in kinds]
    more = THEMES[theme]
    weights = (_WEIGHTS[kind][0] * more.get(kind, 1.0) + extra.get(kind, 0.0) for kind in chosen)
    cumulative = list(itertools.accumulate(weights))
    phrases = PHRASES + PHRASES_OF_CRASHES if theme == "crashes" else PHRASES
    if theme == "crashes" and _K.RELOAD in kinds:
        phrases += PHRASES_OF_RELOADS
    often = 2.0 * _PHRASE if theme == "crashes" else _PHRASE
    phrase: list[tuple[Kind, int] | tuple[Kind, int, int]] = []
    about = 1
    for kind in rng.choices(chosen, cum_weights=cumulative, k=events):
        if not phrase and uniform() < often:
            whole = phrases[int(uniform() * len(phrases))]
            kept = _KEPT if whole in PHRASES else _KEPT_OF_CRASHES
            phrase = [each for each in whole if uniform() < kept and each[0] in kinds]
            about = 1 + int(uniform() * vms)
        if phrase and uniform() >= _BETWEEN:
            kind, number, *other = phrase.pop(0)
            yield kind, number, 1 + (about - 1 + sum(other)) % vms
        else:
            yield kind, _ANY, 0
