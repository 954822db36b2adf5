"""TFRecords that NumPy writes against TensorFlow's own."""

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from zegformer_jax.input import tfrecords

# Texts around the lanes' lengths, which are of 64 bytes and powers of two of them.
LENGTHS = [4, 5, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000, 65_536, 100_003]


def test_the_known_checksums():
    """RFC 3720, appendix B.4."""
    assert tfrecords.crc32c(bytes(32)) == 0x8A9136AA
    assert tfrecords.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tfrecords.crc32c(bytes(range(32))) == 0x46DD794E
    assert tfrecords.crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("length", LENGTHS)
def test_a_record_is_tensorflows_byte_for_byte(length, tmp_path):
    data = bytes(i * 131 + i // 256 & 0xFF for i in range(length))
    path = tmp_path / "records"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(data)
    assert tfrecords.frame(data) == path.read_bytes()
    assert len(path.read_bytes()) == tfrecords.HEADER_BYTES + length + tfrecords.FOOTER_BYTES


@given(st.dictionaries(st.text(min_size=1, max_size=200), st.binary(max_size=300), max_size=4))
def test_an_example_is_tensorflows(features):
    """The same features, without a byte more: a map's order is the writer's choice."""
    example = tf.train.Example()
    example.features.SetInParent()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    encoded = tfrecords.encode_example(features)
    assert tf.train.Example.FromString(encoded) == example
    assert len(encoded) == example.ByteSize()


def test_an_examples_bytes_do_not_depend_on_the_order_of_its_features():
    one = tfrecords.encode_example({"b": b"1", "a": b"2"})
    assert one == tfrecords.encode_example({"a": b"2", "b": b"1"})
