"""Damage to files: bits, bytes and blocks that are changed, lost, repeated or exchanged."""

import contextlib
import sys
from collections.abc import Iterator

import numpy as np

BLOCK = 40  # bytes at most that are removed, repeated or exchanged
EXTREMES = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\0\0\0",
)
NUMBERS = (b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b'""', b"[]", b"{}", b"NaN")
# What reading a file never does; opening for writing is looked for by its mode.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
_lists: list[list[str]] = []  # of the `watched` that are open


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Returns the bytes with one to three kinds of damage."""
    for _ in range(int(rng.integers(1, 4))):
        data = _CHANGES[rng.integers(len(_CHANGES))](rng, data) or data
    return data


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yields a list of what is run, connected to or opened for writing within."""
    if not _hooked:
        sys.addaudithook(_note)  # for the process's whole life
        _hooked.append(True)
    _lists.append([])
    try:
        yield _lists[-1]
    finally:
        _lists.pop()


_hooked: list[bool] = []


def _note(event: str, arguments: tuple) -> None:
    if not _lists:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
    if event in FORBIDDEN or writes:
        _lists[-1].append(f"{event} {arguments[:2]}")


def _place(rng, data):
    return int(rng.integers(len(data)))


def _flip(rng, data):
    place = _place(rng, data)
    return data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


def _cut(rng, data):
    return data[: _place(rng, data) + 1]


def _remove(rng, data):
    place = _place(rng, data)
    return data[:place] + data[place + int(rng.integers(1, BLOCK)) :]


def _repeat(rng, data):
    place = _place(rng, data)
    return data[: place + int(rng.integers(1, BLOCK))] + data[place:]


def _insert(rng, data):
    place = _place(rng, data)
    return data[:place] + rng.bytes(int(rng.integers(1, BLOCK))) + data[place:]


def _exchange(rng, data):
    first, second = sorted((_place(rng, data), _place(rng, data)))
    size = int(rng.integers(1, BLOCK))
    one, two = data[first : first + size], data[second : second + size]
    return data[:first] + two + data[first + size : second] + one + data[second + size :]


def _set_extreme(rng, data):
    place, value = _place(rng, data), EXTREMES[rng.integers(len(EXTREMES))]
    return data[:place] + value + data[place + len(value) :]


def _replace_number(rng, data):
    digits = [i for i, byte in enumerate(data[:4096]) if 48 <= byte < 58]
    if not digits:
        return data
    start = end = digits[rng.integers(len(digits))]
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    return data[:start] + NUMBERS[rng.integers(len(NUMBERS))] + data[end:]


_CHANGES = (_flip, _cut, _remove, _repeat, _insert, _exchange, _set_extreme, _replace_number)
