"""The TFDS builder of OpenMoji-VOC: generated images in ArrayRecord files, made offline."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from zegformer_jax.input.openmoji.rasters import Pictures, load_pictures
from zegformer_jax.input.openmoji.scenes import scene
from zegformer_jax.runtime.progress import announce

PNG_COMPRESSION = 1  # the fastest level; files grow by a few per cent


@dataclasses.dataclass
class OpenmojiVocConfig(tfds.core.BuilderConfig):
    """Number and size of the generated images, and their seed.

    Attributes:
        name: Name made from the other values.
        train_scenes: Number of training images, of seen classes.
        validation_scenes: Number of validation images, of all classes.
        side: Pixels of a training image's side; see `scenes.scene` for validation.
        seed: Seed of the images; the drawings are the same for all seeds.
        cache_dir: Folder for the rasterised drawings; None caches nothing.
    """

    name: str = ""
    train_scenes: int = 8000
    validation_scenes: int = 300
    side: int = 96
    seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self):
        """Names the configuration after its values."""
        self.name = (
            f"s{self.side}_train{self.train_scenes}_validation{self.validation_scenes}"
            f"_seed{self.seed}"
        )


class OpenmojiVoc(tfds.core.GeneratorBasedBuilder):
    """Images composed of OpenMoji drawings, labelled pixel by pixel."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "236 classes, 216 of them seen."}
    # TFDS 4.9.10 finds this path with importlib_resources, which it does not declare as needed.
    code_path = tfds.core.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.Image(
                    shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
                ),
                "id": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(
            features=features,
            description="Composed OpenMoji drawings (CC BY-SA 4.0); label 255 is background.",
            homepage="https://openmoji.org",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        pictures = load_pictures(self.builder_config.cache_dir)
        counts = {
            "train": self.builder_config.train_scenes,
            "validation": self.builder_config.validation_scenes,
        }
        return {
            split: self._generate_examples(pictures, split, count)
            for split, count in counts.items()
        }

    def _generate_examples(
        self, pictures: Pictures, split: str, count: int
    ) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(count):
            image, label = scene(pictures, split, index, seed=config.seed, side=config.side)
            yield (
                index,
                {
                    "image": _png(image),
                    "label": _png(label),
                    "id": f"{split}_{index:06d}",
                },
            )


def prepare(
    data_dir: str | Path,
    *,
    train_scenes: int = 8000,
    validation_scenes: int = 300,
    side: int = 96,
    seed: int = 0,
) -> tfds.core.DatasetBuilder:
    """Generates the benchmark under `data_dir` unless it exists; uses no network.

    Args:
        data_dir: TFDS's folder, which also caches the rasterised drawings.
        train_scenes: Number of training images.
        validation_scenes: Number of validation images.
        side: Pixels of a training image's side.
        seed: Seed of the images, at least 0.

    Returns:
        The prepared builder; `as_data_source(split)` reads records by index.
    """
    config = OpenmojiVocConfig(
        train_scenes=train_scenes,
        validation_scenes=validation_scenes,
        side=side,
        seed=seed,
        cache_dir=str(data_dir),
    )
    builder = OpenmojiVoc(data_dir=str(data_dir), config=config, file_format="array_record")
    if not builder.is_prepared():
        announce([f"generating {train_scenes + validation_scenes:,} images in {data_dir} ..."])
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of a download
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
                )
            )
    return builder


def _png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=PNG_COMPRESSION)
    file.seek(0)
    return file
