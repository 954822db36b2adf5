"""Makes the objective that a config names."""

from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.training.objective import Task
from zegformer_jax.training.objectives.grouper import segmentation_task


def make_task(config: ConfigDict, workdir: epath.PathLike) -> Task:
    """Makes the task that `config.model.kind` names.

    Raises:
        ValueError: the kind is not known.
    """
    from zegformer_jax.training.objectives.classifier import classifier_task
    from zegformer_jax.training.objectives.clip import clip_task

    if config.model.kind == "clip":
        return clip_task(config, workdir)
    if config.model.kind == "classifier":
        return classifier_task(config, workdir)
    return segmentation_task(config, workdir)
