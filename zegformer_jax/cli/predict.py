"""Segments images into the classes that you name.

Writes an overlay and a PNG label map (pixel value = class index) for each image, and prints each
class's share of it. Images of several folders are written to folders of the same names.

Examples:
  %(prog)s street.jpg --classes 'car, tree, "sofa, couch"'
  %(prog)s street.jpg --classes-file classes.txt --workdir=runs/voc --output=segmented
  %(prog)s street.jpg --classes 'car, tree' --config.eval.flip=True
  %(prog)s monday/*.jpg tuesday/*.jpg --classes-file classes.txt --output=segmented
"""

import argparse
import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zegformer_jax.cli import config
from zegformer_jax.cli.demo import WORKDIR
from zegformer_jax.runtime.errors import MissingFile, UserError

if TYPE_CHECKING:
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.segmenter import Segmentation
    from zegformer_jax.text.vocabulary import Vocabulary

ORIGIN = "image"  # the PNG text that names a written file's image
NO_NAME = re.compile(r'[\x00-\x1f"]|^[\[{]')  # columns, control characters, open quotes, JSON
QUOTED = re.compile(r'^"([^"]*)"$')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image file")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument(
        "--classes",
        metavar="NAMES",
        help="class names, commas or line ends between them; double quotes hold synonyms together",
    )
    classes.add_argument(
        "--classes-file",
        metavar="FILE",
        help="one class a line, commas between synonyms; or a vocabulary or list of names (.json)",
    )
    parser.add_argument(
        "--workdir", default=WORKDIR, metavar="DIR", help="a trained model; default: %(default)s"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write to; default: WORKDIR/predictions"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="refuse images of more pixels; default: Pillow's limit, 178956970",
    )
    parser.epilog = config.describe_fields(["eval"])
    parser.set_defaults(fields=[])  # `--config.eval.FIELD=VALUE` changes the workdir's config


class Output(NamedTuple):
    """The files that are written for an image.

    Attributes:
        image: The image's path.
        overlay: Path of the overlay.
        labels: Path of the label map.
    """

    image: str
    overlay: Path
    labels: Path

    @property
    def origin(self) -> str:
        """The image's path from the folder of the label map, which is stored in it."""
        path = os.path.relpath(self.image, self.labels.parent)
        return path.encode("utf-8", "backslashreplace").decode()


def run(options: argparse.Namespace) -> None:
    """Segments the images; writes two files for each, and prints the classes found."""
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.experiment.workdir import load_config
    from zegformer_jax.runtime.progress import announce
    from zegformer_jax.segmenter import Segmenter

    classes = read_classes(options)
    for field in options.fields:
        if not field.startswith(f"{config.PREFIX}eval."):
            raise UserError(f"{field}: the model is trained; only fields of eval can change")
    fields = config.override(load_config(options.workdir), options.fields)
    experiment = Experiment.open(fields, options.workdir)
    folder = Path(options.output or Path(options.workdir) / "predictions")
    outputs = name_outputs(options.images, folder)
    segmenter = Segmenter(experiment, say=lambda line: announce([line]))
    for place, output in enumerate(outputs):
        photograph = segmenter.read(output.image, options.max_pixels)
        if place == 0:
            announce(describe_model(experiment, segmenter.vocabulary(classes)))
        result = segmenter(photograph, classes)
        save(result, output)
        if len(outputs) > 1:
            print(f"{output.image}:")
        print(describe(result, output), flush=True)


def describe_model(experiment: "Experiment", vocabulary: "Vocabulary") -> list[str]:
    """Returns lines on the model, for the start of a prediction."""
    from zegformer_jax.input.benchmarks import GENERATED
    from zegformer_jax.runtime.mesh import describe_devices

    lines = [
        describe_devices(),
        f"model: {experiment.origin}",
        f"CLIP: {experiment.clip.source}",
        f"classes: {len(vocabulary):,}, of which the training had {sum(vocabulary.seen):,}",
    ]
    if experiment.dataset.name == GENERATED:
        lines.append(
            "note: this model was trained on OpenMoji drawings and does not know photographs, "
            "however high the shares below are; docs/images.md says how to get one that does"
        )
    return lines


def name_outputs(images: Sequence[str], folder: Path) -> list[Output]:
    """Names the files to write; the images' folders below their common one are mirrored.

    Args:
        images: Paths of the images.
        folder: The folder to write to.

    Raises:
        MissingFile: An image does not exist.
        UserError: Two images would have the same files, or a file is there that is not of its
            image.
    """
    parents = [Path(os.path.abspath(image)).parent for image in images]
    common = os.path.commonpath(parents)
    outputs: dict[Path, Output] = {}
    for image, parent in zip(images, parents, strict=True):
        if "://" not in image and not Path(image).exists():
            raise MissingFile(f"{image}: no such image")
        stem, place = Path(image).stem, folder / parent.relative_to(common)
        output = Output(image, place / f"{stem}_overlay.png", place / f"{stem}_labels.png")
        other = outputs.setdefault(output.labels, output)
        if other is not output:
            raise UserError(
                f"{image}: {other.image} would be written to the same {output.labels}; rename one, "
                "or segment them one by one into two folders by --output"
            )
        _check_free(output)
    return list(outputs.values())


def _check_free(output: Output) -> None:
    """Refuses to replace files that are not of the same image."""
    for path in (output.labels, output.overlay):
        if path.exists() and (found := _origin_of(path)) != output.origin:
            whose = f"is of {found}" if found else "was not written by this command"
            raise UserError(
                f"{path}: {whose}, and {output.image} would replace it: name another folder by "
                "--output, or remove it"
            )


def _origin_of(path: Path) -> str | None:
    """Returns the image that a written file is of; None for other files."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.info.get(ORIGIN)
    except OSError:
        return None


def save(result: "Segmentation", output: Output) -> None:
    """Writes the overlay and the label map, which name their image."""
    from PIL import PngImagePlugin

    from zegformer_jax.runtime.files import write_bytes

    note = PngImagePlugin.PngInfo()
    note.add_itxt(ORIGIN, output.origin)
    images = {output.overlay: result.overlay(), output.labels: result.label_image()}
    for path, image in images.items():
        file = io.BytesIO()
        image.save(file, "png", pnginfo=note)
        write_bytes(path, file.getvalue())


def describe(result: "Segmentation", output: Output) -> str:
    """Returns the shares of the classes, largest first, and the files written."""
    areas, lines = result.areas(), []
    for name, share in areas.items():
        index = result.vocabulary.names.index(name)
        kind = "seen" if result.vocabulary.seen[index] else "unseen"
        lines.append(f"{100 * share:5.1f} %  {name} ({kind}, label {index})")
    if absent := [name for name in result.vocabulary.names if name not in areas]:
        lines.append(f"no pixel: {'; '.join(absent)}")
    return "\n".join([*lines, f"written: {output.overlay}, {output.labels.name}"])


def read_classes(options: argparse.Namespace) -> list[str]:
    """Returns the class names of `--classes` or `--classes-file`.

    Args:
        options: The parsed flags; one of the two is None.

    Raises:
        MissingFile: There is no such file.
        UserError: A quote is not closed, the file holds no names, or a class is empty or is listed
            twice.
    """
    from zegformer_jax.runtime.files import read_text
    from zegformer_jax.text.vocabulary import Vocabulary

    if options.classes is not None:
        return list(Vocabulary.from_names(parse_classes(options.classes), where="--classes").names)
    path = Path(options.classes_file)
    if path.suffix.lower() == ".json":
        return list(Vocabulary.load(path).names)
    names = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name = QUOTED.sub(r"\1", line.strip()).strip()
        if NO_NAME.search(name):
            raise UserError(
                f"{path}: line {number} is no class name: {line.strip()!r}; give one class a line, "
                "commas between synonyms, or JSON in a file that ends in .json"
            )
        names += [name] if name else []
    return list(Vocabulary.from_names(names, where=str(path)).names)


def parse_classes(text: str) -> list[str]:
    """Splits class names at commas and line ends; double quotes hold synonyms together, as in CSV.

    `sheep, "sofa, couch", cat` are three classes, the second with two synonyms.

    Raises:
        UserError: A quote is not closed, or stands inside a name.
    """
    names = []
    for line in text.splitlines():
        try:
            row = next(csv.reader([line], skipinitialspace=True, strict=True), [])
            is_right = '""' in line or not any('"' in name for name in row)
        except csv.Error:
            is_right = False
        if not is_right:
            raise UserError(
                f"--classes: a double quote in {line.strip()!r} is not closed or stands inside a "
                'name; quote whole names: cat, "sofa, couch"'
            )
        names += [name.strip() for name in row]
    return names
