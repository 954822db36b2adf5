"""One training step, compiled whole: gradients, optimiser, parameter averages, running metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.mesh import split_parts
from zegformer_jax.training.objective import Batch, Metrics, Objective, Variables

Step = Callable[[Any, Any, Batch, jax.Array], tuple[Any, Metrics]]
STEP_METRICS = ("gradient_norm",)  # metrics of the step itself, for every objective


@flax.struct.dataclass
class TrainState:
    """State that a step changes, and the model's constants; a checkpoint holds all of it.

    Attributes:
        step: Steps that are done, int32 scalar.
        params: Trained parameters.
        constants: The model's constants, such as frozen norms.
        opt_state: State of the optimiser.
        ema: Exponential moving averages of the parameters; {} if none are kept.
        sums: Sum of each metric over the finite steps since the last line of the log.
        skipped: Steps that were not finite, int32 scalar.
        skipped_in_line: Such steps since the last line of the log.
        skipped_in_a_row: Such steps up to this one without a finite one between.
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
    variables: Variables,
    metrics: tuple[str, ...],
    optimiser: optax.GradientTransformation,
    ema: bool = False,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        variables: Variables of the model, `params` and perhaps `constants`.
        metrics: Names of the objective's metrics.
        optimiser: The optimiser.
        ema: Keeps averages of the parameters.
    """
    params = variables["params"]

    def zero() -> jax.Array:  # each a buffer of its own, since the step overwrites them all
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        constants=variables.get("constants", {}),
        opt_state=optimiser.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        sums={name: jnp.zeros(()) for name in (*metrics, *STEP_METRICS)},
        skipped=zero(),
        skipped_in_line=zero(),
        skipped_in_a_row=zero(),
    )


def make_train_step(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    log_every: int = 1,
    most_skipped: int = 1,
) -> Step:
    """Makes the pure function (state, the objective's constants, batch, key) -> (state, metrics).

    A step whose loss or gradient is not finite changes no parameter and is counted. After
    `most_skipped` of them in a row no further step changes anything, so that the caller, who
    reads the metrics now and then, finds the last sound state.

    Args:
        objective: Defines the loss.
        optimiser: The optimiser, from `optim.make_optimiser`.
        schedule: Its learning rate, for the metrics.
        mesh: Mesh that the batch is split on.
        accumulate: Parts that a batch is split into; they are computed one after the other.
        ema: Share of the old average in the new one; 0 keeps no averages.
        log_every: Steps between lines of the log; metrics are means since the last line.
        most_skipped: Steps in a row that may be not finite.

    Raises:
        UserError: The objective's loss does not add up over parts of a batch.
    """
    gradients_of = _accumulated(objective, mesh, accumulate)

    def train_step(state: TrainState, constants: Mapping, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), gradients = gradients_of(
            state.params, {**state.constants, **constants}, batch, key
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


def _accumulated(objective: Objective, mesh: Mesh, accumulate: int) -> Callable:
    """Returns a function to ((loss, metrics), gradients) of a batch, computed in parts."""
    gradients_of = jax.value_and_grad(objective.loss, has_aux=True)
    if accumulate == 1:
        return lambda params, constants, batch, key: gradients_of(
            params, constants, batch, objective.totals(batch), key
        )
    if not objective.adds_up:
        raise UserError("train.accumulate: this model's loss compares all of a batch; take 1")

    def accumulated(params: Any, constants: Any, batch: Batch, key: jax.Array):
        totals = objective.totals(batch)
        # Part i has the rows i, i + accumulate, ..., so that each device keeps its rows.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        parts = jax.lax.with_sharding_constraint(parts, split_parts(mesh))

        def of_part(part: Batch, index: jax.Array):
            part_key = jax.random.fold_in(key, index)
            return gradients_of(params, constants, part, totals, part_key)

        def add(sums: Any, part_and_index: tuple[Batch, jax.Array]):
            return jax.tree.map(jnp.add, sums, of_part(*part_and_index)), None

        indices = jnp.arange(accumulate)
        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), indices[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (parts, indices))[0]

    return accumulated


def _count(state: TrainState, metrics: Metrics, finite: jax.Array, log_every: int) -> TrainState:
    """Counts the step and adds its metrics to the sums since the last line of the log."""
    same_line = state.step % log_every != 0
    skipped = 1 - finite.astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        sums={
            name: jnp.where(same_line, before, 0.0) + jnp.where(finite, metrics[name], 0.0)
            for name, before in state.sums.items()
        },
        skipped=state.skipped + skipped,
        skipped_in_line=jnp.where(same_line, state.skipped_in_line, 0) + skipped,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )


def _line(state: TrainState, schedule: optax.Schedule, log_every: int) -> Metrics:
    """Returns the means since the last line of the log, the learning rate and skipped steps."""
    steps = (state.step - 1) % log_every + 1 - state.skipped_in_line
    means = {name: total / jnp.maximum(steps, 1) for name, total in state.sums.items()}
    return means | {
        "learning_rate": schedule(state.step - 1 - state.skipped),
        "skipped": state.skipped_in_line,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
