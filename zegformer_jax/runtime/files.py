"""Atomic writes of local and remote files."""

import os

from etils import epath


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file, whole or not at all; makes its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write it, too
    partial.write_bytes(data)
    partial.replace(path)
