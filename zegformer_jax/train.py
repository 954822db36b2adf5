"""Training: the state, the jitted step and the loop, the same for every task."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from zegformer_jax import experiment, sharding
from zegformer_jax.checkpoints import Checkpoints
from zegformer_jax.optim import make_optimiser
from zegformer_jax.tasks import Batch, Metrics, Task, make_task

METRICS_FILE = "metrics.jsonl"

Step = Callable[[Any, Any, Batch, jax.Array], tuple[Any, Metrics]]


@flax.struct.dataclass
class TrainState:
    """All that training changes, and the constants beside it.

    Attributes:
        step: int32 scalar, steps done.
        params: what the optimiser changes.
        constants: frozen norms.
        opt_state: of the optimiser.
    """

    step: jax.Array
    params: Any
    constants: Any
    opt_state: Any


def make_train_step(
    task: Task, optimiser: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """Makes the pure function (state, context, batch, key) -> (state, metrics).

    A step whose loss or gradient is not finite changes no parameter; its metric `not_finite` is 1.
    """

    def train_step(state: TrainState, context: Any, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), gradients = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, state.constants, context, batch, key
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
            "not_finite": 1 - finite.astype(jnp.int32),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return train_step


def train(config: ConfigDict, workdir: str | Path, progress: bool = True) -> list[dict[str, float]]:
    """Trains what the config says, from the newest checkpoint in the workdir if there is one.

    Args:
        config: the experiment.
        workdir: where config, checkpoints and metrics go.
        progress: whether to show a progress bar.

    Returns:
        The history: means over `train.log_every` steps, with the `step` they end at.

    Raises:
        ValueError: the workdir holds another config's run.
        FloatingPointError: a loss or gradient was not finite.
    """
    workdir = Path(workdir)
    experiment.check_config(config, workdir)
    mesh = sharding.make_mesh()
    task = make_task(config, workdir)
    experiment.save_config(config, workdir)
    optimiser, schedule = make_optimiser(
        steps=config.train.steps,
        learning_rate=config.optimiser.learning_rate,
        power=config.optimiser.power,
        weight_decay=config.optimiser.weight_decay,
        clip_norm=config.optimiser.clip_norm,
        groups=config.optimiser.groups,
        warmup_steps=config.optimiser.warmup_steps,
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = sharding.replicate(make_state(task, optimiser, init_key), mesh)
    train_step = jax.jit(make_train_step(task, optimiser, schedule), donate_argnums=0)
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
        log = MetricsLog(workdir, int(state.step))
        state = loop(config, task, state, train_step, step_key, checkpoints, log, mesh, progress)
    task.finish(state.params)
    return log.history


def make_state(task: Task, optimiser: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Makes the state before the first step."""
    variables = task.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        constants=variables.get("constants", {}),
        opt_state=optimiser.init(variables["params"]),
    )


def loop(
    config: ConfigDict,
    task: Task,
    state: TrainState,
    train_step: Step,
    key: jax.Array,
    checkpoints: Checkpoints,
    log: "MetricsLog",
    mesh: Mesh,
    progress: bool,
) -> TrainState:
    """Runs the steps that are left; returns the last state, which is also saved."""
    start, steps = int(state.step), config.train.steps
    if start >= steps:
        return state
    context = sharding.replicate(task.context, mesh)
    key = sharding.replicate(key, mesh)
    bar = tqdm(
        total=steps, initial=start, desc=f"train {config.model.kind}", disable=not progress,
        unit="step", mininterval=1.0,
    )  # fmt: skip
    pending: list[Metrics] = []
    with bar:
        for step, batch in enumerate(prefetch(task.batches(start), mesh), start + 1):
            state, metrics = train_step(state, context, batch, key)
            pending.append(metrics)
            bar.update()
            if step % config.train.log_every == 0 or step == steps:
                line = log.write(step, jax.device_get(pending))
                pending.clear()
                bar.set_postfix(loss=f"{line['loss']:.3f}")
            if step % config.train.checkpoint_every == 0 or step == steps:
                checkpoints.save(step, state)
    return state


def prefetch(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[Batch]:
    """Makes each batch and sends it to the devices while the step before still computes."""

    def read() -> Batch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        return sharding.to_devices({k: v for k, v in batch.items() if k != "index"}, mesh)

    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(read)
        while (batch := following.result()) is not None:
            following = thread.submit(read)
            yield batch


class MetricsLog:
    """Means of the metrics over some steps, one JSON line each, in `workdir`/metrics.jsonl."""

    def __init__(self, workdir: Path, step: int):
        """Opens the log and drops the lines after `step`, from which training goes on."""
        self._path = workdir / METRICS_FILE
        self.history = [line for line in read_metrics(workdir) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._time = time.perf_counter()

    def write(self, step: int, metrics: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Writes the means of some steps' metrics, and the seconds that a step took.

        Raises:
            FloatingPointError: a step was not finite.
        """
        now = time.perf_counter()
        line = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        line |= {"step": step, "seconds_per_step": (now - self._time) / len(metrics)}
        self._time = now
        if line["not_finite"]:
            raise FloatingPointError(
                f"step {step - len(metrics) + 1} to {step}: the loss or its gradient was not "
                "finite; the parameters before that are in the newest checkpoint: lower "
                "optimiser.learning_rate or look at the data"
            )
        self.history.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """Reads the lines of a workdir's metrics, none if it has not been trained."""
    path = Path(workdir) / METRICS_FILE
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
