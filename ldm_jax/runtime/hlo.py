"""What the text of a compiled program says and its cost analysis does not: loops, collectives, and
which memory holds an array.

XLA's cost analysis counts the body of a loop once, and arrays that the compiler keeps on the chip
as if they were in the main memory. The text of the program has the instructions of every
computation, how often a loop runs, and the memory of every array.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_ELSEWHERE = "S("  # in the layout of an array that is not in the main memory
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Instructions that move no bytes, or whose bytes their computations or their starts have.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all")
_FREE += ("while", "conditional", "call", "partition-id", "replica-id")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVES += ("ragged-all-to-all",)


class _Instruction(NamedTuple):
    name: str
    kind: str
    size: int  # of the result, bytes
    main: int  # of them in the main memory
    operands: list[str]
    text: str  # what follows the operands' opening parenthesis


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a chip moves in one run of a program.

    Attributes:
      sent: bytes sent to other chips, by the kind of collective, as a ring sends them.
      main: bytes that it reads from and writes to the main memory.
    """

    sent: dict[str, float]
    main: float


def traffic(text: str) -> Traffic:
    """The traffic of a compiled program, from `compiled.as_text()`."""
    computations, entry = _parsed(text)
    rounds, calls = {name: 0.0 for name in computations}, {name: 0.0 for name in computations}
    # `rounds` runs of computations that are instructions by themselves; `calls` also those within
    # fusions and the like, whose bytes the instruction that calls them has.
    for name, count, inside in _runs(computations, entry):
        calls[name] += count
        rounds[name] += 0.0 if inside else count
    sent, main = {}, 0.0
    for name, instructions in computations.items():
        sizes = {each.name: (each.main, each.size) for each in instructions}
        for each in instructions:
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES and calls[name]:
                sent[kind] = sent.get(kind, 0.0) + calls[name] * _sent(kind, each)
            if rounds[name] and each.kind not in _FREE and not each.kind.endswith("-done"):
                main += rounds[name] * sum(_accesses(each, sizes, computations))
    return Traffic(sent, main)


def _accesses(
    each: _Instruction,
    sizes: dict[str, tuple[int, int]],
    computations: dict[str, list[_Instruction]],
) -> Iterator[float]:
    """Bytes in the main memory of each array that an instruction reads or writes.

    Of an array that it slices, or writes a slice of, the slice counts.
    """
    if each.kind == "copy-start":  # its result has the operand beside the copy
        yield each.main
        return
    body, names = [each], each.operands
    if each.kind == "fusion":
        body = computations[_CALLED.search(each.text)[1]]
        numbered = {i.text.partition(")")[0]: i.name for i in body if i.kind == "parameter"}
        names = [numbered.get(str(number), "") for number in range(len(each.operands))]
    inside = {i.name: i for i in body}
    arrays = [(each.main, each.size, _written(body[-1], inside))]
    for operand, name in zip(each.operands, names, strict=True):
        main, size = sizes.get(operand, (0, 0))
        arrays.append((main, size, _read(name, size, body)))
    for main, size, touched in arrays:
        yield touched * main / max(size, 1)


def _read(name: str, size: int, body: list[_Instruction]) -> int:
    """Bytes of an array that the instructions of a computation read."""
    read = 0
    for user in body:
        if name not in user.operands:
            continue
        if user.kind == "bitcast":
            read += _read(user.name, size, body)
        elif user.kind == "dynamic-slice" and user.operands[0] == name:
            read += user.size
        elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
            return size
    return min(read, size)


def _written(result: _Instruction, inside: dict[str, _Instruction]) -> int:
    """Bytes that a computation writes, for its result."""
    if result.kind == "tuple":
        return sum(_written(inside[name], inside) for name in result.operands if name in inside)
    if result.kind == "bitcast" and result.operands[0] in inside:
        return _written(inside[result.operands[0]], inside)
    if result.kind == "dynamic-update-slice" and result.operands[1] in inside:
        return inside[result.operands[1]].size
    return result.size


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation, and the name of the first that runs."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if not line.startswith(" "):
            if opened := _COMPUTATION.match(line):
                current = computations[opened[2]] = []
                entry = opened[2] if opened[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, kind, rest = found[1], found[3], found[4]
            operands = _NAME.findall(rest[: rest.find(")")])
            current.append(_Instruction(name, kind, *_sizes(found[2]), operands, rest))
    return computations, entry


def _runs(
    computations: dict[str, list[_Instruction]], start: str, count: float = 1.0, inside=False
) -> Iterator[tuple[str, float, bool]]:
    """(computation, how often it runs, whether within a fusion or the like) of all reached."""
    yield start, count, inside
    for each in computations[start]:
        rounds = count * (_trips(each, computations) if each.kind == "while" else 1.0)
        within = inside or each.kind not in ("while", "conditional", "call")
        called = _CALLED.findall(each.text)
        for branches in _BRANCHES.findall(each.text):
            called += _NAME.findall(branches)
        for name in called:
            if name in computations:
                yield from _runs(computations, name, rounds, within)


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> float:
    """How often a loop runs: what the compiler says, or the constant of its condition; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return float(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
    instructions = computations.get(condition[1], []) if condition else []
    constants = [re.match(r"(\d+)\)", i.text) for i in instructions if i.kind == "constant"]
    return max((float(found[1]) for found in constants if found), default=1.0)


def _sizes(described: str) -> tuple[int, int]:
    """Bytes of an array or a tuple of arrays, as a type describes them; those in main memory."""
    total = main = 0
    for kind, bits, sides, layout in _ARRAY.findall(described):
        count = 1 if kind == "pred" else max(int(bits) // 8, 1)
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count
        main += 0 if _ELSEWHERE in layout else count
    return total, main


def _sent(kind: str, each: _Instruction) -> float:
    """Bytes that each member of a group sends in a ring (a permutation sends all it has)."""
    members, size = _members(each.text), each.size
    if each.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The result holds the operand as well.
        size = size * members / (members + 1) if kind == "all-gather" else size / 2
    match kind:
        case "all-reduce":
            return 2 * size * (members - 1) / members
        case "reduce-scatter":
            return size * (members - 1)
        case "collective-permute":
            return size
    return size * (members - 1) / members


def _members(text: str) -> int:
    """The number of chips in a group, from one of the notations of `replica_groups`."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        axes, count = dict(re.findall(r"'(\w+)'=(\d+)", found[1])), 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]):
            count *= int(part or axes[axis])
        return count
    return 1
