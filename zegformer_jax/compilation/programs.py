"""The programs of a training and an evaluation, lowered from shapes alone."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from zegformer_jax.compilation.sizes import without_weights
from zegformer_jax.evaluation.evaluator import jit_step as jit_evaluation
from zegformer_jax.evaluation.step import EvaluationStep
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import transforms
from zegformer_jax.runtime.cloud_tpu import Topology
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.mesh import make_mesh, replicated, shard_arrays, split_batch
from zegformer_jax.runtime.target import compiling_for
from zegformer_jax.segmentation.zegformer import Weights
from zegformer_jax.training.loop import jit_step, step_of
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.objectives.per_pixel import PerPixelObjective
from zegformer_jax.training.step import make_state

OBJECTIVES = {"zegformer": GrouperObjective, "per_pixel": PerPixelObjective}
IMAGE_SIZE = (480, 640)  # rows and columns of the evaluated image: COCO's commonest


def lower_training(experiment: Experiment, topology: Topology) -> jax.stages.Lowered:
    """Lowers the step that `train` runs, for all devices of a slice.

    Args:
        experiment: The experiment; neither its data nor any weights are read.
        topology: The devices.

    Raises:
        UserError: The batch does not divide by the devices, or the model is of another kind.
    """
    mesh = make_mesh(topology.devices, experiment.sharding.model)
    objective = objective_of(without_weights(experiment))
    optimiser, step = step_of(experiment, objective, mesh)

    def start(key: jax.Array) -> Any:
        variables = objective.init(key)
        return make_state(variables, objective.metrics, optimiser, experiment.train.ema > 0)

    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(start, key)
    shardings = shard_arrays(state, mesh, experiment.sharding.params)
    arguments = (
        jax.tree.map(_with_sharding, state, shardings),
        _on_every_device(dict(objective.constants), mesh),
        _split(objective.batch_shapes(), mesh, "input.batch_size"),
        _on_every_device(key, mesh),
    )
    with compiling_for(topology.devices[0]):
        return jit_step(step, shardings, mesh).lower(*arguments)


def lower_evaluation(experiment: Experiment, topology: Topology) -> jax.stages.Lowered:
    """Lowers the step that `evaluate` runs, for the devices of one host of a slice.

    Args:
        experiment: The experiment; neither its data nor any weights are read.
        topology: The devices.

    Raises:
        UserError: The batch does not divide by the devices, or the model is of another kind.
    """
    experiment = without_weights(experiment)
    mesh = make_mesh(topology.host_devices)
    step = EvaluationStep(experiment)
    text = experiment.text_embeddings(step.plan.vocabulary.names)
    variables = jax.eval_shape(objective_of(experiment).init, jax.eval_shape(jax.random.key, 0))
    weights = Weights(variables, experiment.clip and experiment.clip.params)
    arguments = (
        _on_every_device(weights, mesh),
        _on_every_device(text, mesh),
        _split(evaluation_batch(experiment), mesh, "eval.batch_size"),
    )
    with compiling_for(topology.devices[0]):
        return jit_evaluation(step, mesh).lower(*arguments)


def evaluation_batch(experiment: Experiment) -> dict[str, Any]:
    """Returns the shapes of a batch of images of `IMAGE_SIZE`, as `eval_batches` yields them."""
    settings, vocabulary = experiment.eval, experiment.vocabulary
    rows = settings.batch_size

    def view(short_side: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        size = transforms.resized_sides(*IMAGE_SIZE, short_side, settings.max_long_side)
        padded = transforms.padded_sides(*size)
        return shape((*padded, 3), np.uint8), shape((2,), np.int32)

    def shape(of_row: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *of_row), dtype)

    return {
        "views": tuple(view(x) for x in (settings.short_side, *settings.more_short_sides)),
        "label": shape(transforms.label_sides(*IMAGE_SIZE), vocabulary.label_dtype),
        "original_size": shape((2,), np.int32),
        "valid": shape((), bool),
    }


def objective_of(experiment: Experiment) -> GrouperObjective | PerPixelObjective:
    """Returns the experiment's objective, without its data.

    Raises:
        UserError: The experiment's model is of another kind.
    """
    if experiment.kind not in OBJECTIVES:
        kinds = " or ".join(OBJECTIVES)
        raise UserError(f"model.kind '{experiment.kind}': only {kinds} can be compiled")
    vocabulary = experiment.vocabulary
    seen = vocabulary.seen_part()
    return OBJECTIVES[experiment.kind](experiment, experiment.embed_classes(seen.names))


def _with_sharding(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _on_every_device(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: _with_sharding(x, replicated(mesh)), tree)


def _split(batch: Any, mesh: Mesh, field: str) -> Any:
    devices = mesh.shape["data"]
    for array in jax.tree.leaves(batch):
        if array.shape[0] % devices:
            raise UserError(
                f"{field}: a batch of {array.shape[0]} does not divide by {devices} devices"
            )
    return jax.tree.map(lambda x: _with_sharding(x, split_batch(mesh)), batch)
