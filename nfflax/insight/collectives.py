"""What devices exchange in one run of a compiled program, read from its HLO text.

A collective inside a loop counts as often as the loop runs it, which the program says outright
(CPU) or in the loop's condition (TPU). One that a compiler has taken to pieces, each fused with
other work, counts once: the pieces share a channel.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # others end in their number of bits
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" (?P<opcode>[a-z][\w-]*)\((?P<operands>[^()]*)")
_ARRAY = re.compile(r"(?P<type>[a-z]+\d*(?:e\d+m\d+\w*)?)\[(?P<shape>[\d,]*)\]")
_NAMES = r"(?P<names>%?[\w.-]+(?:, %?[\w.-]+)*)"
_CALLED = re.compile(rf"(?:calls|to_apply|\w*_computations?)=\{{?{_NAMES}")
_LOOP = re.compile(r"condition=%?(?P<condition>[\w.-]+), body=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"[su]\d+\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass(frozen=True)
class Collective:
    """All of a program's exchanges of one kind within groups of one size."""

    kind: str
    devices: int
    """That exchange with each other."""
    count: int
    """In one run of the program."""
    bytes: int
    """Of the whole arrays, on each device, in one run: of what is summed, gathered, moved."""

    @property
    def sent(self) -> float:
        """Bytes that leave each device, passed around in a ring."""
        return ring_bytes(self.kind, self.bytes, self.devices)


def ring_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that leave each of `devices` which exchange an array of `size` bytes in a ring."""
    if kind == "collective-permute":
        return float(size)
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


@dataclass
class _Computation:
    """One function of an HLO module: what it exchanges itself, and what it calls how often."""

    exchanges: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Channel, kind, devices, bytes."""
    calls: list[tuple[str, int]] = field(default_factory=list)
    fusions: set[str] = field(default_factory=set)
    """Those of its calls that are fused work."""
    loops: list[tuple[str, str]] = field(default_factory=list)
    """(condition, body) of those whose length is in the condition."""
    limit: int = 1
    """The largest number in it: how often a loop runs, if this is its condition."""


def collectives(hlo: str, devices: int) -> tuple[Collective, ...]:
    """What a compiled program for so many devices exchanges, the kinds that move most first."""
    computations, entry = _parsed(hlo, devices)
    counts: Counter[tuple[str, int]] = Counter()
    sizes: Counter[tuple[str, int]] = Counter()
    fusions = set().union(*(computation.fusions for computation in computations.values()))
    pieces: set[str] = set()
    for name, times in _runs(computations, entry).items():
        for channel, kind, group, size in computations[name].exchanges:
            is_known = name in fusions and channel in pieces
            if name in fusions:
                pieces.add(channel)
            if group > 1 and not is_known:
                counts[kind, group] += times
                sizes[kind, group] += times * size
    found = [Collective(*key, counts[key], sizes[key]) for key in counts]
    return tuple(sorted(found, key=lambda each: -each.sent))


def _runs(computations: Mapping[str, _Computation], entry: str) -> Counter[str]:
    """How often each computation runs when the entry runs once."""
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        if name not in computations:
            return
        runs[name] += times
        computation = computations[name]
        for called, often in computation.calls:
            run(called, times * often)
        for condition, body in computation.loops:
            run(body, times * computations[condition].limit)

    run(entry, 1)
    return runs


def _parsed(hlo: str, devices: int) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = {}
    entry, current, groups = "", _Computation(), {}
    for line in map(str.strip, hlo.splitlines()):
        if header := _HEADER.match(line):
            current = computations[header["name"]] = _Computation()
            entry = header["name"] if header["entry"] else entry
        elif instruction := _INSTRUCTION.match(line):
            _read(current, instruction["name"], instruction["rest"], devices, groups)
    return computations, entry


def _read(
    computation: _Computation, name: str, rest: str, devices: int, groups: dict[str, int]
) -> None:
    """Add what one instruction exchanges or calls. `groups` remembers what has only started."""
    if constant := _CONSTANT.match(rest):
        computation.limit = max(computation.limit, int(constant[1]))
    operation = _OPCODE.search(rest)
    if not operation:
        return
    opcode, result = operation["opcode"], rest[: operation.start()]
    if loop := _LOOP.search(rest):
        if trips := _TRIPS.search(rest):
            computation.calls.append((loop["body"], int(trips[1])))
        else:
            computation.loops.append((loop["condition"], loop["body"]))
    for called in _CALLED.finditer(rest):
        names = called["names"].replace("%", "").split(", ")
        computation.calls += [(each, 1) for each in names]
        computation.fusions |= set(names) if opcode == "fusion" else set()
    kind, phase = _kind_and_phase(opcode)
    if not kind:
        return
    if phase == "start":
        groups[name] = _group(rest, devices)
        return
    started = operation["operands"].split(",")[0].split("%")[-1].strip()
    group = groups.get(started, 1) if phase == "done" else _group(rest, devices)
    size = _size(result) * (group if kind == "reduce-scatter" else 1)
    channel = _CHANNEL.search(rest)
    computation.exchanges.append((channel[1] if channel else name, kind, group, size))


def _kind_and_phase(opcode: str) -> tuple[str, str]:
    """The kind of a collective, and whether this is its "start", its "done" or all of it."""
    for kind in KINDS:
        if opcode in (kind, f"{kind}-start", f"{kind}-done"):
            return kind, opcode[len(kind) + 1 :]
    return "", ""


def _size(result: str) -> int:
    """Bytes of an array, or of all in a tuple."""
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * _bits(kind) // 8
        for kind, shape in _arrays(result)
    )


def _arrays(result: str) -> Iterator[tuple[str, str]]:
    """Type and shape of every array; layouts, which look alike, stand in braces."""
    for match in _ARRAY.finditer(re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", result)):
        yield match["type"], match["shape"]


def _bits(kind: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS.get(kind) or (int(digits[1]) if digits else 0)


def _group(rest: str, devices: int) -> int:
    """How many devices exchange with each other: HLO has four ways to say so."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 2 if pairs[1] else 1
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return devices
