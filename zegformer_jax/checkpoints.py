"""Checkpoints of training states: written asynchronously, atomic, the last few kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir; close it before the program ends."""

    def __init__(self, workdir: str | Path, keep: int | None = None):
        """Opens `workdir`/checkpoints; `keep` is how many stay (None: all)."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(Path(workdir).absolute() / FOLDER, options=options)

    def __enter__(self) -> "Checkpoints":
        """Gives itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to write a state; it may be donated or changed at once."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """Reads the newest checkpoint into the shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(self.latest_step, args=ocp.args.StandardRestore(abstract))

    def restore_raw(self) -> Any:
        """Reads the newest checkpoint as plain NumPy trees, whatever its shapes are."""
        return self._manager.restore(self.latest_step, args=ocp.args.StandardRestore())
