"""Checkpoints of training states, written asynchronously and atomically.

The newest few and the best are kept. Each stores sums of its arrays' bits, so that damage is
detected when it is read.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from zegformer_jax.runtime.errors import UserError, one_line, reading
from zegformer_jax.runtime.processes import is_first, wait_for_all

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"
SCORE = "harmonic"  # name of the validation score; the best checkpoint has the largest
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # unsigned types by their size in bytes


class Damaged(UserError):
    """Raised for a checkpoint that differs from what was saved."""


class Checkpoints:
    """The checkpoints of one workdir; close it before the program ends."""

    def __init__(self, workdir: epath.PathLike, keep: int | None = None):
        """Opens the checkpoints of a workdir.

        Args:
            workdir: Folder of the run, local or remote.
            keep: Number of newest checkpoints to keep, in addition to the best; None keeps all.
        """
        self._workdir = epath.Path(workdir)
        best = managers.BestN(
            get_metric_fn=_score, n=1 if keep else None, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
        with reading(self._folder, "remove the folder 'metrics' of the step in which it is"):
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, item_handlers=handlers
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all checkpoints are written, and closes the manager."""
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def _folder(self) -> epath.Path:
        folder = self._workdir / FOLDER
        return folder if "://" in str(folder) else folder.absolute()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best validation score, or None."""
        with reading(self._folder, "remove the folder 'metrics' of the step in which it is"):
            validated = [s for s in self._manager.all_steps() if self._manager.metrics(s)]
            return max(validated, key=lambda s: _score(self._manager.metrics(s)), default=None)

    def save(
        self,
        step: int,
        state: Any,
        notes: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Starts to write a state, whose arrays may be donated or changed immediately.

        Args:
            step: Number of the training step.
            state: Tree of arrays.
            notes: JSON values to store with the state.
            score: Validation score; None if the state was not validated.
        """
        notes = {**(notes or {}), "bit_sums": sum_bits(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), notes=ocp.args.JsonSave(notes)
            ),
            metrics=None if score is None else {SCORE: score},
        )

    def wait(self) -> None:
        """Waits until all saved states are written."""
        self._manager.wait_until_finished()

    def restore(self, like: Any, say: Callable[[str], None] = print) -> Any:
        """Reads the newest intact checkpoint into the shapes and shardings of `like`.

        Damaged checkpoints are reported. If an older one is intact, they are moved to another
        folder.

        Args:
            like: State of the wanted structure, shapes and shardings.
            say: Takes one line of text for each damaged checkpoint.

        Returns:
            The state.

        Raises:
            Damaged: No checkpoint is intact.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(step, abstract)
            except Exception as error:  # Orbax's and TensorStore's errors have many types
                damaged[step] = error
                continue
            for number, error in damaged.items():
                say(f"checkpoint {number} is damaged ({_reason(error)}): resuming from {step}")
            if damaged:
                self._move_aside(list(damaged))
            return state
        step, error = next(iter(damaged.items()))
        place = self._folder / str(step)
        raise Damaged(f"{place}: cannot be restored: {_reason(error)}") from error

    def read(self, parts: Sequence[str], step: int | None = None) -> dict[str, Any]:
        """Reads parts of a checkpoint as trees of NumPy arrays, independent of any devices.

        Args:
            parts: Names of the parts, such as `params`.
            step: Step of the checkpoint; None reads the newest.

        Returns:
            The parts by name; {} for a part that the checkpoint lacks.

        Raises:
            Damaged: The checkpoint differs from what was saved.
        """
        step = self.latest_step if step is None else step
        try:
            return self._read(parts, step)
        except Exception as error:  # whatever Orbax and TensorStore meet in damaged files
            place = self._folder / str(step)
            raise Damaged(f"{place}: cannot be read: {_reason(error)}") from error

    def _read(self, parts: Sequence[str], step: int) -> dict[str, Any]:
        shapes = self._manager.item_metadata(step)["state"].tree
        wanted = {part: shapes[part] for part in parts if shapes.get(part)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
            ),
        )["state"]
        return {part: state.get(part) or {} for part in parts}

    def _restore(self, step: int, abstract: Any) -> Any:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                ),
                notes=ocp.args.JsonRestore(),
            ),
        )
        if restored["notes"]["bit_sums"] != sum_bits(restored["state"]):
            raise Damaged("its arrays differ from what was saved")
        return restored["state"]

    def _move_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints away, as the resumed run saves the same steps again."""
        if is_first():
            aside = self._workdir / DAMAGED_FOLDER
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                place = aside / f"{step}_{time.time():.0f}"
                (self._folder / str(step)).rename(place)
        wait_for_all("damaged checkpoints are moved")
        self._manager.reload()


def sum_bits(tree: Any) -> list[int]:
    """Returns the sum of each array's bits as unsigned integers modulo 2^32.

    The sum is exact and independent of the order of its terms, hence of the array's sharding.
    """
    return np.asarray(_sum_bits(jax.tree.leaves(tree))).tolist()


@jax.jit
def _sum_bits(arrays: Sequence[jax.Array]) -> jax.Array:
    bits = [jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize]) for x in arrays]
    return jnp.stack([x.astype(jnp.uint32).sum(dtype=jnp.uint32) for x in bits])


def _reason(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[SCORE]
