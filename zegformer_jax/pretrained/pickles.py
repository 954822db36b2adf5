"""Reads pickles of arrays by `pickle.Unpickler` without running anything that they name.

The unpickler finds only `NAMES`, as objects that record calls without making them. Its C code
trusts the numbers in a file, so `_inspect` reads the operations first and refuses those that would
exhaust memory or time.
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
# Calls that are replaced by their first argument; `encode` makes bytes of a text.
PASSED = frozenset(
    "_codecs.encode torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state "
    "torch.jit._pickle.restore_type_tag".split()
)
ARRAYS = frozenset(
    "numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar "
    "numpy.core.numeric._frombuffer torch._utils._rebuild_tensor "
    "torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3".split()
)
# PyTorch's dtypes and storage classes, mapped to the names of NumPy's dtypes.
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
# Raised by the unpickler for damaged pickles, in addition to ValueError.
DAMAGE = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, MemoryError, TypeError)
DAMAGE += (DeprecationWarning, OverflowError, RecursionError)
# Operations for external objects, and calls that no file of arrays makes.
REFUSED = frozenset("EXT1 EXT2 EXT4 NEWOBJ_EX NEXT_BUFFER OBJ PERSID READONLY_BUFFER".split())
PUTS = frozenset("PUT BINPUT LONG_BINPUT MEMOIZE".split())
GETS = frozenset("GET BINGET LONG_BINGET".split())
CALLS = frozenset("REDUCE NEWOBJ INST BINPERSID".split())
NESTS = frozenset("TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET".split()) | CALLS
CHANGES = frozenset("APPEND APPENDS SETITEM SETITEMS ADDITEMS BUILD DUP".split())
HASHED = {  # operands that are hashed, by operation
    "SETITEM": slice(1, None, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}


class Call:
    """A call that a pickle asks for and that is not made.

    Attributes:
        name: Full name of the function or class.
        arguments: Arguments of the call.
        state: State that the pickle sets on the result, or None.
    """

    __slots__ = __match_args__ = ("name", "arguments", "state")

    def __init__(self, name: str, arguments: tuple):
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Named:
    """An object that a pickle finds by its name, and can call but not change."""

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
    """The attributes of an object of a TorchScript class."""

    __slots__ = ("attributes",)

    def __new__(cls, *_: Any):
        """Makes an object without attributes; pickles may skip `__init__`."""
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Dict(dict):
    """Dict that ignores the attributes that torch sets (`_metadata`); Python 2 passes pairs."""

    __slots__ = ()

    def __init__(self, *arguments: Any):
        for pairs in arguments:
            if type(pairs) is list:
                self.update((key, value) for key, value in pairs if type(key) is str)
                pairs.clear()  # else a small file could ask for endless copies

    def __setstate__(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Unpickler that finds only the inert classes of this module.

    A pickle can set the state of all objects that it has. So each of them has a `__setstate__` or
    no attribute that can be set, and none is shared with another pickle.
    """

    def __init__(self, file: BinaryIO, persistent: Callable[[Any], Any]):
        super().__init__(file, encoding="latin-1")  # Python 2's strings are bytes
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):  # TorchScript's own classes
            return Module
        full = f"{module}.{name}"
        # Names of NumPy 2 and of Python 2.
        known = full.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if known not in NAMES:
            raise ValueError(
                f"refuses to load {short(full)}: only tensors and plain containers are allowed"
            )
        return Named(known)

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def _no_persistent_ids(_: Any) -> None:
    raise ValueError("refuses a persistent id: there are none in this format")


def load(file: BinaryIO, persistent: Callable[[Any], Any] = _no_persistent_ids) -> Any:
    """Reads one pickle and leaves the file at its end.

    Args:
        file: A `BytesIO` or `mmap` at the start of the pickle. Unlike other files, these have no
            `peek` and never allocate more bytes than the file has.
        persistent: Returns the object of a persistent id, or raises ValueError.

    Returns:
        Plain values and containers, and objects of `Call`, `Named` and `Module`.

    Raises:
        ValueError: The pickle is damaged, or asks for something that is not allowed.
    """
    start = file.tell()
    try:
        _inspect(file)
        file.seek(start)
        return _Unpickler(file, persistent).load()
    except DAMAGE as error:
        raise ValueError(f"damaged pickle: {type(error).__name__}: {error}") from error


def short(value: Any) -> str:
    """Returns a short text for a value of any size and depth, for messages."""
    return repr(value[:80]) if type(value) is str else f"of type {type(value).__name__}"


def _inspect(file: BinaryIO) -> None:
    """Refuses pickles that need more memory or time than their size justifies.

    `pickletools` itself raises for lengths beyond the end of the file.
    """
    costs = _Costs()
    previous = frame_end = 0
    for count, (opcode, argument, place) in enumerate(pickletools.genops(file)):
        if count > MAX_OPERATIONS:
            raise ValueError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        if opcode.name in REFUSED:
            raise ValueError(f"refuses the pickle operation {opcode.name}")
        # If an operation crosses the end of a frame, the C code drops the rest of the frame, and
        # then reads other operations than those inspected here.
        if previous < frame_end < place or (opcode.name == "FRAME" and place < frame_end):
            raise ValueError("damaged pickle: an operation crosses the end of a frame")
        if opcode.name == "FRAME":
            frame_end = place + FRAME_HEADER + argument
        previous = place
        costs.step(opcode, argument)


class _Costs:
    """A pickle's stack, with each object replaced by the number of objects that its hash visits.

    Tuples do not cache their hash: hashing tuples that share tuples takes exponential time, deep
    tuples overflow the C stack, and collisions are easily made.
    """

    def __init__(self):
        self._stack: list[int] = []
        self._below: list[list[int]] = []  # the stacks below the marks
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
            if index > MAX_OPERATIONS:  # the C code allocates a list of twice that length
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
        if name not in NESTS:  # integers of more than 64 bits can collide
            return 1 + (argument.bit_length() // 65 if type(argument) is int else 0)
        cost = min(1 + sum(operands), MAX_HASHED + 1)
        if name in CALLS and cost > MAX_ARGUMENTS:
            raise ValueError("refuses a call with large arguments")
        return cost
