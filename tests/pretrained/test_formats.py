"""Files of arrays: against torch, safetensors, NumPy and pickle."""

import collections
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from array_files import (
    ARRAYS,
    FORMATS,
    IDS,
    TENSORS,
    WEIGHT,
    assert_same,
    python2_pickle,
    state_dict,
    torch_script,
)

from zegformer_jax.pretrained.formats import read_archive, read_tensors, write_tensors


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


def test_the_suffix_is_ignored(sample):
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


def test_counts_entries_that_are_not_arrays(tmp_path):
    value = ARRAYS | {"epoch": 3, "names": ["a"], "seen": {1, 2}, "best": None}
    value |= {"deep": collections.OrderedDict(a=WEIGHT), "none": collections.defaultdict(list)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    archive = read_archive(tmp_path / "x.pkl")
    assert_same(archive.tensors, ARRAYS)
    assert archive.ignored == 6


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


def test_reads_float8_of_safetensors(tmp_path):
    """The library (0.8.0) writes float8, but cannot convert it to NumPy."""
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {
        "e4m3": WEIGHT.astype(ml_dtypes.float8_e4m3fn),
        "e5m2": WEIGHT.astype(ml_dtypes.float8_e5m2),
    }
    numpy.save_file(arrays | ARRAYS, tmp_path / "x.safetensors")
    expected = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert_same(read_tensors(tmp_path / "x.safetensors"), expected | ARRAYS)


def test_safetensors_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = ARRAYS | {"h": WEIGHT.astype(ml_dtypes.bfloat16), "e": np.zeros((0, 4), np.uint8)}
    write_tensors(tmp_path / "x.safetensors", arrays, {"format": "pt", "name": "ä"})
    assert_same(numpy.load_file(tmp_path / "x.safetensors"), arrays)
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "name": "ä"}


# --- what is written --------------------------------------------------------------------------


@pytest.fixture(params=[".safetensors", ".npz", ".pth"])
def suffix(request):
    """Suffixes of written files; the last needs PyTorch."""
    if request.param == ".pth":
        pytest.importorskip("torch")
    return request.param


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


def test_writing_twice_gives_the_same_bytes(tmp_path, suffix):
    write_tensors(tmp_path / f"a{suffix}", ARRAYS)
    write_tensors(tmp_path / f"b{suffix}", ARRAYS)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_file_can_be_read_by_whom_others_can(tmp_path, suffix):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / f"x{suffix}", ARRAYS)
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / f"x{suffix}").stat().st_mode == mode


def test_without_pytorch_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it raises
    with pytest.raises(ValueError) as caught:
        write_tensors(tmp_path / "x.pth", ARRAYS)
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: only PyTorch writes .pth")
    assert "write .safetensors instead" in str(caught.value) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arrays", "metadata", "message"),
    [
        ("x.bin", ARRAYS, None, "choose one of .safetensors, .npz, .pth"),
        ("x.npz", ARRAYS, {"a": "b"}, "cannot hold metadata"),
        ("x.npz", {"h": WEIGHT.astype(ml_dtypes.bfloat16)}, None, "'h' has dtype bfloat16"),
        ("x.pth", ARRAYS, {"model": "b"}, "'model'"),
        ("x.npz", {"o": np.array([{}])}, None, "'o' has dtype object"),
        ("x.safetensors", {"__metadata__": WEIGHT}, None, "__metadata__"),
        ("x.safetensors", {"z": WEIGHT.astype(complex)}, None, "x.safetensors: .*complex128"),
    ],
)
def test_refused_arrays_leave_the_file_unchanged(tmp_path, name, arrays, metadata, message):
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / name, arrays, metadata)
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [(name, b"before")]


def test_a_failure_while_writing_leaves_the_file_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, ARRAYS)
    before = path.read_bytes()

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_tensors(path, {"b": WEIGHT})
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [(path.name, before)]


def test_a_missing_directory_is_named(tmp_path):
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
    """Storages and `byteorder` as torch.save writes them on a big-endian machine."""
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
