"""Atomic writes of local and remote files."""

import os

from etils import epath


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file completely or not at all, and makes its folder if needed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may write the same file at the same time.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
