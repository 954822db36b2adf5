"""One step of training, jitted whole: gradients, optimiser, averages and the running metrics."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from zegformer_jax.runtime.mesh import split_parts
from zegformer_jax.training.objective import Batch, Metrics, Task

Step = Callable[[Any, Any, Batch, jax.Array], tuple[Any, Metrics]]
STEP_METRICS = ("gradient_norm",)  # what a step measures besides its task's loss


@flax.struct.dataclass
class TrainState:
    """All that training changes, and the constants beside it.

    Attributes:
        step: int32 scalar, steps done.
        params: what the optimiser changes.
        constants: frozen norms.
        opt_state: of the optimiser.
        ema: exponential moving averages of the parameters; {} where there are none.
        sums: of each metric, over the finite steps since the last line of the log.
        skipped: int32 scalar, steps that were not finite, in all.
        skipped_in_line: since the last line of the log.
        skipped_in_a_row: up to this step.
    """

    step: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema: Any
    sums: Metrics
    skipped: jax.Array
    skipped_in_line: jax.Array
    skipped_in_a_row: jax.Array


def make_state(
    task: Task, optimiser: optax.GradientTransformation, key: jax.Array, ema: bool = False
) -> TrainState:
    """Makes the state before the first step."""
    variables = task.init(key)
    params = variables["params"]

    def zero() -> jax.Array:  # a buffer of its own each: the step is given them all to overwrite
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        constants=variables.get("constants", {}),
        opt_state=optimiser.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        sums={name: jnp.zeros(()) for name in (*task.metrics, *STEP_METRICS)},
        skipped=zero(),
        skipped_in_line=zero(),
        skipped_in_a_row=zero(),
    )


def make_train_step(
    task: Task,
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    log_every: int = 1,
    most_skipped: int = 1,
) -> Step:
    """Makes the pure function (state, context, batch, key) -> (state, metrics).

    A step whose loss or gradient is not finite changes no parameter and is counted. After
    `most_skipped` of them in a row no further step changes anything: the caller, who looks at the
    metrics now and then, finds the state as it was.

    Args:
        task: whose loss falls.
        optimiser: see `optim.make_optimiser`.
        schedule: its learning rate, for the metrics.
        mesh: on which the batch is split.
        accumulate: parts that a batch is worked through in, one after the other.
        ema: share of the old average in the new one; 0 keeps no averages.
        log_every: steps of a line of the log; its metrics are means since the line before.
        most_skipped: steps in a row that may be not finite.

    Raises:
        ValueError: the task's loss cannot be added up over parts of a batch.
    """
    gradients_of = _accumulated(task, mesh, accumulate)

    def train_step(state: TrainState, context: Any, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), gradients = gradients_of(
            state.params, state.constants, context, batch, key
        )
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        finite &= state.skipped_in_a_row < most_skipped
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = _average(state.ema, params, ema) if state.ema else {}
        params, opt_state, averages = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, averages),
            (state.params, state.opt_state, state.ema),
        )
        state = _count(state, metrics, finite, log_every)
        state = state.replace(params=params, opt_state=opt_state, ema=averages)
        return state, _line(state, schedule, log_every)

    return train_step


def _average(old: Any, new: Any, share: float) -> Any:
    return jax.tree.map(lambda x, y: share * x + (1 - share) * y, old, new)


def _accumulated(task: Task, mesh: Mesh, accumulate: int) -> Callable:
    """Gives ((loss, metrics), gradients) of a batch, worked through in parts."""
    gradients_of = jax.value_and_grad(task.loss, has_aux=True)
    if accumulate == 1:
        return lambda params, constants, context, batch, key: gradients_of(
            params, constants, context, batch, task.totals(context, batch), key
        )
    if not task.adds_up:
        raise ValueError("train.accumulate: this model's loss compares all of a batch; take 1")

    def accumulated(params: Any, constants: Any, context: Any, batch: Batch, key: jax.Array):
        totals = task.totals(context, batch)
        # Part i has the rows i, i + accumulate, ...: each device keeps its rows.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        parts = jax.lax.with_sharding_constraint(parts, split_parts(mesh))

        def of_part(part: Batch, index: jax.Array):
            part_key = jax.random.fold_in(key, index)
            return gradients_of(params, constants, context, part, totals, part_key)

        def add(sums: Any, part_and_index: tuple[Batch, jax.Array]):
            return jax.tree.map(jnp.add, sums, of_part(*part_and_index)), None

        indices = jnp.arange(accumulate)
        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), indices[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (parts, indices))[0]

    return accumulated


def _count(state: TrainState, metrics: Metrics, finite: jax.Array, log_every: int) -> TrainState:
    """Counts the step and adds its metrics to those since the last line of the log."""
    goes_on = state.step % log_every != 0
    skipped = 1 - finite.astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        sums={
            name: jnp.where(goes_on, before, 0.0) + jnp.where(finite, metrics[name], 0.0)
            for name, before in state.sums.items()
        },
        skipped=state.skipped + skipped,
        skipped_in_line=jnp.where(goes_on, state.skipped_in_line, 0) + skipped,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )


def _line(state: TrainState, schedule: optax.Schedule, log_every: int) -> Metrics:
    """Means since the last line of the log, and how things stand."""
    steps = (state.step - 1) % log_every + 1 - state.skipped_in_line
    means = {name: total / jnp.maximum(steps, 1) for name, total in state.sums.items()}
    return means | {
        "learning_rate": schedule(state.step - 1 - state.skipped),
        "skipped": state.skipped_in_line,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
