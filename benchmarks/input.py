"""Training images per second: this project's input pipeline compared with a PyTorch DataLoader.

    python benchmarks/input.py [--images=64] [--seconds=20] [--workers=2] [--crops 640 512]

Makes JPEGs of 640x480 with labels of 20 classes, or takes a folder (--folder=DIR with images/*.jpg
and annotations/*.png). Both take turns for several rounds: the pipeline, and, if PyTorch is
installed, a typical mapper (Pillow and NumPy in DataLoader's worker processes). Then the steps of
the pipeline are timed one by one.
"""

import argparse
import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, if not installed

from zegformer_jax.input import pipeline, transforms
from zegformer_jax.input.datasets import FileSource
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.text.vocabulary import Vocabulary

OURS = "this pipeline"
SIDES = (480, 640)
CLASSES = 20
BATCH = 8
ROUNDS = 3
SHORT_SIDES = {
    640: tuple(int(64 * s + 0.5) for s in range(5, 16)),
    512: tuple(int(51.2 * s + 0.5) for s in range(5, 21)),
}
ACCELERATORS_NEED = 300  # images per second, for a host with 8 accelerators


def make_folder(folder: Path, count: int) -> None:
    """Writes images that compress like photographs, and label maps of large regions."""
    rng = np.random.default_rng(0)
    for kind in ("images", "annotations"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        coarse = rng.integers(0, 256, (15, 20, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIDES[::-1], Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "images" / f"{index:05d}.jpg", quality=92)
        regions = rng.integers(0, CLASSES, (6, 8), np.uint8)
        label = Image.fromarray(regions).resize(SIDES[::-1], Image.Resampling.NEAREST)
        label.save(folder / "annotations" / f"{index:05d}.png")


def open_folder(folder: Path) -> FileSource:
    """Opens a folder of images and labels as the project does."""
    images = sorted((folder / "images").glob("*.jp*g"))
    if not images:
        sys.exit(f"{folder / 'images'}: no *.jpg there")
    labels = [folder / "annotations" / f"{image.stem}.png" for image in images]
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(CLASSES)])
    return FileSource(images, labels, vocabulary)


def ours(source: FileSource, crop: int, workers: int) -> Iterator[int]:
    """Yields the pictures of each batch of the pipeline."""
    settings = InputSettings(
        BATCH, crop, SHORT_SIDES[crop], max_long_side=4 * crop, threads=workers
    )
    batches = pipeline.train_batches(source, source.vocabulary, settings, seed=0, num_steps=10**9)
    for batch in batches:
        yield len(batch["image"])


def mapper(crop: int) -> Callable[[Path, Path, np.random.Generator], tuple]:
    """Returns a typical mapper in Pillow and NumPy, with the same augmentation and order."""

    def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        def linear(x: np.ndarray, gain: float, offset: float) -> np.ndarray:
            return np.clip(x.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)

        def hsv(x: np.ndarray, change: Callable[[np.ndarray], None]) -> np.ndarray:
            values = np.array(Image.fromarray(x).convert("HSV"), np.float32)
            change(values)
            changed = Image.fromarray(values.clip(0, 255).astype(np.uint8), "HSV")
            return np.asarray(changed.convert("RGB"))

        def saturate(values: np.ndarray) -> None:
            values[..., 1] *= rng.uniform(0.5, 1.5)

        def turn(values: np.ndarray) -> None:
            values[..., 0] = (values[..., 0] + rng.uniform(-18, 18) * 256 / 180) % 256

        coin = rng.random() < 0.5
        if rng.random() < 0.5:
            image = linear(image, 1.0, rng.uniform(-32, 32))
        if coin and rng.random() < 0.5:
            image = linear(image, rng.uniform(0.5, 1.5), 0.0)
        for change in (saturate, turn):
            if rng.random() < 0.5:
                image = hsv(image, change)
        if not coin and rng.random() < 0.5:
            image = linear(image, rng.uniform(0.5, 1.5), 0.0)
        return image

    def read(image_file: Path, label_file: Path, rng: np.random.Generator) -> tuple:
        image, label = Image.open(image_file).convert("RGB"), Image.open(label_file)
        short = rng.choice(SHORT_SIDES[crop])
        scale = short / min(image.size)
        size = tuple(int(side * scale + 0.5) for side in image.size)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        ids = np.asarray(label.resize(size, Image.Resampling.NEAREST))
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in pixels.shape[:2])
        pixels = jitter(pixels[top : top + crop, left : left + crop], rng)
        ids = ids[top : top + crop, left : left + crop]
        if rng.random() < 0.5:
            pixels, ids = pixels[:, ::-1], ids[:, ::-1]
        rest = [(0, crop - side) for side in ids.shape]
        pixels = np.pad(pixels, [*rest, (0, 0)], constant_values=128)
        return pixels, np.pad(ids, rest, constant_values=255)

    return read


def torch_batches(source: FileSource, crop: int, workers: int) -> Iterator[int]:
    """Yields the number of images of each batch of a DataLoader."""
    import torch

    read = mapper(crop)

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> tuple:
            rng, place = np.random.default_rng(index), index % len(source)
            image, label = read(source.image_files[place], source.label_files[place], rng)
            return torch.from_numpy(image.copy()), torch.from_numpy(label.copy())

    indices = iter(range(10**9))
    loader = torch.utils.data.DataLoader(
        Images(), batch_size=BATCH, num_workers=workers, sampler=indices
    )
    for images, _ in loader:
        yield len(images)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Returns images per second over some seconds, after two warm-up batches."""
    for _ in range(2):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += next(batches)
    return count / (time.perf_counter() - start)


def stages(source: FileSource, crop: int, count: int = 40) -> dict[str, float]:
    """Returns milliseconds per image of each step, on one thread."""
    records = [source[i % len(source)] for i in range(count)]
    draws = np.random.default_rng(0).random((count, transforms.NUM_RANDOM))
    crops = [np.ascontiguousarray(record["image"][:crop, :crop]) for record in records]

    def resize(i: int) -> None:
        short_side = SHORT_SIDES[crop][i % len(SHORT_SIDES[crop])]
        size = transforms.resized_sides(*SIDES, short_side, 4 * crop)
        window = transforms.Window(0, 0, *(min(side, crop) for side in size))
        transforms.resize_image(records[i]["image"], size, window)
        transforms.resize_label(records[i]["label"], size, window)

    steps = {
        "decode": lambda i: source[i % len(source)],
        "resize": resize,
        "jitter": lambda i: transforms.colour_jitter(crops[i], draws[i, :9]),
    }
    measured = {}
    for name, step in steps.items():
        step(0)
        start = time.perf_counter()
        for i in range(count):
            step(i)
        measured[name] = 1000 * (time.perf_counter() - start) / count
    return measured


def main(arguments: list[str]) -> None:
    """Measures all crop sizes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder with images/ and annotations/")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2, help="threads, and worker processes")
    parser.add_argument("--crops", type=int, nargs="+", default=[640, 512])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "made"
        if options.folder is None:
            make_folder(folder, options.images)
        source = open_folder(folder)
        for crop in options.crops:
            makers = {OURS: ours}
            if importlib.util.find_spec("torch"):
                makers["DataLoader"] = torch_batches
            rates = {name: [] for name in makers}
            for turn in range(ROUNDS):
                for name, make in makers.items():
                    batches = make(source, crop, options.workers)
                    rates[name].append(rate(batches, options.seconds))
                    batches.close()
                    if turn == 0 and make is ours:
                        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                        print(f"crop {crop}  peak memory of the host {kibibytes / 2**20:.2f} GiB")
            report(crop, rates, options.workers, stages(source, crop))


def report(crop: int, rates: dict[str, list[float]], workers: int, steps: dict[str, float]) -> None:
    """Prints the medians, their ratio and the number of cores for a large host."""
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    for name, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        each = medians[name] / workers
        print(
            f"crop {crop}  {name:<14}{medians[name]:7.1f} images/s ({spread}), {each:.1f} per core"
        )
    if "DataLoader" in medians:
        print(f"crop {crop}  ratio {medians[OURS] / medians['DataLoader']:.2f}")
    cores = ACCELERATORS_NEED * workers / medians[OURS]
    print(f"crop {crop}  {ACCELERATORS_NEED} images/s need {cores:.1f} cores")
    print(f"crop {crop}  ms per image: " + ", ".join(f"{k} {v:.1f}" for k, v in steps.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
