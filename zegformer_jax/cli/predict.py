"""Segments an image into the classes that you name.

Writes an overlay and a PNG label map (pixel value = class index), and prints each class's share of
the image.

Examples:
  %(prog)s street.jpg --classes 'car, tree, "sofa, couch"'
  %(prog)s street.jpg --classes-file classes.txt --workdir=runs/voc --output=segmented
  %(prog)s street.jpg --classes 'car, tree' --config.eval.flip=True
"""

import argparse
import csv
import re
from pathlib import Path

from zegformer_jax.cli import config
from zegformer_jax.cli.demo import WORKDIR
from zegformer_jax.runtime.errors import UserError

NO_NAME = re.compile(r'[\x00-\x1f"]|^[\[{]')  # columns, control characters, open quotes, JSON
QUOTED = re.compile(r'^"([^"]*)"$')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("image", help="an image file")
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
    parser.set_defaults(fields=[])  # `--config.eval.FIELD=VALUE` changes the workdir's config


def run(options: argparse.Namespace) -> None:
    """Segments the image, writes two files, and prints the classes found."""
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.experiment.workdir import load_config
    from zegformer_jax.input.photographs import read_photograph
    from zegformer_jax.segmenter import Segmenter

    classes = read_classes(options)
    for field in options.fields:
        if not field.startswith(f"{config.PREFIX}eval."):
            raise UserError(f"{field}: the model is trained; only fields of eval can change")
    fields = config.override(load_config(options.workdir), options.fields)
    segmenter = Segmenter(Experiment.open(fields, options.workdir))
    result = segmenter(read_photograph(options.image), classes)
    folder = Path(options.output or Path(options.workdir) / "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(options.image).stem
    result.overlay().save(folder / f"{stem}_overlay.png")
    result.label_image().save(folder / f"{stem}_labels.png")
    areas = result.areas()
    for name, share in areas.items():
        index = result.vocabulary.names.index(name)
        kind = "seen" if result.vocabulary.seen[index] else "unseen"
        print(f"{100 * share:5.1f} %  {name} ({kind}, label {index})")
    if absent := [name for name in result.vocabulary.names if name not in areas]:
        print(f"no pixel: {'; '.join(absent)}")
    print(f"written: {folder}/{stem}_overlay.png, {stem}_labels.png")


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
