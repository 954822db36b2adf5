"""Files of arrays: against torch, safetensors, NumPy and pickle; hostile and damaged ones."""

import collections
import copyreg
import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from zegformer_jax.pretrained import pickles
from zegformer_jax.pretrained.archives import read_archive, read_tensors, write_tensors

WEIGHT = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
IDS = np.array([3, -1, 2**40])
SCALAR = np.float64(0.25)
ARRAYS = {"a.weight": WEIGHT, "a.ids": IDS, "scale": np.asarray(SCALAR)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# --- pickles and zips by hand, as torch writes them -------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integers(*values):
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def tensor(key, storage, count, shape, strides, offset=0, view=None):
    """A tensor's pickle: with a sixth field in its storage's id before 1.6."""
    identity = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key)
    identity += text("cpu") + integers(count)[1:-1]
    identity += (view or b"") + b"tQ"
    arguments = identity + integers(offset)[1:-1] + integers(*shape) + integers(*strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + hooks + b"tR"


def dictionary(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


TENSORS = {
    "a.weight": ("0", "FloatStorage", WEIGHT),
    "a.ids": ("1", "LongStorage", IDS),
    "scale": ("2", "DoubleStorage", np.asarray(SCALAR)),
}


def state_dict(view=None):
    return dictionary(
        **{
            name: tensor(
                key, storage, x.size, x.shape, [s // x.itemsize for s in x.strides], view=view
            )
            for name, (key, storage, x) in TENSORS.items()
        }
    )


def torch_zip(path, pickled=None, compression=zipfile.ZIP_STORED, storages=None, extra=()):
    if pickled is None:
        pickled = dictionary(model=state_dict(), epoch=b"K\x05")
    if storages is None:
        storages = {key: x.tobytes() for key, _, x in TENSORS.values()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra:
            archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")


def torch_legacy(path, pickled=None, storages=None):
    if pickled is None:
        pickled = dictionary(model=state_dict(view=b"N"), epoch=b"K\x05")
    if storages is None:
        storages = {key: (x.size, x.tobytes()) for key, _, x in TENSORS.values()}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, protocol=2)
        file.write(b"\x80\x02" + pickled + b".")
        pickle.dump(list(storages), file, protocol=2)
        for count, data in storages.values():
            file.write(struct.pack("<q", count) + data)


def torch_script(path):
    """A module whose attributes are a number, two tensors and a module with one."""
    inner = b"c__torch__.torch.nn.___torch_mangle_3\nLinear\n)\x81"
    inner += dictionary(weight=tensor("0", "FloatStorage", 24, (2, 3, 4), (12, 4, 1))) + b"b"
    attributes = dictionary(
        training=b"\x88",
        a=inner,
        sizes=b"ctorch.jit._pickle\nbuild_intlist\n(]K\x07atR",
        scale=tensor("2", "DoubleStorage", 1, (), ()),
    )
    torch_zip(
        path,
        b"c__torch__\nNet\n)\x81" + attributes + b"b",
        extra=[("archive/code/__torch__.py", "import os; os.abort()")],
    )


def detectron2_pickle(path, protocol):
    value = {"model": dict(ARRAYS), "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def npz(path, save=np.savez):
    with path.open("wb") as file:
        save(file, **ARRAYS)


def safetensors(path):
    write_tensors(path, ARRAYS, {"format": "pt"})


FORMATS = {
    "zip.pth": torch_zip,
    "legacy.pth": torch_legacy,
    "protocol2.pkl": lambda path: detectron2_pickle(path, 2),
    "protocol4.pkl": lambda path: detectron2_pickle(path, 4),
    "protocol5.pkl": lambda path: detectron2_pickle(path, 5),
    "x.npz": npz,
    "compressed.npz": lambda path: npz(path, np.savez_compressed),
    "x.safetensors": safetensors,
}
CHECKED = ("zip.pth", "x.npz", "compressed.npz")  # formats with checksums


@pytest.fixture(params=FORMATS)
def sample(request, tmp_path):
    path = tmp_path / request.param
    FORMATS[request.param](path)
    return path


# --- what is read -----------------------------------------------------------------------------


def test_every_format_gives_the_same_arrays(sample):
    archive = read_archive(sample)
    assert_same(archive.tensors, ARRAYS)
    assert not any(array.flags.writeable for array in archive.tensors.values())
    wrapped = sample.suffix in (".pth", ".pkl")
    assert (archive.chosen, archive.ignored) == ("model" if wrapped else "", 0)


def test_the_suffix_is_not_looked_at(sample):
    odd = sample.rename(sample.with_name("weights.bin"))
    assert_same(read_tensors(odd), ARRAYS)


def test_the_modules_of_torch_script_are_walked_and_its_code_is_not_run(tmp_path):
    torch_script(tmp_path / "x.pt")
    archive = read_archive(tmp_path / "x.pt")
    assert_same(archive.tensors, {"a.weight": WEIGHT, "scale": ARRAYS["scale"]})
    assert archive.ignored == 2  # training and sizes


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", "blobs", ""])
def test_finds_the_state_dict(tmp_path, key):
    found = {f"module.{name}": array for name, array in ARRAYS.items()}
    value = {key: found, "optimizer": {0: [0.1], (1, 2): 0.2}} if key else found
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    archive = read_archive(tmp_path / "x.pkl")
    assert_same(archive.tensors, ARRAYS)
    assert archive.chosen == key


def test_counts_what_is_no_array(tmp_path):
    value = ARRAYS | {"epoch": 3, "names": ["a"], "seen": {1, 2}, "best": None}
    value |= {"deep": collections.OrderedDict(a=WEIGHT), "none": collections.defaultdict(list)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    archive = read_archive(tmp_path / "x.pkl")
    assert_same(archive.tensors, ARRAYS)
    assert archive.ignored == 6


def python2_pickle(array):
    """What Python 2.7 wrote at protocol 2: byte strings, __builtin__, a long."""
    raw = array.tobytes()
    string = b"T" + struct.pack("<I", len(raw)) + raw
    dtype = b"cnumpy\ndtype\nU\x02" + array.dtype.str[1:].encode() + b"K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + integers(*array.shape) + dtype + b"\x89" + string + b"tb"


def test_reads_the_pickles_of_python_2(tmp_path):
    items = b"".join(
        b"U" + bytes([len(name)]) + name.encode() + python2_pickle(array)
        for name, array in ARRAYS.items()
    )
    unused = b"U\x01sc__builtin__\nset\n]K\x01a\x85R"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02}(" + items + unused + b"u.")
    archive = read_archive(tmp_path / "x.pkl")
    assert_same(archive.tensors, ARRAYS)
    assert archive.ignored == 1


def test_reads_an_ordered_dict_of_python_2(tmp_path):
    pairs = b"(" + b"]U\x01a" + b"a" + python2_pickle(WEIGHT) + b"a" + b"e"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02ccollections\nOrderedDict\n]" + pairs + b"\x85R.")
    assert_same(read_tensors(tmp_path / "x.pkl"), {"a": WEIGHT})


@pytest.mark.parametrize("protocol", range(2, 6))
def test_reads_numpys_arrays_of_any_kind(tmp_path, protocol):
    arrays = {
        "fortran": np.asfortranarray(WEIGHT[0]),
        "big endian": WEIGHT.astype(">f4"),
        "strided": WEIGHT[:, ::2, ::-1],
        "half": WEIGHT.astype(np.float16),
        "bool": WEIGHT > 1,
        "complex": WEIGHT * np.complex64(1j),
        "empty": np.zeros((0, 3), np.int8),
        "scalar": np.float32(0.1),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    found = read_tensors(tmp_path / "x.pkl")
    native = {name: x.astype(x.dtype.newbyteorder("=")) for name, x in arrays.items()}
    assert_same(found, native)


def test_reads_what_safetensors_writes(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = ARRAYS | {"e": np.zeros((0, 4), np.uint8), "b": np.array([True, False])}
    numpy.save_file(arrays | {"h": WEIGHT.astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    half = WEIGHT.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same(read_tensors(tmp_path / "x.safetensors"), arrays | {"h": half})


def test_safetensors_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = ARRAYS | {"h": WEIGHT.astype(ml_dtypes.bfloat16), "e": np.zeros((0, 4), np.uint8)}
    write_tensors(tmp_path / "x.safetensors", arrays, {"format": "pt", "name": "ä"})
    assert_same(numpy.load_file(tmp_path / "x.safetensors"), arrays)
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "name": "ä"}


# --- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_round_trip(tmp_path, suffix):
    arrays = ARRAYS | {
        "file": WEIGHT.T,  # a name that numpy.savez cannot write, and not contiguous
        "empty": np.zeros((3, 0), np.int32),
        "bool": WEIGHT > 1,
        "half": WEIGHT.astype(np.float16),
        "big endian": WEIGHT.astype(">f8"),
    }
    path = tmp_path / f"x{suffix}"
    write_tensors(path, arrays)
    found = read_tensors(path)
    assert_same(found, arrays | {"big endian": WEIGHT.astype(np.float64)})
    write_tensors(path, {"a": IDS})  # in place of the file that is being read
    assert_same(read_tensors(path), {"a": IDS})
    assert_same(found, arrays | {"big endian": WEIGHT.astype(np.float64)})
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for suffix in (".safetensors", ".npz", ".pth"):
        write_tensors(tmp_path / f"a{suffix}", ARRAYS)
        write_tensors(tmp_path / f"b{suffix}", ARRAYS)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_storages_are_aligned_as_torchs(tmp_path):
    write_tensors(tmp_path / "x.pth", ARRAYS)
    data = (tmp_path / "x.pth").read_bytes()
    for array in (WEIGHT, IDS):
        assert data.index(array.tobytes()) % 64 == 0


@pytest.mark.parametrize(
    ("name", "arrays", "metadata", "message"),
    [
        ("x.bin", ARRAYS, None, "choose one of .safetensors, .npz, .pth"),
        ("x.npz", ARRAYS, {"a": "b"}, "no place for metadata"),
        ("x.npz", {"h": WEIGHT.astype(ml_dtypes.bfloat16)}, None, "'h' has dtype bfloat16"),
        ("x.pth", {"h": WEIGHT.astype(np.uint16)}, None, "'h' has dtype uint16"),
        ("x.pth", ARRAYS, {"model": "b"}, "'model'"),
        ("x.npz", {"o": np.array([{}])}, None, "'o' has dtype object"),
        ("x.safetensors", {"__metadata__": WEIGHT}, None, "__metadata__"),
        ("x.safetensors", {"z": WEIGHT.astype(complex)}, None, "'z' of dtype complex128"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path, name, arrays, metadata, message
):
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / name, arrays, metadata)
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [(name, b"before")]


def test_a_failure_while_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    write_tensors(path, ARRAYS)
    before = path.read_bytes()

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, {"b": WEIGHT})
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [(path.name, before)]


def test_there_must_be_a_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_tensors(tmp_path / "none" / "x.npz", ARRAYS)


# --- PyTorch ----------------------------------------------------------------------------------


def torch_values(torch):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 5, 6, generator=generator)
    return {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "slice of the same": whole[1:3, ::2, 4],
        "expanded": whole[:1, :1, :1].expand(3, 2, 4),
        "parameter": torch.nn.Parameter(whole[0]),
        "bfloat16": whole.bfloat16(),
        "half": whole.half(),
        "float64": whole.double(),
        "bool": whole > 0,
        "int8": (whole * 10).to(torch.int8),
        "uint8": (whole * 10).abs().to(torch.uint8),
        "int16": (whole * 10).to(torch.int16),
        "int32": (whole * 10).to(torch.int32),
        "int64": (whole * 10).to(torch.int64),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "float8": whole.to(torch.float8_e4m3fn),
        "complex": torch.complex(whole, whole),
        "scalar": torch.tensor(224),
        "empty": torch.zeros(0, 3),
    }


def expected_of(torch, values):
    floats = (torch.bfloat16, torch.float8_e4m3fn)
    return {
        name: (x.detach().float() if x.dtype in floats else x.detach()).numpy()
        for name, x in values.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    values = torch_values(torch)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3]).state_dict(),
        "state_dict": collections.OrderedDict(values) | {"note": "not a tensor"},
        "other": [torch.Size([1]), torch.device("cpu"), torch.float16, {1: {2}}],
    }
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    archive = read_archive(tmp_path / "x.pth")
    assert_same(archive.tensors, expected_of(torch, values))
    assert (archive.chosen, archive.ignored) == ("state_dict", 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_modules_state_dict(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    torch.save(model.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "x.pth"), expected_of(torch, model.module.state_dict()))


def test_reads_files_without_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_tensors(tmp_path / "x.pth"), {"a": np.ones(3, np.float32)})


def test_reads_big_endian_files(tmp_path):
    """Written by torch.save on a big-endian machine: its storages and its `byteorder`."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + state_dict() + b".")
        archive.writestr("x/byteorder", "big")
        for key, _, array in TENSORS.values():
            archive.writestr(f"x/data/{key}", array.astype(array.dtype.newbyteorder(">")).tobytes())
    assert_same(read_tensors(tmp_path / "x.pth"), ARRAYS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script's own
def test_reads_a_scripted_module(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)
            self.blocks = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.sizes = [1, 2]
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.blocks(self.layer(x)) + self.sizes[0]

    module = torch.jit.script(Net()).half()
    torch.jit.save(module, tmp_path / "x.pt")
    assert_same(read_tensors(tmp_path / "x.pt"), expected_of(torch, module.state_dict()))


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = ARRAYS | {
        "half": WEIGHT.astype(np.float16),
        "bool": WEIGHT > 1,
        "empty": np.zeros((0, 3), np.float32),
        "complex": WEIGHT.astype(np.complex64),
        "int8": WEIGHT.astype(np.int8),
    }
    write_tensors(
        tmp_path / "x.pth",
        arrays | {"bfloat16": WEIGHT.astype(ml_dtypes.bfloat16)},
        {"__author__": "ä"},
    )
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert found["__author__"] == "ä"
        half = found["model"].pop("bfloat16")
        assert torch.equal(half, torch.tensor(WEIGHT).bfloat16())
        assert_same({name: x.numpy() for name, x in found["model"].items()}, arrays)


# --- hostile files ----------------------------------------------------------------------------


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def string(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module, name):
    return string(module) + string(name) + b"\x93"


def attacks(path):
    """Pickles without start and end that would make a directory, by the message's name."""
    argument = string(str(path)) + b"\x85R"
    body = pickle.dumps(Evil(path), protocol=2)[2:-1]
    objects = pickle.dumps(np.array([Evil(path)], dtype=object), protocol=2)[2:-1]
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
        "dtype 'O8'": objects,
        "operation EXT1": b"\x82\x01",
        "operation OBJ": b"(ccollections\nOrderedDict\no",
        "operation NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92",
        "operation PERSID": b"Pos.mkdir\n",
        "calls type str": string("os.mkdir") + b")R",
        "calls type Opaque": b"cnumpy\nndarray\n)R",
        "sets the state of type list": b"]}b",
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
        assert "only tensors and plain containers are admitted" in message


def test_the_attacks_would_succeed_elsewhere(tmp_path):
    """The payloads are real: Python's own unpickler makes the directory."""
    for attack in ("posix.mkdir", "os.mkdir", "os.makedirs", "builtins.eval", "dtype 'O8'"):
        made = tmp_path / attack.replace("'", "")
        pickle.loads(b"\x80\x04" + attacks(made)[attack] + b".")
        assert made.is_dir(), attack


def test_extension_codes_are_refused_even_where_they_are_registered(tmp_path):
    copyreg.add_extension("os", "mkdir", 1)
    try:
        (tmp_path / "x.pkl").write_bytes(b"\x80\x04\x82\x01" + string("made") + b"\x85R.")
        with pytest.raises(ValueError, match="EXT1"):
            read_archive(tmp_path / "x.pkl")
    finally:
        copyreg.remove_extension("os", "mkdir", 1)


GREAT = 2**47
NUMPY_GREAT = pickle.dumps(WEIGHT, protocol=2)[2:-1].replace(
    b"K\x02K\x03K\x04\x87", b"\x8a\x08" + struct.pack("<q", GREAT) + b"\x85"
)
TENSOR_FAULTS = {
    "is cut short: it has 96 bytes": tensor("0", "FloatStorage", 25, (25,), (1,)),
    "of shape [2, 3, 4] reaches beyond": tensor("0", "FloatStorage", 24, (2, 3, 4), (12, 4, 2)),
    "of shape [24] reaches beyond": tensor("0", "FloatStorage", 24, (24,), (1,), offset=1),
    "of shape [] reaches beyond": tensor("0", "FloatStorage", 24, (), (), offset=24),
    f"of shape [{GREAT}, {GREAT}] reaches": tensor("0", "FloatStorage", 24, (GREAT,) * 2, (1, 1)),
    f"of shape [{GREAT}] is larger than the file": tensor("0", "FloatStorage", 24, (GREAT,), (0,)),
    "no tuple of sizes": tensor("0", "FloatStorage", 24, (2, 3), (-1, 1)),
    "strides are no": tensor("0", "FloatStorage", 24, (2, 3), (1,)),
    "without storage or place": tensor("0", "FloatStorage", 24, (2,), (1,), offset=-1),
    "data/9": tensor("9", "FloatStorage", 24, (2,), (1,)),
    "data/../../x": tensor("../../x", "FloatStorage", 24, (2,), (1,)),
    "torch.QInt8Storage": tensor("0", "QInt8Storage", 24, (2,), (1,)),
    "is no tuple of sizes": NUMPY_GREAT.replace(struct.pack("<q", GREAT), struct.pack("<q", -1)),
    f"of shape [{GREAT}] and dtype float32 has 96 bytes": NUMPY_GREAT,
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_a_tensor_keeps_to_its_storage(tmp_path, message):
    torch_zip(tmp_path / "x.pth", dictionary(a=TENSOR_FAULTS[message]))
    with pytest.raises(ValueError) as caught:
        read_archive(tmp_path / "x.pth")
    assert message in str(caught.value)


def test_views_of_one_storage(tmp_path):
    views = {
        "transposed": (WEIGHT.transpose(2, 0, 1), 0),
        "row": (WEIGHT[1, 2], 20),
        "column": (WEIGHT[:, 1, 3], 7),
        "expanded": (np.broadcast_to(WEIGHT[0, 1, 1], (2, 3)), 5),
    }
    pickled = {
        name: tensor("0", "FloatStorage", 24, x.shape, [s // 4 for s in x.strides], offset)
        for name, (x, offset) in views.items()
    }
    torch_zip(tmp_path / "x.pth", dictionary(**pickled))
    assert_same(read_tensors(tmp_path / "x.pth"), {name: x for name, (x, _) in views.items()})


def test_a_legacy_tensor_keeps_to_its_storage(tmp_path):
    views = {"K\x00": 24, "K\x14": 4}
    for start, size in views.items():
        view = text("v") + start.encode() + b"K" + bytes([size]) + b"\x87"
        good = tensor("0", "FloatStorage", 24, (size,), (1,), view=view)
        torch_legacy(tmp_path / "x.pth", dictionary(a=good), {"0": (24, WEIGHT.tobytes())})
        flat = WEIGHT.reshape(-1)[start.encode()[1] :][:size]
        assert_same(read_tensors(tmp_path / "x.pth"), {"a": flat})
        long = tensor("0", "FloatStorage", 24, (size + 1,), (1,), view=view)
        torch_legacy(tmp_path / "x.pth", dictionary(a=long), {"0": (24, WEIGHT.tobytes())})
        with pytest.raises(ValueError, match="reaches beyond"):
            read_archive(tmp_path / "x.pth")


# What is converted to float32 is copied, for every name.
BROADCASTS = dictionary(
    **{f"{i}": tensor("0", "BFloat16Storage", 48, (9000,), (0,), i % 48) for i in range(999)}
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed or encrypted"),
        ({"extra": [("archive/data/0", "again")]}, "'archive/data/0' stands twice"),
        ({"extra": [("other/data.pkl", "again")]}, "2 files data.pkl"),
        ({"storages": {"0": b"", "1": b"", "2": b""}}, "is cut short"),
        ({"storages": {}}, "no entry 'archive/data/0'"),
        ({"pickled": b"}"}, "holds no arrays"),
        ({"pickled": dictionary(**{"k" * 2000: b"N"})}, "a key of 2,000 characters"),
        ({"pickled": BROADCASTS}, "more than 8 times the file"),
        ({"pickled": b"K\x05"}, "neither a dict nor a module"),
        ({"pickled": dictionary(a=b"K\x05") + b"Q"}, "refuses a persistent id"),
        ({"pickled": b"}(" + text("a") + b"N" + text("a") + b"Nu"}, "'a' stands twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_torch_does_not_write_are_refused(tmp_path, change, message):
    torch_zip(tmp_path / "x.pth", **change)
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "the file is empty"),
        ("page.pth", b"<!DOCTYPE html>", "neither safetensors, npz, PyTorch's nor a pickle"),
        ("lfs.pkl", b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'version "),
        ("int.pkl", b"\x80\x04K\x05.", "neither a dict nor a module"),
        (
            "bytes.pkl",
            b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
            "damaged pickle: expected",
        ),
        ("id.pkl", b"\x80\x04K\x05Q.", "refuses a persistent id: there are none"),
        ("memo.pkl", b"\x80\x04}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.", "damaged pickle: KeyError"),
        ("long.safetensors", struct.pack("<Q", 99) + b"{}", "cut short"),
        ("json.safetensors", struct.pack("<Q", 2) + b"{]", "Expecting"),
        ("deep.safetensors", struct.pack("<Q", 90000) + b'{"a":' * 18000, "damaged header"),
    ],
)
def test_what_is_no_file_of_arrays_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_archive(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_there_must_be_a_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_tensors(path)


SAFETENSORS_FAULTS = {
    "stands twice": '{"a":%s,"a":%s}',
    "has dtype F4": '{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}',
    "its place is wrong": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "is cut short": '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "no list of sizes": '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
    "or place is no": '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "no dtype": '{"a":[]}',
    "over one another": '{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},"b":%s}',
}


@pytest.mark.parametrize("message", SAFETENSORS_FAULTS)
def test_a_safetensors_header_is_checked(tmp_path, message):
    good = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = SAFETENSORS_FAULTS[message].replace("%s", good).encode()
    if message != "stands twice":
        json.loads(header)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_archive(path)


def test_npz_entries_are_arrays_of_numbers_and_no_bombs(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Evil(tmp_path / "made")], dtype=object))
    with pytest.raises(ValueError, match="dtype object"):
        read_archive(path)
    assert not (tmp_path / "made").exists()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(ValueError, match="neither npz nor PyTorch's"):
        read_archive(path)
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (GREAT,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match="its shape does not fit its bytes"):
        read_archive(path)
    # A directory that claims 1 GiB for an entry of 20 bytes.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(1000))
    data = path.read_bytes()
    place = data.rindex(struct.pack("<I", 1000))
    path.write_bytes(data[:place] + struct.pack("<I", 2**30) + data[place + 4 :])
    with pytest.raises(ValueError, match="claims too many bytes"):
        read_archive(path)


# An array whose data is the string that is remembered first.
SHARED_STRING = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + integers(200_000)
SHARED_STRING += b"cnumpy\ndtype\n" + string("i1") + b"\x85R\x89h\x00tb"


def test_small_files_do_not_take_long_or_much(tmp_path):
    """What makes other readers recurse, copy without end or allocate by a length that is read."""
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
    begin = time.monotonic()
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
    assert time.monotonic() - begin < 10


def test_a_pickle_has_no_end_of_operations(monkeypatch, tmp_path):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 10)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": list(range(20))}))
    with pytest.raises(ValueError, match="more than 10 operations"):
        read_archive(tmp_path / "x.pkl")


# --- damaged files ----------------------------------------------------------------------------


def test_every_truncation_is_told(sample):
    data = sample.read_bytes()
    for length in [*range(0, len(data), 5), len(data) - 1]:
        sample.write_bytes(data[:length])
        with pytest.raises(ValueError):
            read_archive(sample)


def damage(rng, data):
    """A byte or a few replaced, a piece removed or repeated."""
    data, place = bytearray(data), int(rng.integers(len(data)))
    kind = rng.integers(4)
    if kind == 0:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[place : place + 4] = rng.bytes(4)
    elif kind == 2:
        del data[place : place + int(rng.integers(1, 9))]
    else:
        data[place:place] = data[place : place + int(rng.integers(1, 40))]
    return bytes(data)


def test_any_damage_gives_an_error_or_arrays(sample):
    """With checksums, an error or the very same arrays."""
    data = sample.read_bytes()
    rng = np.random.default_rng(zlib.crc32(sample.name.encode()))
    for _ in range(400):
        sample.write_bytes(damage(rng, data))
        try:
            found = read_archive(sample).tensors
        except ValueError:
            continue
        assert all(type(x) is np.ndarray and x.dtype.kind in "biufc" for x in found.values())
        assert all(np.array(x, copy=True).nbytes < 1 << 20 for x in found.values())
        if sample.name in CHECKED:
            assert_same(found, ARRAYS)


def test_any_damage_of_a_pickle_within_a_valid_zip_gives_an_error_or_arrays(tmp_path):
    pickled = dictionary(model=state_dict(), epoch=b"K\x05")
    rng = np.random.default_rng(0)
    for _ in range(600):
        torch_zip(tmp_path / "x.pth", damage(rng, pickled))
        try:
            found = read_archive(tmp_path / "x.pth").tensors
        except ValueError:
            continue
        assert all(np.array(x, copy=True).nbytes < 1 << 20 for x in found.values())
