"""Bytes moved and kernels launched by a compiled XLA program, read off its optimized HLO text.

XLA's own cost analysis ("bytes accessed") counts the body of a loop once, however often it runs, and a round is
loops in loops. Here a body counts as often as its known trip count says. The rule for one instruction is that
of the cost analysis: the bytes of its operands and of its result; of an operand that a fusion only slices, the
slice. It is an estimate of memory traffic: caches and buffers that XLA updates in place are not known to it.
"""

import re
from typing import NamedTuple

SIZE = {"pred": 1, "s4": 1, "u4": 1, "token": 0, "c64": 8, "c128": 16}
SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)[^=]*\{\s*$")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "opt-barrier",
    "partition-id", "replica-id", "optimization-barrier", "domain",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


class Traffic(NamedTuple):
    """What one run of a program does."""

    bytes: float
    kernels: float  # instructions that are neither free nor control flow
    unknown_loops: int  # loops whose trip count the compiler does not know; counted once
    conditionals: float = 0.0


class _Instruction(NamedTuple):
    name: str
    size: int  # bytes of the result
    opcode: str
    operands: list[str]
    rest: str
    root: bool


def size_of(shape: str) -> int:
    """Bytes of an HLO type: "f32[2,3]{1,0}" or a tuple of such."""
    total = 0
    for kind, dims in SHAPE.findall(shape):
        bits = re.search(r"\d+", kind)
        width = SIZE[kind] if kind in SIZE else int(bits.group()) // 8
        for n in dims.split(",") if dims else []:
            width *= int(n)
        total += width
    return total


def parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """-> ({computation: instructions}, name of the entry). ValueError where there is no entry."""
    computations, entry, current = {}, None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := (None if line.startswith((" ", "HloModule")) else COMPUTATION.match(line)):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            inside = rest[: _closing(rest)]
            operands = re.findall(r"%([\w.\-]+)", inside)
            current.append(_Instruction(name, size_of(shape), opcode, operands, rest[len(inside) :], bool(root)))
    if entry is None:
        raise ValueError("the text holds no ENTRY computation")
    return computations, entry


def _closing(text: str) -> int:
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return place
    return len(text)


def traffic(text: str) -> Traffic:
    """Of the program in `text`, `compiled.as_text()`. ValueError where it is no HLO module."""
    computations, entry = parse(text)
    done: dict[str, Traffic] = {}

    def called(rest: str, *attributes: str) -> list[str]:
        names = []
        for attribute in attributes:
            if found := re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest):
                names += re.findall(r"[\w.\-]+", found.group(1))
        return [name for name in names if name in computations]

    def sliced(body: list[_Instruction], parameter: _Instruction) -> int:
        """Bytes that a fusion reads of a parameter: the slices, where it does nothing else with it."""
        uses = [i for i in body if parameter.name in i.operands]
        total = 0
        for use in uses:
            if use.opcode in SLICES and use.operands[0] == parameter.name:
                total += use.size
            elif use.opcode == "bitcast":
                total += min(sliced(body, use), parameter.size)
            elif use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name:
                continue  # written in place
            else:
                return parameter.size
        return min(total, parameter.size)

    def written(body: list[_Instruction], size: int) -> int:
        """Bytes a fusion writes: of an update in place, the update."""
        sizes = {i.name: i.size for i in body}
        root = next(i for i in body if i.root)
        if root.opcode == "dynamic-update-slice":
            return sizes.get(root.operands[1], size)
        return size

    def one(i: _Instruction, sizes: dict[str, int]) -> int:
        if i.opcode == "fusion" and (names := called(i.rest, "calls")):
            body = computations[names[0]]
            parameters = [p for p in body if p.opcode == "parameter"]
            return written(body, i.size) + sum(sliced(body, p) for p in parameters)
        if i.opcode in SLICES:
            return 2 * i.size
        if i.opcode == "dynamic-update-slice":
            return 2 * sizes.get(i.operands[1], i.size)
        return i.size + sum(sizes.get(name, 0) for name in i.operands)

    def of(name: str) -> Traffic:
        if name in done:
            return done[name]
        total, kernels, unknown, conditionals = 0.0, 0.0, 0, 0.0
        sizes = {i.name: i.size for i in computations[name]}
        for i in computations[name]:
            if i.opcode in FREE:
                continue
            if i.opcode == "while":
                trips = TRIPS.search(i.rest)
                times = int(trips.group(1)) if trips else 1
                unknown += trips is None
                inner = [of(n) for n in called(i.rest, "body")]
            elif i.opcode == "conditional":
                conditionals += 1
                branches = called(i.rest, "branch_computations", "true_computation", "false_computation")
                times, inner = 1, [max((of(n) for n in branches), key=lambda t: t.bytes)]
            elif i.opcode == "call":
                times, inner = 1, [of(n) for n in called(i.rest, "to_apply")]
            else:
                total, kernels = total + one(i, sizes), kernels + 1
                continue
            total += times * sum(t.bytes for t in inner)
            kernels += times * sum(t.kernels for t in inner)
            unknown += sum(t.unknown_loops for t in inner)
            conditionals += times * sum(t.conditionals for t in inner)
        done[name] = Traffic(total, kernels, unknown, conditionals)
        return done[name]

    return of(entry)
