"""Checkpoints of training states: written asynchronously, atomic; the last few and the best stay.

Each has the sums of its arrays' bits beside it, so that a damaged one is known, not trained on.
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

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.processes import is_first, wait_for_all

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"
SCORE = "harmonic"  # of the validation; the largest is the best
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # unsigned types by bytes


class Damaged(UserError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The checkpoints of one workdir; close it before the program ends."""

    def __init__(self, workdir: epath.PathLike, keep: int | None = None):
        """Opens `workdir`/checkpoints; `keep` is how many stay besides the best (None: all)."""
        self._workdir = epath.Path(workdir)
        best = managers.BestN(
            get_metric_fn=_score, n=1 if keep else None, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        """Gives itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def _folder(self) -> epath.Path:
        folder = self._workdir / FOLDER
        return folder if "://" in str(folder) else folder.absolute()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint that was validated, or None."""
        validated = [s for s in self._manager.all_steps() if self._manager.metrics(s)]
        return max(validated, key=lambda s: _score(self._manager.metrics(s)), default=None)

    def save(
        self,
        step: int,
        state: Any,
        notes: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Begins to write a state; it may be donated or changed at once.

        Args:
            step: its number.
            state: a tree of arrays.
            notes: JSON that is kept beside it.
            score: of its validation.
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
        """Waits until what was saved is written."""
        self._manager.wait_until_finished()

    def restore(self, like: Any, say: Callable[[str], None] = print) -> Any:
        """Reads the newest sound checkpoint into the shapes and shardings of `like`.

        Damaged ones are reported, and moved aside where an older one is sound.

        Raises:
            Damaged: none is sound.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._restore(step, abstract)
            except Exception as error:  # whatever Orbax and TensorStore meet in damaged files
                damaged[step] = error
                continue
            for number, error in damaged.items():
                say(f"checkpoint {number} is damaged ({_reason(error)}): going on from {step}")
            if damaged:
                self._move_aside(list(damaged))
            return state
        step, error = next(iter(damaged.items()))
        place = self._folder / str(step)
        raise Damaged(f"{place}: cannot be restored: {_reason(error)}") from error

    def read(self, parts: Sequence[str], step: int | None = None) -> dict[str, Any]:
        """Reads parts of the newest checkpoint, or of another, as NumPy trees; {} for missing ones.

        Whatever devices it was saved on.

        Raises:
            Damaged: it is not what was saved.
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
            raise Damaged("its arrays are not what was saved")
        return restored["state"]

    def _move_aside(self, steps: Sequence[int]) -> None:
        """Takes damaged checkpoints out of the way of those that will be saved."""
        if is_first():
            aside = self._workdir / DAMAGED_FOLDER
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                place = aside / f"{step}_{time.time():.0f}"
                (self._folder / str(step)).rename(place)
        wait_for_all("damaged checkpoints are moved")
        self._manager.reload()


def sum_bits(tree: Any) -> list[int]:
    """Sums the bits of each array as whole numbers, modulo 2^32, wherever its parts lie."""
    return np.asarray(_sum_bits(jax.tree.leaves(tree))).tolist()


@jax.jit
def _sum_bits(arrays: Sequence[jax.Array]) -> jax.Array:
    bits = [jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize]) for x in arrays]
    return jnp.stack([x.astype(jnp.uint32).sum(dtype=jnp.uint32) for x in bits])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[SCORE]
