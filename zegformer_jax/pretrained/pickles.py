"""Pickles of arrays, read by `pickle.Unpickler` without running anything that they name.

Only `NAMES` are found, and what is found does no more than record its call. The unpickler's C code
trusts the numbers in a file, so `_inspect` follows the operations first and refuses those that
would exhaust it.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_OPERATIONS = 2_000_000  # a thousand tensors with their optimizer's state take about 100,000
MAX_HASHED = 3_000  # objects in all keys that are tuples
MAX_ARGUMENTS = 1_000  # objects in the arguments of a call
FRAME_HEADER = 9  # bytes
DICTS = frozenset("collections.OrderedDict collections.defaultdict".split())
# Calls in whose place their first argument can be; `encode` is of text in place of bytes.
PASSED = frozenset(
    "_codecs.encode torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state "
    "torch.jit._pickle.restore_type_tag".split()
)
ARRAYS = frozenset(
    "numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar "
    "numpy.core.numeric._frombuffer torch._utils._rebuild_tensor "
    "torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3".split()
)
# PyTorch's dtypes and classes of storages, by the names of NumPy's dtypes.
DTYPES = "bool complex64 complex128 float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8"
STORAGES = "Bool ComplexFloat ComplexDouble Half Float Double BFloat16 Char Short Int Long Byte"
TORCH_DTYPES = {
    f"torch.{x}": x for x in f"{DTYPES} uint16 uint32 uint64 float8_e4m3fn float8_e5m2".split()
}
TORCH_DTYPES |= {
    f"torch.{x}Storage": y for x, y in zip(STORAGES.split(), DTYPES.split(), strict=True)
}
TORCH_DTYPES |= {"torch.storage.UntypedStorage": "uint8"}
OTHERS = frozenset(
    "builtins.bytes builtins.complex builtins.dict builtins.float builtins.frozenset builtins.int "
    "builtins.list builtins.set builtins.tuple collections.Counter numpy.dtype numpy.ndarray "
    "torch.Size torch.device torch.jit._pickle.build_boollist torch.jit._pickle.build_doublelist "
    "torch.jit._pickle.build_intlist torch.jit._pickle.build_tensorlist "
    "torch.serialization._get_layout".split()
)
NAMES = DICTS | PASSED | ARRAYS | TORCH_DTYPES.keys() | OTHERS
# What the unpickler raises for damaged pickles, besides ValueError.
DAMAGE = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, MemoryError, TypeError)
DAMAGE += (DeprecationWarning, OverflowError, RecursionError)
# Objects from elsewhere, and calls that no file of arrays makes.
REFUSED = frozenset("EXT1 EXT2 EXT4 NEWOBJ_EX NEXT_BUFFER OBJ PERSID READONLY_BUFFER".split())
PUTS = frozenset("PUT BINPUT LONG_BINPUT MEMOIZE".split())
GETS = frozenset("GET BINGET LONG_BINGET".split())
CALLS = frozenset("REDUCE NEWOBJ INST BINPERSID".split())
NESTS = frozenset("TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET".split()) | CALLS
CHANGES = frozenset("APPEND APPENDS SETITEM SETITEMS ADDITEMS BUILD DUP".split())
HASHED = {  # which operands are hashed
    "SETITEM": slice(1, None, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}


class Call:
    """A call that a pickle asks for: it is not made.

    Attributes:
        name: what would be called.
        arguments: of the call.
        state: that the result would be given.
    """

    __slots__ = __match_args__ = ("name", "arguments", "state")

    def __init__(self, name: str, arguments: tuple):
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Named:
    """Something that a pickle finds by its name, and can call but not change."""

    __slots__ = __match_args__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        """Returns the `Call`, or a container."""
        if self.name in DICTS:
            return _Dict(*arguments)
        return arguments[0] if self.name in PASSED else Call(self.name, arguments)

    def __setstate__(self, _: Any) -> None:
        raise ValueError("damaged pickle: sets the state of a function")


class Module:
    """An object of one of TorchScript's classes: nothing but its attributes."""

    __slots__ = ("attributes",)

    def __new__(cls, *_: Any):
        """Makes one without attributes; a pickle need not call `__init__`."""
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Dict(dict):
    """A dict without the attributes that torch sets (`_metadata`); Python 2 makes it of pairs."""

    __slots__ = ()

    def __init__(self, *arguments: Any):
        for pairs in arguments:
            if type(pairs) is list:
                self.update((key, value) for key, value in pairs if type(key) is str)
                pairs.clear()  # read once, or a small file could ask for endless copies

    def __setstate__(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Finds nothing but stand-ins.

    A pickle can set the state of everything that it has: all of it has a `__setstate__` or no
    attribute that can be set, and none is shared with another pickle.
    """

    def __init__(self, file: BinaryIO, persistent: Callable[[Any], Any]):
        super().__init__(file, encoding="latin-1")  # Python 2's strings are bytes
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):  # TorchScript's own classes
            return Module
        full = f"{module}.{name}"
        # Names of NumPy since its version 2, and of Python 2.
        known = full.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if known not in NAMES:
            raise ValueError(
                f"refuses to load {short(full)}: only tensors and plain containers are admitted"
            )
        return Named(known)

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def _no_persistent_ids(_: Any) -> None:
    raise ValueError("refuses a persistent id: there are none in this format")


def load(file: BinaryIO, persistent: Callable[[Any], Any] = _no_persistent_ids) -> Any:
    """Reads one pickle, up to its end, and leaves the file there.

    Args:
        file: a `BytesIO` or `mmap` at the start of the pickle: these have no `peek`, and read no
            more than there is, where other files first allocate what they are asked for.
        persistent: returns what is in place of a persistent id, or raises ValueError.

    Returns:
        Plain values and containers, `Call`, `Named` and `Module`.

    Raises:
        ValueError: the pickle is damaged or asks for what is not admitted.
    """
    start = file.tell()
    try:
        _inspect(file)
        file.seek(start)
        return _Unpickler(file, persistent).load()
    except DAMAGE as error:
        raise ValueError(f"damaged pickle: {type(error).__name__}: {error}") from error


def short(value: Any) -> str:
    """Returns a value of any size and depth as a short text, for messages."""
    return repr(value[:80]) if type(value) is str else f"of type {type(value).__name__}"


def _inspect(file: BinaryIO) -> None:
    """Refuses what takes the unpickler more memory or time than the file's size justifies.

    Lengths that reach beyond the file are an error of `pickletools`.
    """
    costs = _Costs()
    previous = frame_end = 0
    for count, (opcode, argument, place) in enumerate(pickletools.genops(file)):
        if count > MAX_OPERATIONS:
            raise ValueError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        if opcode.name in REFUSED:
            raise ValueError(f"refuses the pickle operation {opcode.name}")
        # The C code drops the rest of a frame that an operation crosses, and would go on with
        # other operations than those that are inspected here.
        if previous < frame_end < place or (opcode.name == "FRAME" and place < frame_end):
            raise ValueError("damaged pickle: an operation crosses the end of a frame")
        if opcode.name == "FRAME":
            frame_end = place + FRAME_HEADER + argument
        previous = place
        costs.step(opcode, argument)


class _Costs:
    """A pickle's stack, where an object is the number of objects that hashing it visits.

    Tuples do not keep their hash: where they share tuples it takes exponential time, deep ones
    overflow the C stack, and equal hashes are easily made.
    """

    def __init__(self):
        self._stack: list[int] = []
        self._below: list[list[int]] = []  # the stacks under the marks
        self._memo: dict[int, int] = {}
        self._hashed = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name == "POP" and not self._stack:
            self._stack = self._below.pop()
        elif name in GETS:
            self._stack.append(self._memo[argument])
        elif name in PUTS:
            index = len(self._memo) if argument is None else argument
            if index > MAX_OPERATIONS:  # the C code makes a list of twice that length
                raise ValueError(f"damaged pickle: a memo of {index:,} objects")
            self._memo[index] = self._stack[-1]
        else:
            operands = self._pop(opcode.stack_before)
            self._stack += [self._cost(name, operands, argument)] * len(opcode.stack_after)

    def _pop(self, wanted: list) -> list[int]:
        items: list[int] = []
        if pickletools.markobject in wanted:
            items, self._stack = self._stack, self._below.pop()
            wanted = wanted[: wanted.index(pickletools.markobject)]
        rest = len(self._stack) - len(wanted)
        if rest < 0:
            raise ValueError("damaged pickle: the stack is empty")
        items = self._stack[rest:] + items
        del self._stack[rest:]
        return items

    def _cost(self, name: str, operands: list[int], argument: Any) -> int:
        if name in HASHED:
            self._hashed += sum(cost for cost in operands[HASHED[name]] if cost > 1)
            if self._hashed > MAX_HASHED:
                raise ValueError("refuses large or nested tuples as keys")
        if name in CHANGES:
            return operands[0]
        if name not in NESTS:  # an integer of more than 64 bits can have another's hash
            return 1 + (argument.bit_length() // 65 if type(argument) is int else 0)
        cost = min(1 + sum(operands), MAX_HASHED + 1)
        if name in CALLS and cost > MAX_ARGUMENTS:
            raise ValueError("refuses a call with large arguments")
        return cost
