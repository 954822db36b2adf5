"""Files of arrays by hand, as torch, NumPy and detectron2 write them."""

import os
import pickle
import struct
import zipfile

import numpy as np

from zegformer_jax.pretrained.formats import write_tensors

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage"}
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


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
    """Writes a zip as torch's, of `pickled` in place of a dict with TENSORS under "model"."""
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


def write_pth(path, tensors):
    """Writes arrays by their names as torch.save does."""
    pickled, storages = {}, {}
    for index, (name, x) in enumerate(tensors.items()):
        array, key = np.ascontiguousarray(x).reshape(np.shape(x)), str(index)
        strides = [step // array.itemsize for step in array.strides]
        pickled[name] = tensor(key, STORAGES[array.dtype.name], array.size, array.shape, strides)
        storages[key] = array.tobytes()
    torch_zip(path, dictionary(**pickled), storages=storages)


def python2_pickle(array):
    """Returns a pickle as Python 2.7 wrote it at protocol 2: byte strings, __builtin__, a long."""
    raw = array.tobytes()
    string = b"T" + struct.pack("<I", len(raw)) + raw
    dtype = b"cnumpy\ndtype\nU\x02" + array.dtype.str[1:].encode() + b"K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + integers(*array.shape) + dtype + b"\x89" + string + b"tb"


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
