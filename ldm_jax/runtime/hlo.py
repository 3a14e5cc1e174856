"""What the text of a compiled program says and its cost analysis does not: loops, collectives, and
which memory holds an array.

XLA's cost analysis counts the body of a loop once, and arrays that the compiler keeps on the chip
like those of the main memory. The text of the program has the instructions of every computation,
how often a loop runs, and the memory of every array.
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
      main: bytes that all instructions read from and write to the main memory, over those that
        they read and write in any memory with every loop's body counted once.
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
    sent, moved, once = {}, 0.0, 0.0
    for name, instructions in computations.items():
        sizes = {each.name: (each.main, each.size) for each in instructions}
        for each in instructions:
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES and calls[name]:
                sent[kind] = sent.get(kind, 0.0) + calls[name] * _sent(kind, each)
            if rounds[name] and each.kind not in _FREE and not each.kind.endswith("-done"):
                arrays = [(each.main, each.size)]
                if each.kind != "copy-start":  # whose result has the operand beside the copy
                    arrays += (sizes.get(operand, (0, 0)) for operand in each.operands)
                main, size = (sum(column) for column in zip(*arrays, strict=True))
                moved, once = moved + rounds[name] * main, once + size
    return Traffic(sent, moved / once if once else 1.0)


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
