"""Reads a compiled program: the text of XLA's optimised HLO.

The form is that of `jax.stages.Compiled.as_text`: tables of source lines, then computations with
one instruction a line. Computations call each other in fusions, loops and branches.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}  # others have their bits in their names
ON_CHIP = re.compile(r"S\([1-9]")  # a memory space other than the chip's main memory
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^| )([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")
_QUOTED = re.compile(r'^(\d+) "(.*)"$')


@dataclass(frozen=True)
class Array:
    """Shape of an array.

    Attributes:
        dtype: XLA's name of the type, such as `bf16`.
        sides: Its sides.
        on_chip: True if it is in the core's own memory, and so costs no traffic.
    """

    dtype: str
    sides: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Its size."""
        bits = BITS.get(self.dtype) or int(re.sub(r"\D*(\d+).*", r"\1", self.dtype) or 0)
        return math.prod(self.sides) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
        name: Its name, unique in the program.
        opcode: XLA's name of the operation.
        arrays: What it returns; several for a tuple.
        operands: Names of its operands.
        text: The rest of its line: attributes and metadata.
        is_root: True if it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def bytes(self) -> float:
        """Size of what it returns."""
        return sum(array.bytes for array in self.arrays)

    def called(self, attribute: str) -> list[str]:
        """Returns the names of computations in an attribute, such as `body`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.text)
        return _NAME.findall(found[1]) if found else []


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: Instructions by name, of each computation by name.
        entry: Name of the computation that is run.
        frames: Source lines, innermost first, by the number of a stack frame.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    frames: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def source(self, instruction: Instruction) -> tuple[str, ...]:
        """Returns the source lines that made an instruction, `file:line function`."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.text)
        return self.frames.get(int(found[1]), ()) if found else ()

    def trips(self, loop: Instruction) -> tuple[int, bool]:
        """Returns how often a loop runs at most, and True if this is known.

        A loop from 0 that counts to a constant is known. Any other runs an unknown number of
        times: 1, or the constant that one of its conditions compares with.
        """
        (name,) = loop.called("condition")
        condition = self.computations[name]
        (root,) = (x for x in condition.values() if x.is_root)
        limits = [limit for limit in self._limits(root, condition) if limit is not None]
        return max(limits, default=1), root.opcode == "compare" and bool(limits)

    def _limits(
        self, instruction: Instruction, around: Mapping[str, Instruction]
    ) -> Iterator[int | None]:
        """Yields the constants that an instruction's `<` comparisons have on their right.

        A loop over several counters, as `jax.vmap` makes, reduces their comparisons.
        """
        if instruction.opcode in ("and", "reduce"):
            for name in instruction.operands:
                if name in around:
                    yield from self._limits(around[name], around)
        elif instruction.opcode == "fusion":
            inside = self.computations[instruction.called("calls")[0]]
            yield from self._limits(next(x for x in inside.values() if x.is_root), inside)
        elif instruction.opcode == "compare" and "direction=LT" in instruction.text:
            right = around.get(instruction.operands[-1])
            while right is not None and right.opcode == "broadcast":
                right = around.get(right.operands[0])
            if right is not None and right.opcode == "constant" and "s32[]" in right.text:
                yield int(re.search(r"constant\((-?\d+)\)", right.text)[1])


def parse(text: str) -> Program:
    """Parses a compiled program.

    Args:
        text: Optimised HLO.

    Raises:
        ValueError: The text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = computations.setdefault(opening[2], {})
            entry = opening[2] if opening[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return Program(computations, entry, _read_frames(text))


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(rest)
    returned, after = rest[: opcode.start(1)], rest[opcode.end() :]
    operands = after[: _closing(after)]
    return Instruction(
        name, opcode[1], tuple(_arrays(returned)), tuple(_NAME.findall(operands)), rest, is_root
    )


def _closing(text: str) -> int:
    """Returns the place of the bracket that closes one opened before the text."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sides, layout in _ARRAY.findall(text):
        yield Array(
            dtype, tuple(map(int, filter(None, sides.split(",")))), bool(ON_CHIP.search(layout))
        )


def _read_frames(text: str) -> dict[int, tuple[str, ...]]:
    """Reads the tables of source lines at the head of a program."""
    tables: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.partition("\n\n%")[0].splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, [])
        else:
            current.append(line)
    files, functions = (
        {found[1]: found[2] for line in tables.get(name, []) if (found := _QUOTED.match(line))}
        for name in ("FileNames", "FunctionNames")
    )
    places = {
        found[1]: f"{files[found[2]]}:{found[4]} {functions[found[3]]}"
        for line in tables.get("FileLocations", [])
        if (found := _LOCATION.match(line))
    }
    links = {
        int(found[1]): (places[found[2]], int(found[3]))
        for line in tables.get("StackFrames", [])
        if (found := _FRAME.match(line))
    }

    @functools.cache
    def stack(frame: int) -> tuple[str, ...]:
        place, parent = links[frame]
        return (place, *(stack(parent) if parent != frame and parent in links else ()))

    return {frame: stack(frame) for frame in links}
