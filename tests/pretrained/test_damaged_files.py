"""Files of arrays that are cut short, damaged or impossible: an error of one line."""

import io
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from array_files import (
    ARRAYS,
    CHECKED,
    FORMATS,
    TENSORS,
    WEIGHT,
    Evil,
    assert_same,
    dictionary,
    python2_pickle,
    state_dict,
    tensor,
    text,
    torch_legacy,
    torch_zip,
)

from zegformer_jax.pretrained.formats import read_archive, read_tensors

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
    "conjugation": tensor("0", "FloatStorage", 24, (2,), (1,))[:-2]
    + dictionary(conj=b"\x88")
    + b"tR",
    "a dtype that is damaged or not numeric": tensor("0", "FloatStorage", 24, (2,), (1,)).replace(
        b"_v2", b"_v3"
    ),
    "tensor without storage": b"ctorch._utils\n_rebuild_tensor_v3\n)R",
    "axes permuted": b"cnumpy.core.numeric\n_frombuffer\n(NNNNtR",
    "array without data": b"cnumpy.core.multiarray\n_reconstruct\n)R",
    "refuses an array of a dtype": pickle.dumps(np.array([1, "a"], object), protocol=2)[2:-1],
    "strides are no": tensor("0", "FloatStorage", 24, (2, 3), (1,)),
    "without storage or offset": tensor("0", "FloatStorage", 24, (2,), (1,), offset=-1),
    "data/9": tensor("9", "FloatStorage", 24, (2,), (1,)),
    "data/../../x": tensor("../../x", "FloatStorage", 24, (2,), (1,)),
    "torch.QInt8Storage": tensor("0", "QInt8Storage", 24, (2,), (1,)),
    "is no tuple of sizes": NUMPY_GREAT.replace(struct.pack("<q", GREAT), struct.pack("<q", -1)),
    f"of shape [{GREAT}] and dtype float32 has 96 bytes": NUMPY_GREAT,
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, message):
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


@pytest.mark.parametrize("count", [25, 2**62, -1, -(2**63)])
def test_a_legacy_storage_beyond_the_file_is_refused(tmp_path, count):
    storages = {key: (x.size, x.tobytes()) for key, _, x in TENSORS.values()}
    torch_legacy(tmp_path / "x.pth", storages=storages | {"2": (count, bytes(8))})
    with pytest.raises(ValueError, match="storage '2' is cut short"):
        read_archive(tmp_path / "x.pth")


def test_a_legacy_tensor_beyond_its_storage_is_refused(tmp_path):
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
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"extra": [("archive/data/0", "again")]}, "'archive/data/0' is in the zip twice"),
        ({"extra": [("other/data.pkl", "again")]}, "2 files data.pkl"),
        ({"storages": {"0": b"", "1": b"", "2": b""}}, "is cut short"),
        ({"storages": {}}, "no entry 'archive/data/0'"),
        ({"pickled": b"}"}, "holds no arrays"),
        ({"pickled": dictionary(**{"k" * 2000: python2_pickle(WEIGHT)})}, "a key of 2,000 char"),
        ({"pickled": BROADCASTS}, "more than 8 times the file"),
        ({"pickled": b"K\x05"}, "neither a dict nor a module"),
        ({"pickled": dictionary(a=b"K\x05") + b"Q"}, "refuses a persistent id"),
        ({"pickled": dictionary(a=python2_pickle(WEIGHT))[:-1] + text("a") + b"Nu"}, "no arrays"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_torch_does_not_write_are_refused(tmp_path, change, message):
    torch_zip(tmp_path / "x.pth", **change)
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("place", "value"),
    [(8, 1), (8, 32), (10, 12), (10, 97)],  # flags: encrypted, patched; methods: bzip2, another
)
@pytest.mark.parametrize("kind", ["zip.pth", "x.npz"])
def test_zips_of_other_methods_are_refused(tmp_path, kind, place, value):
    FORMATS[kind](tmp_path / kind)
    data = bytearray((tmp_path / kind).read_bytes())
    data[data.index(b"PK\1\2") + place] |= value
    (tmp_path / kind).write_bytes(data)
    with pytest.raises(ValueError, match="encrypted, or compressed by|patched data"):
        read_archive(tmp_path / kind)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "the file is empty"),
        ("page.pth", b"\r\n<!DOCTYPE html>", "a web page, not weights: download the file that"),
        (
            "lfs.pkl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "neither safetensors, npz, PyTorch's nor a pickle .it begins with b'version ",
        ),
        ("int.pkl", b"\x80\x04K\x05.", "neither a dict nor a module"),
        (
            "bytes.pkl",
            b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
            "expected 1099511627776 bytes",
        ),
        ("id.pkl", b"\x80\x04K\x05Q.", "refuses a persistent id: there are none"),
        (
            "memo.pkl",
            b"\x80\x04}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
            "damaged pickle: a memo of 2,147,483,647 objects",
        ),
        ("long.safetensors", struct.pack("<Q", 99) + b"{}", "cut short"),
        ("json.safetensors", struct.pack("<Q", 2) + b"{]", "invalid JSON"),
        ("deep.safetensors", struct.pack("<Q", 90000) + b'{"a":' * 18000, "recursion limit"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_archive(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_tensors(path)


SAFETENSORS_FAULTS = {
    "not fully covered": '{"a":%s,"a":%s}',
    "at a byte boundary": '{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}',
    "has dtype F8_E8M0": '{"a":{"dtype":"F8_E8M0","shape":[8],"data_offsets":[0,8]}}',
    "has dtype F4": '{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}',
    "unknown variant": '{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}',
    "invalid shape": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "file not fully covered": '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "integer `-1`": '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
    "boolean `true`": '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "invalid length 0": '{"a":[]}',
    "invalid offset": '{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},"b":%s}',
    "overflow": '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("message", SAFETENSORS_FAULTS)
def test_a_safetensors_header_is_checked(tmp_path, message):
    good = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = SAFETENSORS_FAULTS[message].replace("%s", good).encode()
    json.loads(header)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_archive(path)


def test_npz_entries_are_arrays_of_numbers_and_no_bombs(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Evil(tmp_path / "made")], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_archive(path)
    assert not (tmp_path / "made").exists()
    for odd in (np.array(["text"]), np.zeros(2, [("a", "f4")])):
        np.savez(path, a=odd)
        with pytest.raises(ValueError, match="'a.npy' has dtype .*: not supported"):
            read_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(ValueError, match="neither npz nor PyTorch's"):
        read_archive(path)
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (GREAT,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match="'a.npy' is damaged: Unable to allocate"):
        read_archive(path)
    shape["shape"] = (3,)
    for count, message in ((11, "expected 12 bytes got 11"), (13, "does not fit its bytes")):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, shape)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(count))
        with pytest.raises(ValueError, match=message):
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


@pytest.fixture(params=FORMATS)
def sample(request, tmp_path):
    path = tmp_path / request.param
    FORMATS[request.param](path)
    return path


# --- damaged files ----------------------------------------------------------------------------


def test_every_truncation_is_detected(sample):
    data = sample.read_bytes()
    for length in [*range(0, len(data), 5), len(data) - 1]:
        sample.write_bytes(data[:length])
        with pytest.raises(ValueError):
            read_archive(sample)


def damage(rng, data):
    """Replaces a few bytes, or removes or repeats a part."""
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
    """Formats with checksums give an error or the same arrays."""
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
