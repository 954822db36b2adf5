"""What stands beside the shards of prepared records: the index, and TFDS's description."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.input import prepared
from zegformer_jax.input.shards import Note
from zegformer_jax.vocabulary import Vocabulary


def pack_index(notes: Sequence[Note]) -> bytes:
    """Gives the content of the index of a split's shards; the same notes give the same bytes."""
    arrays = {
        name: np.concatenate([getattr(note, name) for note in notes])
        for name in ("offset", "length", "checksum", "classes")
    }
    sizes = [len(note.length) for note in notes]
    shard = np.repeat(np.arange(len(notes), dtype=np.int32), sizes)
    file = io.BytesIO()
    np.savez(file, **prepared.Index(shard=shard, **arrays)._asdict())
    return file.getvalue()


def write_tfds_info(
    directory: str, name: str, vocabulary: Vocabulary, notes: Mapping[str, Sequence[Note]]
) -> None:
    """Writes what `tfds.builder_from_directory` opens a directory by.

    Args:
      directory: where the shards lie, local or remote.
      name: of the data set.
      vocabulary: of the labels.
      notes: of each split's shards, in their order.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(
                shape=(None, None, 1), dtype=vocabulary.label_dtype.type, encoding_format="png"
            ),
            "id": tfds.features.Text(),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        identity = tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=folder, module_name=""
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features)
        info.set_file_format(tfds.core.FileFormat.TFRECORD)
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, filetype_suffix="tfrecord"
        )
        info.set_splits(
            tfds.core.splits.SplitDict(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(note.length) for note in parts],
                    num_bytes=sum(note.size for note in parts),
                    filename_template=template.replace(split=split),
                )
                for split, parts in notes.items()
            )
        )
        info.write_to_directory(folder)
        for path in sorted(Path(folder).iterdir()):
            prepared.write_bytes(prepared.join(directory, path.name), path.read_bytes())
