"""Whole files on a local disk or in a bucket, through TensorFlow's file systems."""

import json
import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from zegformer_jax.runtime.errors import MissingFile, reading

AGAIN = "remove the directory and prepare the data set again"


def join(directory: str | Path, name: str) -> str:
    """Returns the path of a file in a local or remote directory."""
    return os.path.join(str(directory), name)


def is_remote(directory: str | Path) -> bool:
    """Returns whether a directory is in a bucket (gs://...)."""
    return "://" in str(directory)


def read_bytes(path: str) -> bytes:
    """Reads a file.

    Raises:
        MissingFile: The file is missing.
        OSError: The file cannot be read.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except tf.errors.NotFoundError:
        raise MissingFile(f"{path}: no such file: {AGAIN}") from None
    except tf.errors.OpError as error:
        raise OSError(f"{path}: cannot be read: {error.message}") from error


def read_json(path: str) -> Any:
    """Reads a JSON file.

    Raises:
        MissingFile: The file is missing.
        OSError: The file cannot be read.
        UserError: The file is damaged.
    """
    data = read_bytes(path)
    with reading(path, AGAIN):
        return json.loads(data)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file completely, or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    partial = f"{path}.partial"
    try:
        with tf.io.gfile.GFile(partial, "wb") as file:
            file.write(data)
        tf.io.gfile.rename(partial, path, overwrite=True)
    except tf.errors.OpError as error:
        raise OSError(f"{path}: cannot be written: {error.message}") from error
