"""Zips: their directories, their entries, and entries mapped into memory."""

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zegformer_jax.pretrained.pickles import short

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
END = struct.Struct("<4s6xH8xH")  # of the directory: signature, entries, length of the comment
ENCRYPTED = 1  # a zip entry's flag
MANY = 0xFFFF  # entries, which only zip64 counts
MAX_RATIO = 1032  # of Deflate (zlib's manual)
# What zipfile raises for damaged directories, beside ValueError.
DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    UnicodeError,
    struct.error,
    zlib.error,
)


def map_file(path: Path) -> np.ndarray:
    """Maps a file that is not empty into memory, as read-only bytes [n] uint8."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read_entries(path: Path) -> Iterator[tuple[str, bytes]]:
    """Reads the entries of a zip, compressed or not, one after the other.

    Yields names and bytes. Raises ValueError where the zip is damaged, or an entry claims more
    bytes than its compressed ones can hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = _listed(archive)
            if sum(info.compress_size for info in infos) > path.stat().st_size:
                raise ValueError("a zip whose entries lie over one another")
            for info in infos:
                _check_size(info)
                yield info.filename, archive.read(info)
    except DAMAGE as error:
        raise ValueError(f"a zip that is cut short or damaged ({error})") from error


def _listed(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Lists the entries, whose number must be that which the directory's end tells.

    Python's zipfile does not compare them: a damaged length of a comment hides entries.
    """
    archive.fp.seek(-END.size - len(archive.comment), io.SEEK_END)
    signature, count, length = END.unpack(archive.fp.read(END.size))
    if signature != b"PK\x05\x06" or length != len(archive.comment):
        raise ValueError("a zip whose directory's end is damaged")
    infos = archive.infolist()
    if count not in (len(infos), MANY):
        raise ValueError(f"a zip with {len(infos)} entries, where {count} are announced")
    return infos


def _check_size(info: zipfile.ZipInfo) -> None:
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MAX_RATIO}.get(info.compress_type)
    if ratio is None:
        raise ValueError(f"entry {short(info.filename)} is compressed by a method that is not read")
    if info.file_size > ratio * info.compress_size:
        raise ValueError(f"entry {short(info.filename)} claims too many bytes")


class Entries:
    """The entries of a zip that torch wrote, which are never compressed, mapped into memory.

    Attributes:
        size: of the whole file, in bytes.
        pickle_name: the entry that describes all the others, `<name>/data.pkl`.
    """

    def __init__(self, path: Path):
        self._mapped = map_file(path)
        self._checked: dict[str, np.ndarray] = {}
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in directory(path):
            if info.filename in self._infos:
                raise ValueError(f"entry {short(info.filename)} stands twice in the zip")
            self._infos[info.filename] = info
        pickled = [x for x in self._infos if x.endswith("/data.pkl") and x.count("/") == 1]
        if len(pickled) != 1:
            raise ValueError(f"a zip with {len(pickled)} files data.pkl, where torch writes one")
        self.pickle_name = pickled[0]
        self.size = len(self._mapped)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str) -> np.ndarray:
        """Gives an entry's bytes, [n] uint8, read-only, its checksum compared once."""
        if name not in self._checked:
            if name not in self._infos:
                raise ValueError(f"the zip has no entry {short(name)}")
            self._checked[name] = self._check(self._infos[name])
        return self._checked[name]

    def _check(self, info: zipfile.ZipInfo) -> np.ndarray:
        name = short(info.filename)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise ValueError(f"entry {name} is compressed or encrypted: torch writes neither")
        start = info.header_offset
        if not 0 <= start <= self.size - LOCAL_HEADER.size:
            raise ValueError(f"entry {name} lies outside of the zip")
        header = self._mapped[start : start + LOCAL_HEADER.size].tobytes()
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start += LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + info.file_size > self.size:
            raise ValueError(f"entry {name} is cut short or damaged")
        data = self._mapped[start : start + info.file_size]
        # 0 stands for no checksum (torch.serialization.set_crc32_options(False)).
        if info.CRC and zlib.crc32(data) != info.CRC:
            raise ValueError(f"entry {name} is damaged: its checksum differs")
        return data


def directory(path: Path) -> list[zipfile.ZipInfo]:
    """Lists a zip's entries; raises ValueError where the directory is damaged or not there."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _listed(archive)
    except DAMAGE as error:
        raise ValueError(f"a zip that is cut short or damaged ({error})") from error
