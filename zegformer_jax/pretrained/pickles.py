"""Reads pickles as data: nothing is imported, called or set that a pickle names.

Python's own unpickler imports and calls whatever a file asks for. The machine here knows numbers,
strings, lists, tuples and dicts, and what it is given by name (`Admitted`): functions of ours
that stand in for those by which arrays are pickled. All else is refused by its name.
"""

import io
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# A checkpoint of a thousand tensors with its optimiser's state takes about 100,000.
MAX_OPERATIONS = 2_000_000
MAX_KEY = 1000  # characters
MAX_AXES = 32  # NumPy's limit, before its version 2
MAX_SIZE = 2**48  # of one axis; far beyond what fits, so that products stay small
# What broken or hostile input makes of the operations below.
DAMAGE = (
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    UnicodeError,
    DeprecationWarning,  # raised for odd escapes in strings where warnings are errors
    struct.error,
)


class Opaque:
    """Stands for an object that nobody will read; what is done to it has no effect."""

    __slots__ = ()


class Constructor(NamedTuple):
    """What a pickle may call: a function of ours under a name of the pickle's."""

    make: Callable[..., Any]


class Stateful:
    """What takes a state after it was made."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        """Takes the state; raises ValueError where it is none of its kind."""
        raise NotImplementedError


class Module(Stateful):
    """An object of a class that is not known, inert.

    Attributes:
        attributes: the object's attributes by their names.
    """

    __slots__ = ("attributes",)

    def __init__(self, *_: Any):
        self.attributes: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        """Takes the attributes; a state of another form holds none."""
        if type(state) is dict:
            self.attributes = state


Admitted = Callable[[str, str], Any]  # (module, name) to what stands for it, or raises ValueError


class Reader:
    """A binary file of which no more is asked than there is, whatever a damaged length says."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.tell = file.tell
        self.readline = file.readline
        start = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(start)

    def read(self, count: int) -> bytes:
        """Reads up to `count` bytes."""
        return self._file.read(max(0, min(count, self.size - self._file.tell())))


def load(file: Reader, admitted: Admitted, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle, up to its end, and leaves the file there.

    Args:
        file: where the pickle starts.
        admitted: what stands for a name; raises ValueError for what is refused.
        persistent: what stands for a persistent id; without it these are refused.

    Returns:
        The object: plain values, lists, tuples, dicts of what has a string for its key, and
        what `admitted` made.

    Raises:
        ValueError: the pickle is damaged or wants what is not admitted.
    """
    machine = _Machine(admitted, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(_operations(file)):
            if count > MAX_OPERATIONS:
                raise ValueError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
            machine.step(opcode.name, argument)
        return machine.pop()
    except DAMAGE as error:
        raise ValueError(f"damaged pickle: {type(error).__name__}: {error}") from error


def _operations(file: Reader) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    try:
        yield from pickletools.genops(file)
    except ValueError as error:
        raise ValueError(f"damaged pickle: {error}") from error


def is_shape(value: Any) -> bool:
    """Tells a tuple of sizes that an array can have from all else."""
    return (
        type(value) is tuple
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)
    )


def refuse(module: str, name: str) -> None:
    """Raises the ValueError for a name that is not admitted."""
    raise ValueError(
        f"refuses to load {short(f'{module}.{name}')}: only tensors and plain containers are "
        "admitted"
    )


def short(value: Any) -> str:
    """Shows a value of a file's, which may be of any size and depth, in a message."""
    return repr(value[:80]) if type(value) is str else f"of type {type(value).__name__}"


def _ordered_dict(*arguments: Any) -> dict:
    """Makes a dict, of pairs in Python 2's pickles."""
    made: dict[str, Any] = {}
    for pairs in arguments:
        if type(pairs) is list:
            for key, value in pairs:
                _set(made, key, value)
            pairs.clear()  # read once, or a small file could ask for endless copies
    return made


def _no_bytes(*arguments: Any) -> bytes:
    """Makes the empty bytes, which protocol 2 of Python 3 writes so."""
    if arguments:
        raise ValueError("damaged pickle: bytes are made of something")
    return b""


def _opaque(*_: Any) -> Opaque:
    return Opaque()


def _python_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Constructor(_ordered_dict),
        ("collections", "defaultdict"): Constructor(lambda *_: {}),
        ("collections", "Counter"): Constructor(_opaque),
    }
    for module in ("builtins", "__builtin__"):  # Python 3's and 2's
        for name in ("list", "dict", "set", "frozenset", "tuple", "int", "float", "complex"):
            names[module, name] = Constructor(_opaque)
        names[module, "bytes"] = Constructor(_no_bytes)
    return names


CONTAINERS: Mapping[tuple[str, str], Any] = _python_names()


def _set(target: Any, key: Any, value: Any) -> None:
    """Sets an item of a dict; what has no string for its key is no named array, and dropped."""
    if type(target) is Opaque or (type(target) is dict and type(key) is not str):
        return
    if type(target) is not dict:
        raise ValueError(f"damaged pickle: sets an item of type {type(target).__name__}")
    if len(key) > MAX_KEY:
        raise ValueError(f"a key of {len(key):,} characters")
    if key in target:
        raise ValueError(f"{short(key)} stands twice in one dict")
    target[key] = value


class _Machine:
    """The stack, the marks and the memo of a pickle (see `pickletools` for the operations)."""

    VALUES = frozenset(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
        "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8".split()
    )
    CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Opaque}
    TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
    NO_EFFECT = frozenset(("PROTO", "FRAME", "STOP"))

    def __init__(self, admitted: Admitted, persistent: Callable[[Any], Any] | None):
        self._admitted = admitted
        self._persistent = persistent
        self._stack: list = []
        self._below: list[list] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Does one operation."""
        if name in self.VALUES:
            self._stack.append(argument)
        elif name in self.CONSTANTS:
            self._stack.append(self.CONSTANTS[name])
        elif name in self.NEW:
            self._stack.append(self.NEW[name]())
        elif name in self.TUPLES:
            items = [self.pop() for _ in range(self.TUPLES[name])]
            self._stack.append(tuple(reversed(items)))
        elif name not in self.NO_EFFECT:
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"refuses the pickle operation {name}")
            operation(argument)

    def pop(self) -> Any:
        """Takes what is on top."""
        return self._stack.pop()

    def _pop_to_mark(self) -> list:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _pop_mark(self, _: None) -> None:
        self._pop_to_mark()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: None) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    def _bytearray8(self, data: bytearray) -> None:
        self._stack.append(bytes(data))

    def _tuple(self, _: None) -> None:
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    def _list(self, _: None) -> None:
        items = self._pop_to_mark()
        self._stack.append(items)

    def _dict(self, _: None) -> None:
        items = self._pop_to_mark()
        self._stack.append({})
        self._set_items(items)

    def _frozenset(self, _: None) -> None:
        self._pop_to_mark()
        self._stack.append(Opaque())

    def _extend(self, items: list) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Opaque:
            raise ValueError(f"damaged pickle: appends to type {type(target).__name__}")

    def _append(self, _: None) -> None:
        item = self.pop()
        self._extend([item])

    def _appends(self, _: None) -> None:
        items = self._pop_to_mark()
        self._extend(items)

    _additems = _appends

    def _set_items(self, items: list) -> None:
        if len(items) % 2:
            raise ValueError("damaged pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(self._stack[-1], key, value)

    def _setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        _set(self._stack[-1], key, value)

    def _setitems(self, _: None) -> None:
        items = self._pop_to_mark()
        self._set_items(items)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._admitted(module, name))

    def _stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("damaged pickle: a name that is no string")
        self._stack.append(self._admitted(module, name))

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        refuse(module, name)

    def _reduce(self, _: None) -> None:
        arguments, constructor = self.pop(), self.pop()
        if type(constructor) is not Constructor or type(arguments) is not tuple:
            raise ValueError(f"damaged pickle: calls type {type(constructor).__name__}")
        self._stack.append(constructor.make(*arguments))

    _newobj = _reduce

    def _build(self, _: None) -> None:
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state)
        elif type(target) not in (dict, Opaque):  # a state dict's `_metadata` is of no use here
            raise ValueError(f"damaged pickle: sets the state of type {type(target).__name__}")

    def _binpersid(self, _: None) -> None:
        if self._persistent is None:
            raise ValueError("refuses a persistent id: there are none in this format")
        self._stack.append(self._persistent(self.pop()))
