"""Registers of a matrix product in flight, as sm_90's machine code uses them: a walk over its control flow.

`HGMMA` is asynchronous. It reads its left operand from shared memory or from four registers of each thread, and adds to
accumulators in registers, some time before `WARPGROUP.DEPBAR.LE gsb0, n` leaves at most n groups of products running.
Until then an instruction that writes either, or reads an accumulator, is a hazard: the result depends on who is first.
The compiler has to wait in time; Triton 3.6 does not for some products of a masked x (triton-lang/triton#9433).

The walk follows every branch both ways with the groups that are still running, until it comes to no new state. It
knows nothing of predicates: an instruction that is skipped where it matters would count as a hazard.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MOST_RUNNING = 64
"""Groups; more can only come of a loop that never waits."""

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<text>[^;]+?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_?\w+):")
_TARGET = re.compile(r"`\((\.L_?\w+)\)")
_JUMP = re.compile(r"BRA(?:\.\w+)*\s+`\(")
"""Without a predicate among its operands, too."""
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_PREDICATE = re.compile(r"!?U?P(?:\d|T|R)$")
_PRODUCT = re.compile(r"HGMMA\.64x(?P<columns>\d+)x\S+ R(?P<first>\d+), (?:R(?P<left>\d+)|gdesc\S+),")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
# A register that they name first is read.
_WRITES_NOTHING = ("ST", "RED", "BAR", "BRX", "RET", "CALL", "JMX", "WARPSYNC", "NANOSLEEP", "CCTL", "SYNCS", "UTMA")
_ENDS = ("EXIT", "RET", "KILL")
_PRODUCT_READS = (4, 2, 4)
"""Registers of an mma.sync's operands: left, right, accumulator."""


class Instruction(NamedTuple):
    """One line of SASS: what it is, and which registers it writes and reads, products apart."""

    text: str
    writes: frozenset[int]
    reads: frozenset[int]
    always: bool
    """It has no predicate."""


class Product(NamedTuple):
    """The registers of one HGMMA of a thread."""

    left: frozenset[int]
    accumulators: frozenset[int]


class Hazard(NamedTuple):
    """An instruction that touches a register of a product that may still run."""

    product: str
    instruction: str
    what: str

    def __str__(self) -> str:
        return f"{self.instruction} {self.what} {self.product}"


def _width(opcode: str) -> int:
    """Registers that a result takes."""
    parts = opcode.split(".")
    if "128" in parts:
        return 4
    if parts[0] == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if parts[0] in ("HMMA", "IMMA"):
        return 4
    wide = {"64", "WIDE", "F64", "S64", "U64"} & set(parts)
    return 2 if wide or parts[0] in ("DADD", "DMUL", "DFMA") or (parts[0] == "CS2R" and "32" not in parts) else 1


def _instruction(text: str, always: bool) -> Instruction:
    opcode, _, rest = text.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    while operands and _PREDICATE.match(operands[0]):
        operands.pop(0)
    first = re.fullmatch(r"R(\d+)(?:\.\w+)?", operands[0]) if operands else None
    writes: frozenset[int] = frozenset()
    if first and not opcode.startswith(_WRITES_NOTHING):
        writes = frozenset(range(int(first[1]), int(first[1]) + _width(opcode)))
        operands.pop(0)
    widths = [1] * len(operands)
    if opcode.startswith(("ST", "RED", "ATOM")) and operands:
        widths[-1] = _width(opcode)  # what is stored comes last
    elif opcode.startswith(("HMMA", "IMMA")):
        widths[: len(_PRODUCT_READS)] = _PRODUCT_READS
    reads = {
        int(number) + offset
        for operand, width in zip(operands, widths, strict=False)
        for number, is_pair in _REGISTER.findall(operand)
        for offset in range(max(width, 2 if is_pair else 1))
    }
    return Instruction(text, writes, frozenset(reads), always)


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions, labels = list[Instruction](), dict[str, int]()
    for line in sass.splitlines():
        if found := _LINE.match(line):
            instructions.append(_instruction(found["text"], always=found["predicate"] is None))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    return instructions, labels


def _product(text: str) -> Product | None:
    found = _PRODUCT.match(text)
    if not found:
        return None
    first, registers = int(found["first"]), int(found["columns"]) // 2
    left = range(int(found["left"]), int(found["left"]) + 4) if found["left"] else ()
    return Product(frozenset(left), frozenset(range(first, first + registers)))


def hazards(sass: str) -> list[Hazard]:
    """Every hazard in a kernel's machine code, each pair of instructions once; a walk that does not end is one, too."""
    instructions, labels = _parse(sass)
    products = [_product(instruction.text) for instruction in instructions]
    found: dict[tuple[int, int], Hazard] = {}
    # A state: where, which products each running group has (by their places), which belong to none yet.
    Groups = tuple[tuple[int, ...], ...]
    todo: list[tuple[int, Groups, tuple[int, ...]]] = [(0, (), ())]
    seen = set(todo)

    def follow(place: int, groups: Groups, open_group: tuple[int, ...]) -> None:
        state = (place, groups, open_group)
        if place < len(instructions) and state not in seen:
            seen.add(state)
            todo.append(state)

    while todo:
        place, groups, open_group = todo.pop()
        while place < len(instructions):
            instruction, product = instructions[place], products[place]
            running = (*(one for group in groups for one in group), *open_group)
            for one in running:
                other = products[one]
                assert other is not None
                what = ""
                if instruction.writes & other.left and product is None:
                    what = "overwrites what is still read by"
                elif product is None and instruction.writes & other.accumulators:
                    what = "overwrites the accumulator of"
                elif product is None and instruction.reads & other.accumulators:
                    what = "reads the accumulator of"
                elif product is not None and (product.left | product.accumulators) & other.left - product.left:
                    what = "adds to what is still read by"
                elif product is not None and product.left & other.accumulators:
                    what = "reads the accumulator of"
                if what:
                    key = (one, place)
                    found.setdefault(key, Hazard(instructions[one].text, instruction.text, what))
            if product is not None:
                open_group = (*open_group, place)
                if "gsb0" in instruction.text:
                    groups, open_group = (*groups, open_group), ()
            if wait := _WAIT.match(instruction.text):
                keep = int(wait[1], 16)
                groups = groups[-keep:] if keep else ()
            if len(groups) > MOST_RUNNING:
                found[place, place] = Hazard(instruction.text, instruction.text, "is never waited for:")
                break
            if target := _TARGET.search(instruction.text):
                follow(labels[target[1]], groups, open_group)
                if instruction.always and _JUMP.match(instruction.text):
                    break
            elif instruction.always and instruction.text.startswith(_ENDS):
                break
            place += 1
    return list(found.values())
