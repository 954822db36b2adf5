"""Training: the loop, the same for every task, and what surrounds it."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from zegformer_jax import __version__
from zegformer_jax.experiment.workdir import check_config, save_config
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.mesh import (
    make_mesh,
    place,
    replicate,
    replicated,
    shard_arrays,
    to_devices,
    to_host,
)
from zegformer_jax.runtime.processes import StopRequest, is_first, wait_for_all
from zegformer_jax.training.log import TrainingLog
from zegformer_jax.training.objective import Batch, Metrics, Task
from zegformer_jax.training.objectives.build import make_task
from zegformer_jax.training.optim import make_optimiser
from zegformer_jax.training.step import TrainState, make_state, make_train_step

IN_FLIGHT = 2  # steps that the devices are given before the host waits for the first
EXAMPLES_NAMED = 8  # of a batch, in a message
Say = Callable[[str], None]


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and can go on from there."""


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    progress: bool = True,
    change_config: bool = False,
) -> list[dict[str, float]]:
    """Trains what the config says, from the newest checkpoint in the workdir if there is one.

    Args:
        config: the experiment.
        workdir: where config, checkpoints and metrics go; local, or gs://...
        progress: whether to show a progress bar and what a step costs.
        change_config: whether a run may go on with another config than it began with.

    Returns:
        The history: means over `train.log_every` steps, with the `step` they end at.

    Raises:
        ValueError: the workdir holds another config's run.
        FloatingPointError: losses or gradients were not finite, too often in a row.
        Preempted: SIGTERM came.
    """
    workdir = epath.Path(workdir)
    check_config(config, workdir, change_config)
    mesh = make_mesh(model=config.sharding.model)
    if is_first():  # which may generate the data set
        task = make_task(config, workdir)
        save_config(config, workdir)
    wait_for_all("the config is written")
    if not is_first():
        task = make_task(config, workdir)
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        loop = Loop(config, task, workdir, checkpoints, mesh, progress)
        history = loop.run()
    params = to_host(loop.state.ema or loop.state.params, mesh)
    if is_first():
        task.finish(params)
    return history


class Loop:
    """The steps of one run, from where it stands to the end."""

    def __init__(
        self,
        config: ConfigDict,
        task: Task,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ):
        """Makes the state, or takes up the newest checkpoint's."""
        self._config, self._task, self._workdir = config, task, workdir
        self._checkpoints, self._mesh, self._progress = checkpoints, mesh, progress
        self._optimiser, schedule = make_optimiser(
            steps=config.train.steps,
            learning_rate=config.optimiser.learning_rate,
            power=config.optimiser.power,
            weight_decay=config.optimiser.weight_decay,
            clip_norm=config.optimiser.clip_norm,
            groups=config.optimiser.groups,
            warmup_steps=config.optimiser.warmup_steps,
        )
        step = make_train_step(
            task, self._optimiser, schedule, mesh,
            accumulate=config.train.accumulate, ema=config.train.ema,
            log_every=config.train.log_every, most_skipped=config.train.most_skipped,
        )  # fmt: skip
        self._key, init_key = self._keys()
        self.state = self._start(init_key)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        whole = replicated(mesh)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        self._first = int(self.state.step)
        self._log = TrainingLog(workdir, self._first, config.train.tensorboard)
        self._unwritten: collections.deque[tuple[int, Metrics, dict]] = collections.deque()
        memory = 2 * config.train.log_every + config.train.most_skipped + IN_FLIGHT
        self._examples: collections.deque[tuple[int, Any]] = collections.deque(maxlen=memory)
        self._evaluator: Any = None

    def _keys(self) -> tuple[jax.Array, jax.Array]:
        init_key, step_key = jax.random.split(jax.random.key(self._config.seed))
        return replicate(step_key, self._mesh), init_key

    def _start(self, key: jax.Array) -> TrainState:
        config = self._config
        state = make_state(self._task, self._optimiser, key, ema=config.train.ema > 0)
        shardings = shard_arrays(state, self._mesh, config.sharding.params)
        state = place(state, shardings)
        if self._checkpoints.latest_step is None:
            return state
        return self._checkpoints.restore(state, self._say)

    def _say(self, line: str) -> None:
        if is_first():
            tqdm.write(line)

    def run(self) -> list[dict[str, float]]:
        """Runs the steps that are left; the last state is saved."""
        steps, start = self._config.train.steps, self._first
        if start < steps:
            bar = tqdm(
                total=steps, initial=start, desc=f"train {self._config.model.kind}", unit="step",
                disable=not self._progress or not is_first(), mininterval=1.0,
            )  # fmt: skip
            with bar, StopRequest() as stop:
                self._run(bar, stop)
        self._log.close()
        return self._log.metrics.history

    def _run(self, bar: tqdm, stop: StopRequest) -> None:
        config, last = self._config, self._config.train.steps
        context = replicate(self._task.context, self._mesh)
        in_flight: collections.deque[Metrics] = collections.deque()
        take_step = None
        for step, (batch, index) in enumerate(
            prefetch(self._task.batches(self._first), self._mesh), self._first + 1
        ):
            if take_step is None:
                take_step = self._compile(context, batch)
            self._examples.append((step, index))
            with jax.transfer_guard("disallow"):
                self.state, metrics = take_step(self.state, context, batch, self._key)
            in_flight.append(metrics)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            bar.update()
            if step % config.train.log_every == 0 or step == last:
                self._note(step, metrics, bar)
            validates = config.train.validate_every and (
                step % config.train.validate_every == 0 or step == last
            )
            stops = stop.came(step) and step < last
            if validates or stops or step % config.train.checkpoint_every == 0 or step == last:
                self._save(step, metrics, bar, validates)
            if stops:
                self._checkpoints.wait()
                self._log.close()
                raise Preempted(f"stopped as asked, saved at step {step} of {last}")

    def _compile(self, context: Any, batch: Batch) -> Callable:
        """Compiles the step, and says what it costs."""
        compiled = self._step.lower(self.state, context, batch, self._key).compile()
        self._log.start_clock()
        if self._progress:
            self._say(f"a step: {cost_of(compiled)}")
        return compiled

    def _note(self, step: int, metrics: Metrics, bar: tqdm) -> None:
        """Lets the metrics come from the devices, and writes down those that came before."""
        for array in metrics.values():
            array.copy_to_host_async()
        timings = self._log.timings(step, self._config.input.batch_size)
        self._unwritten.append((step, metrics, timings))
        while len(self._unwritten) > 1:
            self._write(bar)

    def _write(self, bar: tqdm) -> None:
        step, metrics, timings = self._unwritten.popleft()
        line = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, int(line["skipped_in_a_row"]))
        self._log.write_metrics(step, line | timings)
        rate = f"{timings['images_per_second']:.1f}"
        bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['learning_rate']:.1e}", images=rate)

    def _check(self, step: int, in_a_row: int) -> None:
        """Stops the run where too many steps in a row were not finite."""
        most = self._config.train.most_skipped
        if in_a_row < most:
            return
        first = step - in_a_row + 1
        places = dict(self._examples).get(first)
        names = [] if places is None else self._task.name(places[:EXAMPLES_NAMED])
        examples = f" (examples {', '.join(names)})" if names else ""
        raise FloatingPointError(
            f"the loss or its gradient was not finite in steps {first} to {first + most - 1}, "
            f"first on the batch of step {first}{examples}; no such step was applied and the "
            "newest checkpoint is sound: lower optimiser.learning_rate or look at the data"
        )

    def _save(self, step: int, metrics: Metrics, bar: tqdm, validates: bool) -> None:
        """Saves the state, after everything up to it was found finite and written down."""
        while self._unwritten:
            self._write(bar)
        self._check(step, int(jax.device_get(metrics["skipped_in_a_row"])))
        score = self._validate(step) if validates else None
        notes = {"version": __version__, "config": self._config.to_json_best_effort()}
        self._checkpoints.save(step, self.state, notes, score)

    def _validate(self, step: int) -> float:
        """Evaluates the state on the validation pictures; gives its rank."""
        from zegformer_jax.evaluation.evaluator import Evaluator
        from zegformer_jax.evaluation.loop import run

        state = self.state
        variables = {"params": state.ema or state.params, "constants": state.constants}
        variables = to_host(variables, self._mesh)
        if self._evaluator is None:
            self._evaluator = Evaluator(self._config, self._workdir, variables)
        self._evaluator.set_variables(variables)
        result = run(self._config, self._workdir, self._evaluator, progress=False)
        line = result.line()
        self._log.write_validation(step, line)
        self._log.start_clock()
        self._say(f"step {step}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in line.items()))
        return result.rank()


def cost_of(compiled: Any) -> str:
    """Says how much memory and work a compiled function takes on each device."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = "unknown memory"
    if memory is not None:
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak = arrays - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        text = f"{peak / 2**30:.2f} GiB at its peak"
    return f"{text}, {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP a device"


def prefetch(
    batches: Iterator[dict[str, np.ndarray]], mesh: jax.sharding.Mesh
) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Makes each batch and sends it to the devices while the step before still computes.

    Yields:
        A batch on the devices, and its `index` on the host where it has one.
    """

    def read() -> tuple[Batch, np.ndarray | None] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        arrays = {name: array for name, array in batch.items() if name != "index"}
        return to_devices(arrays, mesh), batch.get("index")

    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(read)
        while (batch := following.result()) is not None:
            following = thread.submit(read)
            yield batch
