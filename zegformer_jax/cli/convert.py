"""Converts published weights to ours, and trained models to the authors' layout.

The content of SOURCE decides what DESTINATION is:
  the authors' checkpoint (.pth)             a workdir, with CLIP if the checkpoint holds it
  CLIP: a directory, a name on the Hub, .pt  a directory
  a backbone: detectron2, torchvision, Swin  a file: .safetensors or .npz
  a workdir with a trained model             a checkpoint in the authors' layout: .safetensors,
                                             .npz, or .pth if PyTorch is installed

Examples:
  %(prog)s zegformer.pth runs/published --config=configs/coco_stuff.py:r101
  %(prog)s runs/published again.safetensors --with-clip
  %(prog)s openai/clip-vit-base-patch16 weights/clip
"""

import argparse

from zegformer_jax.cli import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="a file, a directory or a Hub name")
    parser.add_argument("destination", metavar="DESTINATION", help="a new file or directory")
    config.add_arguments(parser, default="configs/coco_stuff.py", sections=("clip", "eval"))
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads of a checkpoint; default: one in 32 channels",
    )
    parser.add_argument(
        "--with-clip", action="store_true", help="write CLIP into the checkpoint, too"
    )


def run(options: argparse.Namespace) -> None:
    """Converts, and prints what became of every tensor."""
    experiment = config.read(options)
    from zegformer_jax.experiment.conversion import convert

    text = convert(
        options.source,
        options.destination,
        experiment,
        heads=options.heads,
        with_clip=options.with_clip,
    )
    print(f"{text}\nwritten: {options.destination}")
