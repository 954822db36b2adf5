"""TFRecords with NumPy alone: TensorFlow takes seconds and 600 MB in every process that writes."""

import functools
from collections.abc import Mapping

import numpy as np

HEADER_BYTES = 12  # of a record: the length (8), its checksum (4)
FOOTER_BYTES = 4  # the data's checksum
CASTAGNOLI = 0x82F63B78  # CRC-32C's polynomial, bits reversed; RFC 3720, appendix B.4
MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
LANE_BITS = 6  # a checksum is computed of 64 bytes in each of many lanes at once
BYTES_WIRE_TYPE = 2  # protocol buffers' encoding of what has a length
VARINT_BITS = 7


def frame(data: bytes) -> bytes:
    """Gives a record as it stands in a TFRecord file: `data` with its length and checksums."""
    length = len(data).to_bytes(8, "little")
    return b"".join((length, _checksum(length), data, _checksum(data)))


def encode_example(features: Mapping[str, bytes]) -> bytes:
    """Encodes a tf.train.Example of features with one text each, in the order of their names."""
    entries = (
        _field(1, name.encode()) + _field(2, _field(1, _field(1, value)))
        for name, value in sorted(features.items())
    )
    return _field(1, b"".join(_field(1, entry) for entry in entries))


def _field(number: int, value: bytes) -> bytes:
    """A protocol buffer's field: its key, its length, its bytes."""
    size, length = len(value), bytearray()
    while size >> VARINT_BITS:
        length.append(size & 0x7F | 0x80)
        size >>= VARINT_BITS
    length.append(size)
    return bytes((number << 3 | BYTES_WIRE_TYPE,)) + bytes(length) + value


def _checksum(data: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and shifted."""
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def crc32c(data: bytes) -> int:
    """CRC-32C of at least 4 bytes.

    The bytes are cut into lanes that advance together, as if each began at zero. As the checksum is
    linear, two neighbours make one: the left lane's, moved on by the right one's zeros, xor the
    right lane's.
    """
    lanes = 1 << (-(-len(data) >> LANE_BITS) - 1).bit_length()
    padded = np.zeros(lanes << LANE_BITS, np.uint8)  # zeros ahead change nothing
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # the register's first state
    state, byte_table = np.zeros(lanes, np.uint32), _byte_table()
    for byte in np.ascontiguousarray(padded.reshape(lanes, -1).T):
        state = byte_table[(state ^ byte) & 0xFF] ^ (state >> np.uint32(8))
    power = LANE_BITS
    while len(state) > 1:
        state = _advanced(state[0::2], power) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> np.ndarray:
    """The register after one byte: uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, CASTAGNOLI, 0).astype(np.uint32)
    return table


@functools.cache
def _zeros_table(power: int) -> np.ndarray:
    """What each byte of the register becomes after 2^power bytes of zeros: uint32 [4, 256]."""
    if power:
        return _advanced(_zeros_table(power - 1), power - 1)
    bytes_of = np.arange(256, dtype=np.uint32) << np.uint32([[0], [8], [16], [24]])
    return _byte_table()[bytes_of & 0xFF] ^ (bytes_of >> np.uint32(8))


def _advanced(state: np.ndarray, power: int) -> np.ndarray:
    """Registers after 2^power bytes of zeros."""
    table = _zeros_table(power)
    parts = [table[place][(state >> np.uint32(8 * place)) & 0xFF] for place in range(4)]
    return functools.reduce(np.bitwise_xor, parts)
