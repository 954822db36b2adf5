"""Files that make other readers run code or exhaust memory and time."""

import copyreg
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from array_files import (
    ARRAYS,
    WEIGHT,
    Evil,
    assert_same,
    dictionary,
    integers,
    tensor,
    text,
    torch_legacy,
    torch_script,
    torch_zip,
)

from zegformer_jax.pretrained import pickles
from zegformer_jax.pretrained.formats import read_archive, read_tensors


def string(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module, name):
    return string(module) + string(name) + b"\x93"


def attacks(path):
    """Returns pickles without start and end that try to make a directory, by their message."""
    argument = string(str(path)) + b"\x85R"
    body = pickle.dumps(Evil(path), protocol=2)[2:-1]
    objects = pickle.dumps(np.array([Evil(path)], dtype=object), protocol=2)[2:-1]
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    attributes = b"N}" + string("name") + string("os.mkdir") + b"s\x86b"  # set one by one
    system = os.system.__module__
    return {
        "posix.mkdir": body,
        f"{system}.system": f"c{system}\nsystem\n".encode() + string(f"mkdir {path}") + b"\x85R",
        "os.mkdir": b"cos\nmkdir\n" + argument,
        "os.makedirs": b"(" + string(str(path)) + b"ios\nmakedirs\n",
        "builtins.eval": stack_global("builtins", "eval")
        + string(f"__import__('os').mkdir('{path}')")
        + b"\x85R",
        "builtins.getattr": stack_global("builtins", "getattr") + b")R",
        "builtins.__import__": stack_global("builtins", "__import__") + string("os") + b"\x85R",
        "__builtin__.exec": b"c__builtin__\nexec\n" + string("import os") + b"\x85R",
        "numpy.dtype.__class__": stack_global("numpy", "dtype.__class__") + b")R",
        "numpy.load": b"cnumpy\nload\n" + string(str(path)) + b"\x85R",
        "collections.OrderedDict.fromkeys": stack_global("collections", "OrderedDict.fromkeys"),
        "torch.os.mkdir": stack_global("torch", "os.mkdir") + argument,
        "torch.load": b"ctorch\nload\n" + argument,
        "__torch__x.mkdir": b"c__torch__x\nmkdir\n" + argument,
        "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n" + stack_global("os", "mkdir"),
        "copy_reg._reconstructor": b"ccopy_reg\n_reconstructor\n)R",
        "functools.partial": b"cfunctools\npartial\n)R",
        "types.CodeType": b"ctypes\nCodeType\n)R",
        f"load '{os.mkdir.__module__}.mkdir'": objects,
        "operation EXT1": b"\x82\x01",
        "operation OBJ": b"(ccollections\nOrderedDict\no",
        "operation NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92",
        "operation PERSID": b"Pos.mkdir\n",
        "'str' object is not callable": string("os.mkdir") + b")R",
        "'tuple' object is not callable": b"))R",
        "'Call' object is not callable": b"cnumpy\ndtype\n" + string("f4") + b"\x85R)R",
        "must be a type, not Named": function + b")\x81",
        "'list' object has no attribute '__dict__'": b"]}b",
        "'dict' object has no attribute 'name'": b"}" + attributes,
        "'set' object has no attribute 'name'": b"\x8f" + attributes,
        "sets the state of a function": function + attributes,
        "missing 1 required positional argument: 'state'": b"c__torch__\nNet\n" + attributes,
    }


ATTACKS = sorted(attacks("x"))
HOLDERS = {
    "x.pkl": lambda path, body: path.write_bytes(b"\x80\x04}" + text("a") + body + b"s."),
    "bare.pkl": lambda path, body: path.write_bytes(b"\x80\x04" + body + b"."),
    "zip.pth": lambda path, body: torch_zip(path, b"}" + text("a") + body + b"s"),
    "legacy.pth": lambda path, body: torch_legacy(path, b"}" + text("a") + body + b"s"),
    "script.pt": lambda path, body: torch_zip(
        path, b"c__torch__\nNet\n)\x81}" + text("a") + body + b"sb"
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, holder, attack):
    path, made = tmp_path / holder, tmp_path / "made"
    HOLDERS[holder](path, attacks(made)[attack])
    with pytest.raises(ValueError) as caught:
        read_archive(path)
    assert not made.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert attack in message
    if "." in attack:
        assert "only tensors and plain containers are allowed" in message
    torch_script(tmp_path / "good.pt")  # nothing is left behind
    assert_same(read_tensors(tmp_path / "good.pt"), {"a.weight": WEIGHT, "scale": ARRAYS["scale"]})


def test_the_attacks_would_succeed_elsewhere(tmp_path):
    """The payloads are real: Python's own unpickler makes the directory."""
    objects = f"load '{os.mkdir.__module__}.mkdir'"
    for attack in ("posix.mkdir", "os.mkdir", "os.makedirs", "builtins.eval", objects):
        made = tmp_path / attack.replace("'", "")
        pickle.loads(b"\x80\x04" + attacks(made)[attack] + b".")
        assert made.is_dir(), attack


def test_extension_codes_are_refused_even_where_they_are_registered(tmp_path):
    copyreg.add_extension("os", "mkdir", 1)
    try:
        attack = b"\x80\x04\x82\x01" + string(str(tmp_path / "made")) + b"\x85R."
        pickle.loads(attack)  # from now on the unpickler asks no more what it may find
        (tmp_path / "made").rmdir()
        (tmp_path / "x.pkl").write_bytes(attack)
        with pytest.raises(ValueError, match="EXT1"):
            read_archive(tmp_path / "x.pkl")
        assert not (tmp_path / "made").exists()
        # The unpickler drops the rest of a frame that an operation crosses, and reads the length
        # of bytes behind it; without frames the length is 0x103, and all the rest the bytes.
        hidden = (b"a" + attack[2:]).ljust(258)
        frame = b"\x95" + struct.pack("<Q", 2) + b"B\x03"
        framed = b"\x80\x04" + frame + b"\x01\x00\x00\x00" + hidden + b"0}."
        pickle.Unpickler(io.BytesIO(framed)).load()
        (tmp_path / "made").rmdir()
        (tmp_path / "x.pkl").write_bytes(framed)
        with pytest.raises(ValueError, match="crosses the end of a frame"):
            read_archive(tmp_path / "x.pkl")
        assert not (tmp_path / "made").exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 1)


@pytest.mark.parametrize("name", sorted(pickles.NAMES))
def test_what_is_found_is_inert(tmp_path, name):
    """It accepts any call and any state, and changes nothing else."""
    call = stack_global(*name.rsplit(".", 1)) + b"(" + string("rm -rf") + b"]N}tR"
    if name not in pickles.PASSED:  # these are their first argument
        call += string("state") + b"b"
    good = tensor("0", "FloatStorage", 24, (2, 3, 4), (12, 4, 1))
    torch_zip(tmp_path / "x.pth", dictionary(model=dictionary(a=good), b=call))
    assert_same(read_tensors(tmp_path / "x.pth"), {"a": WEIGHT})


SHARED_STRING = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + integers(200_000)
SHARED_STRING += b"cnumpy\ndtype\n" + string("i1") + b"\x85R\x89h\x00tb"


@pytest.mark.slow
def test_small_files_do_not_take_long_or_much(tmp_path):
    """Files that make other readers recurse, copy without end, or allocate a claimed length."""
    nested = b"\x80\x04}" + b")" + b"\x85" * 100_000 + b"Ns."  # a deep tuple as a key
    pairs = b"".join(text(f"key {i}") + b"N\x86" for i in range(10_000))
    shared = b"(" + pairs + b"l\x940"  # a long list, of which many dicts are made
    copies = b"ccollections\nOrderedDict\n\x940" + b"h\x01h\x00\x85R0" * 20_000
    many = b"".join(text(f"{i}") + SHARED_STRING for i in range(5000))
    string = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"\x940"
    pickled = {
        "strings": b"\x80\x04" + string + b"}(" + many + b"u.",
        "nested": nested,
        "copies": b"\x80\x04" + shared + copies + b"}.",
        "buffer": b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"x.",
        "self": b"\x80\x04}\x94" + text("model") + b"h\x00s.",
        "lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    }
    begin = time.process_time()
    for name, data in pickled.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read_archive(tmp_path / name)
        assert name != "strings" or "more than 8 times the file" in str(caught.value)
    shares = b"c__torch__\nA\n)\x81}" + text("w") + b"Nsb\x94"  # each module holds the next twice
    for _ in range(60):
        shares += b"0" + b"c__torch__\nA\n)\x81}("
        shares += text("a") + b"h\x00" + text("b") + b"h\x00" + b"ub"
        shares += b"q\x00"
    torch_zip(tmp_path / "x.pt", shares)
    with pytest.raises(ValueError, match="without end"):
        read_archive(tmp_path / "x.pt")
    name = b"X" + struct.pack("<I", 999) + b"a" * 999 + b"\x940"  # of many modules in a chain
    chain = name + b"c__torch__\nA\n)\x81}" + text("w") + b"Nsb\x940"
    for i in range(1, 99):
        chain += b"c__torch__\nA\n)\x81}h\x00h" + bytes([i]) + b"sb\x940"
    torch_zip(tmp_path / "x.pt", chain + b"h" + bytes([99]))
    with pytest.raises(ValueError, match="without end"):
        read_archive(tmp_path / "x.pt")
    assert time.process_time() - begin < 10


def key(*operations):
    return b"\x80\x04" + b"".join(operations) + b"."


def nested(count, build):
    """Remembers `()`, and things made of the last twice; the last is number `count`."""
    steps = (build(b"h" + bytes([i])) + b"\x940" for i in range(count))
    return b")\x940" + b"".join(steps)


KEYS = "refuses large or nested tuples as keys"
DOUBLED = nested(26, lambda last: last + last + b"\x86")
SETS = nested(26, lambda last: b"(" + last + last + b"\x85\x91")
SIGNS = (
    b"(" + b"".join(b"J" + struct.pack("<i", n) for n in row) + b"tN"
    for row in itertools.product((-1, -2), repeat=12)
)
BOMBS = {  # by what would take the time: 2^26 steps, or the square of the number of keys
    "tuples in tuples": (key(DOUBLED, b"}h\x1aNs"), KEYS),
    "tuples in a dict that is built": (key(DOUBLED, b"(h\x1aNd"), KEYS),
    "tuples in a set": (key(DOUBLED, b"\x8f(h\x1a\x90"), KEYS),
    "tuples in a frozen set": (key(DOUBLED, b"(h\x1a\x91"), KEYS),
    "frozen sets in sets": (key(SETS, b"}h\x1aNs"), KEYS),
    "tuples of one hash": (key(b"}(", *SIGNS, b"u"), KEYS),
    "integers of one hash": (
        key(
            b"}(",
            *(
                b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N"
                for n in range(2**15, 2**16)
            ),
            b"u",
        ),
        KEYS,
    ),
    "arguments": (
        key(b"(" + b"N" * 500_000 + b"t\x940ctorch\nSize\n\x940" + b"h\x01h\x00R0" * 2000),
        "refuses a call with large arguments",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_keys_and_calls_do_not_take_forever(tmp_path, name):
    data, message = BOMBS[name]
    (tmp_path / "x.pkl").write_bytes(data)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path / "x.pkl")
    assert time.process_time() - begin < 5


def test_keys_that_are_small_tuples_are_read(tmp_path):
    value = ARRAYS | {(i, ("a", frozenset({i}))): 0 for i in range(300)} | {2**70: 1, 0.5: 2}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    assert_same(read_tensors(tmp_path / "x.pkl"), ARRAYS)


def test_memory_follows_the_bytes_that_are_there(tmp_path):
    """Claimed lengths, offsets and shapes are not allocated."""
    huge = struct.pack("<Q", 2**33)
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (2**31,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(64))
    np.savez_compressed(tmp_path / "y.npz", a=WEIGHT)
    pickled = {
        "bytes": b"\x8e" + huge,
        "bytearray": b"\x96" + huge,
        "text": b"\x8d" + huge,
        "long": b"\x8b\xff\xff\xff\x7f",
        "string": b"T\xff\xff\xff\x7f",
        "frame": b"\x95" + huge + b"}",
        "memo": b"}r\xff\xff\xff\x0f",
        "text memo": b"}p268435456\n",
    }
    for name, data in pickled.items():
        (tmp_path / name).write_bytes(b"\x80\x05" + data + b".")
    broadcast = tensor("0", "FloatStorage", 24, (2**31,), (0,))
    torch_zip(tmp_path / "x.pth", dictionary(a=broadcast))
    torch_legacy(tmp_path / "y.pth", storages={"0": (2**31, b"")})
    code = """
import pathlib, resource, sys
from zegformer_jax.pretrained.formats import read_archive
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_archive(pathlib.Path(sys.argv[1]) / "y.npz")
for path in pathlib.Path(sys.argv[1]).iterdir():
    before = peak()
    try: read_archive(path)
    except ValueError as error: print(path.name, peak() - before, error, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    grown = {name: int(size) for name, size, _ in (x.split("|") for x in done.stdout.splitlines())}
    assert grown.keys() == {*pickled, "x.npz", "x.pth", "y.pth"}
    assert max(grown.values()) < 50_000, done.stdout  # KiB


def test_a_pickle_has_no_end_of_operations(monkeypatch, tmp_path):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 10)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": list(range(20))}))
    with pytest.raises(ValueError, match="more than 10 operations"):
        read_archive(tmp_path / "x.pkl")
