"""The training loop, the same for every objective, and what surrounds it."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from tqdm import tqdm

from zegformer_jax._version import __version__
from zegformer_jax.evaluation.loop import Validation
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.compiled import cost_of, keep_programs
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.mesh import (
    make_mesh,
    place,
    replicate,
    replicated,
    shard_arrays,
    to_host,
)
from zegformer_jax.runtime.processes import StopRequest, is_first, wait_for_all
from zegformer_jax.runtime.progress import Progress, announce
from zegformer_jax.training.facts import describe_start
from zegformer_jax.training.initialise import locate_start, start_from
from zegformer_jax.training.log import TrainingLog
from zegformer_jax.training.objective import Batch, Metrics, Objective, Variables
from zegformer_jax.training.objectives import open_objective
from zegformer_jax.training.optim import make_optimiser
from zegformer_jax.training.prefetch import prefetch
from zegformer_jax.training.step import Step, TrainState, make_state, make_train_step

IN_FLIGHT = 2  # steps that the devices have to do before the host waits for the first
EXAMPLES_NAMED = 8  # of a batch, in a message
Validate = Callable[[Variables], Any]  # from variables on the host to an `Evaluation`


class Diverged(UserError, FloatingPointError):
    """The loss or its gradient was not finite, too often in a row."""


class Preempted(Exception):
    """The run was asked to stop; its state is saved and it can resume."""


def train(
    experiment: Experiment,
    *,
    progress: bool = True,
    change_config: bool = False,
    validate: Validate | None = None,
) -> list[dict[str, float]]:
    """Trains an experiment, from the newest checkpoint in its workdir if there is one.

    Args:
        experiment: The experiment.
        progress: Shows a progress bar, and memory and FLOP of a step.
        change_config: Lets a run resume with another config than it began with.
        validate: Evaluates variables, every `train.validate_every` steps; None: on the
            experiment's validation split.

    Returns:
        The history: means over `train.log_every` steps, with the `step` they end at.

    Raises:
        UserError: The workdir holds a run with another config, there is no start for a new one, or
            the settings of its validation are wrong.
        Diverged: Losses or gradients were not finite, too often in a row.
        Preempted: SIGTERM came.
    """
    keep_programs()
    experiment.check(change_config)
    if not experiment.has_checkpoint:
        locate_start(experiment)  # now, as it may fail, and nothing is written yet
    if validate is None:
        validate = Validation(experiment)
        if experiment.train.validate_every:
            validate.check()  # now, and not at the first validation
    mesh = make_mesh(model=experiment.sharding.model)
    if is_first():  # alone, as it may generate the data set
        objective = open_objective(experiment)
    wait_for_all("the data set is there")
    if not is_first():
        objective = open_objective(experiment)
    with Checkpoints(experiment.workdir, experiment.train.keep_checkpoints) as checkpoints:
        loop = Loop(experiment, objective, checkpoints, mesh, validate, progress)
        if is_first():  # now that the start is known to succeed; it would block another one
            experiment.save()
        wait_for_all("the config is written")
        history = loop.run()
    params = to_host(loop.state.ema or loop.state.params, mesh)
    if is_first():
        objective.finish(params)
    return history


def step_of(
    experiment: Experiment, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[optax.GradientTransformation, Step]:
    """Makes an experiment's optimiser and its pure training step, see `step.make_train_step`."""
    settings = experiment.train
    optimiser, schedule = make_optimiser(
        steps=settings.steps, **dataclasses.asdict(experiment.optimiser)
    )
    step = make_train_step(
        objective, optimiser, schedule, mesh, accumulate=settings.accumulate, ema=settings.ema,
        log_every=settings.log_every, most_skipped=settings.most_skipped,
    )  # fmt: skip
    return optimiser, step


def jit_step(step: Step, shardings: Any, mesh: jax.sharding.Mesh) -> Callable:
    """Returns a step as one program, which overwrites the state.

    Args:
        step: The pure step.
        shardings: Shardings of the state's arrays.
        mesh: Mesh of the devices.
    """
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


class Loop:
    """The steps of one run, from its newest checkpoint to the end.

    Attributes:
        state: The state after the last step.
    """

    def __init__(
        self,
        experiment: Experiment,
        objective: Objective,
        checkpoints: Checkpoints,
        mesh: jax.sharding.Mesh,
        validate: Validate,
        progress: bool,
    ):
        """Makes the first state, or restores the newest checkpoint's."""
        self._experiment, self._objective, self._settings = experiment, objective, experiment.train
        self._checkpoints, self._mesh = checkpoints, mesh
        self._validate, self._progress = validate, progress
        self._optimiser, step = step_of(experiment, objective, mesh)
        init_key, step_key = jax.random.split(jax.random.key(experiment.seed))
        self._key = replicate(step_key, mesh)
        self.state = self._start(init_key)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._step = jit_step(step, shardings, mesh)
        self._first = int(self.state.step)
        self._log = TrainingLog(experiment.workdir, self._first, self._settings.tensorboard)
        self._unwritten: collections.deque[tuple[int, Metrics, dict]] = collections.deque()
        memory = 2 * self._settings.log_every + self._settings.most_skipped + IN_FLIGHT
        self._examples: collections.deque[tuple[int, Any]] = collections.deque(maxlen=memory)
        self._told_of_lost = False

    def _start(self, key: jax.Array) -> TrainState:
        variables = jax.jit(self._objective.init)(key)
        if is_new := self._checkpoints.latest_step is None:
            variables = start_from(self._experiment, variables)
        metrics, ema = self._objective.metrics, self._settings.ema > 0
        state = make_state(variables, metrics, self._optimiser, ema)
        state = place(state, shard_arrays(state, self._mesh, self._experiment.sharding.params))
        return state if is_new else self._checkpoints.restore(state, self._print)

    def _print(self, line: str) -> None:
        if is_first():
            tqdm.write(line)

    def run(self) -> list[dict[str, float]]:
        """Runs the steps that are left and saves the last state; returns the history."""
        steps, shown = self._settings.steps, self._progress and is_first()
        if shown:
            announce(describe_start(self._experiment, self._objective, self.state), sys.stdout)
        if self._first < steps:
            images = self._experiment.input.batch_size
            bar = Progress(f"train {self._experiment.kind}", steps, self._first, images, shown)
            with bar, StopRequest() as stop:
                self._run(bar, stop)
        self._log.close()
        return self._log.metrics.history

    def _run(self, bar: Progress, stop: StopRequest) -> None:
        settings, last = self._settings, self._settings.steps
        constants = replicate(dict(self._objective.constants), self._mesh)
        in_flight: collections.deque[Metrics] = collections.deque()
        take_step = None
        for step, (batch, index) in enumerate(
            prefetch(self._objective.batches(self._first), self._mesh), self._first + 1
        ):
            if take_step is None:
                take_step = self._compile(constants, batch)
                bar.start()
            self._examples.append((step, index))
            with jax.transfer_guard("disallow"):
                self.state, metrics = take_step(self.state, constants, batch, self._key)
            in_flight.append(metrics)
            wait_for(in_flight, IN_FLIGHT, bar)
            if step % settings.log_every == 0 or step == last:
                self._note(step, metrics, bar)
            validates = settings.validate_every and (
                step % settings.validate_every == 0 or step == last
            )
            stops = stop.came(step) and step < last
            if validates or stops or step % settings.checkpoint_every == 0 or step == last:
                wait_for(in_flight, 0, bar)
                self._save(step, metrics, bar, validates)
                bar.start()
            if stops:
                self._checkpoints.wait()
                self._log.close()
                raise Preempted(f"stopped as asked, saved at step {step} of {last}")

    def _compile(self, constants: Any, batch: Batch) -> Callable:
        """Compiles the step, and prints its cost."""
        if self._progress:
            self._print("compiling ...")
        start = time.perf_counter()
        compiled = self._step.lower(self.state, constants, batch, self._key).compile()
        self._log.start_clock()
        if self._progress:
            seconds = time.perf_counter() - start
            self._print(f"compiled in {seconds:.0f} s; a step: {cost_of(compiled)}")
        return compiled

    def _note(self, step: int, metrics: Metrics, bar: Progress) -> None:
        """Starts to copy the metrics from the devices, and writes those that are copied."""
        for array in metrics.values():
            array.copy_to_host_async()
        timings = self._log.timings(step, self._experiment.input.batch_size)
        self._unwritten.append((step, metrics, timings))
        while len(self._unwritten) > 1:
            self._write(bar)

    def _write(self, bar: Progress) -> None:
        step, metrics, timings = self._unwritten.popleft()
        line = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, int(line["skipped_in_a_row"]))
        self._log.write_metrics(step, line | timings)
        if line.get("targets_lost") and not self._told_of_lost:
            self._told_of_lost = True
            self._print(
                f"step {step}: loss.max_targets leaves out {line['targets_lost']:.1f} segments a "
                "step, drawn at random; 0 keeps as many as there are queries"
            )
        bar.note(f"loss {line['loss']:.3f}")

    def _check(self, step: int, in_a_row: int) -> None:
        """Stops the run if too many steps in a row were not finite."""
        most = self._settings.most_skipped
        if in_a_row < most:
            return
        first = step - in_a_row + 1
        index = dict(self._examples).get(first)
        names = [] if index is None else self._objective.name_examples(index[:EXAMPLES_NAMED])
        examples = f" (examples {', '.join(names)})" if names else ""
        raise Diverged(
            f"the loss or its gradient was not finite in steps {first} to {first + most - 1}, "
            f"first on the batch of step {first}{examples}; no such step was applied and the "
            "newest checkpoint is sound: lower optimiser.learning_rate or look at the data"
        )

    def _save(self, step: int, metrics: Metrics, bar: Progress, validates: bool) -> None:
        """Saves the state, once everything up to it is known to be finite and is written."""
        while self._unwritten:
            self._write(bar)
        self._check(step, int(jax.device_get(metrics["skipped_in_a_row"])))
        score = self._score(step) if validates else None
        notes = {"version": __version__, "config": self._experiment.config_json}
        self._checkpoints.save(step, self.state, notes, score)

    def _score(self, step: int) -> float:
        """Validates the state; returns the score that ranks checkpoints."""
        state = self.state
        variables = {"params": state.ema or state.params, "constants": state.constants}
        result = self._validate(to_host(variables, self._mesh))
        line = result.line()
        self._log.write_validation(step, line)
        self._log.start_clock()
        self._print(f"step {step}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in line.items()))
        return result.rank()


def wait_for(in_flight: collections.deque[Metrics], most: int, bar: Progress) -> None:
    """Waits for steps, the oldest first, until at most `most` are left; shows those done."""
    while len(in_flight) > most:
        jax.block_until_ready(in_flight.popleft())
        bar.update()
