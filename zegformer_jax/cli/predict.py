"""Segments an image into the classes that you name.

Writes an overlay and a PNG label map (pixel value = class index), and prints each class's share of
the image.

Examples:
  %(prog)s street.jpg --classes 'car, tree, "sofa, couch"'
  %(prog)s street.jpg --classes-file classes.txt --workdir=runs/voc --output=segmented
"""

import argparse
import csv
from pathlib import Path

from zegformer_jax.cli.demo import WORKDIR
from zegformer_jax.runtime.errors import MissingFile, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("image", help="an image file")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument(
        "--classes",
        metavar="NAMES",
        help="class names with commas between them; double quotes hold synonyms together",
    )
    classes.add_argument(
        "--classes-file",
        metavar="FILE",
        help="one class a line, commas between synonyms; or a vocabulary (.json)",
    )
    parser.add_argument(
        "--workdir", default=WORKDIR, metavar="DIR", help="a trained model; default: %(default)s"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write to; default: WORKDIR/predictions"
    )


def run(options: argparse.Namespace) -> None:
    """Segments the image, writes two files, and prints the classes found."""
    from zegformer_jax.segmenter import load, read_image

    classes = read_classes(options)
    segmenter = load(options.workdir)
    result = segmenter(read_image(options.image), classes)
    folder = Path(options.output or Path(options.workdir) / "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(options.image).stem
    result.overlay().save(folder / f"{stem}_overlay.png")
    result.label_image().save(folder / f"{stem}_labels.png")
    for name, share in result.areas().items():
        index = result.vocabulary.names.index(name)
        kind = "seen" if result.vocabulary.seen[index] else "unseen"
        print(f"{100 * share:5.1f} %  {name} ({kind}, label {index})")
    print(f"written: {folder}/{stem}_overlay.png, {stem}_labels.png")


def read_classes(options: argparse.Namespace) -> list[str]:
    """Returns the class names of `--classes` or `--classes-file`.

    Args:
        options: The parsed flags; one of the two is None.

    Raises:
        MissingFile: There is no such file.
        UserError: The file is not text in UTF-8.
    """
    if options.classes is not None:
        return parse_classes(options.classes)
    path = Path(options.classes_file)
    if path.suffix == ".json":
        from zegformer_jax.text.vocabulary import Vocabulary

        return list(Vocabulary.load(path).names)
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file of classes") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def parse_classes(text: str) -> list[str]:
    """Splits class names at commas; double quotes hold synonyms together, as in CSV.

    `sheep, "sofa, couch", cat` are three classes, the second with two synonyms.
    """
    rows = list(csv.reader([text], skipinitialspace=True))
    return [name.strip() for name in rows[0]] if rows else []
