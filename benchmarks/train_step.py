"""Images per second of the training step: this project compared with PyTorch's parts.

    python benchmarks/train_step.py [--config=configs/pascal_voc.py:r50] [--batch 1 2]
        [--dtypes float32 bfloat16] [--rounds=3] [--seconds=20] [--peak=TFLOPS] [--compile]
        [--alone] [--profile=DIR]

This project's step is the one that `./run.sh train` compiles, on one device: targets from the label
map, grouper, matching and losses of all layers, optimiser, donated state. The other is that of
`torch_step.py`, if torch, transformers and scipy are installed. They take turns on the same
synthetic batch.

FLOP are those of our step's matrix products and convolutions, and are used for both. The peak is
--peak, else the speed of a large matmul of the dtype in this run. Memory is the compiled step's
peak, and PyTorch's allocation on a GPU. The matching's share is the time of matching all layers
alone over that of our whole step. On a machine with other work, PyTorch's threads wait for each
other and lose far more than XLA's: compare the fastest rounds there.
"""

import argparse
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, if not installed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for PyTorch

import jax
import jax.numpy as jnp
from flops import count_flops
from ml_collections import ConfigDict
from parameters import random_variables

from zegformer_jax.cli.config import load
from zegformer_jax.experiment import Experiment
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.runtime.compiled import peak_bytes  # noqa: E402
from zegformer_jax.runtime.mesh import make_mesh, replicate, replicated, to_devices
from zegformer_jax.text.vocabulary import load_vocabulary
from zegformer_jax.training import matching
from zegformer_jax.training.loop import step_of
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.step import make_state

OURS = "this project"
EMBED_DIM = 512  # of CLIP ViT-B/16's text embeddings
REGIONS = (2, 4)  # of a label map, rows and columns; each has another class
WARM_UP, PROFILED, MATMULS = 2, 3, 10
MATMUL_SIDE = {"cpu": 2048}  # of the matmul that measures the peak
LARGE_MATMUL_SIDE = 8192  # on accelerators
NEEDED = ("torch", "transformers", "scipy")
DTYPES = ("float32", "bfloat16")


def read_config(argument: str) -> Any:
    """Reads a config from the argument `FILE[:VARIANT]`.

    Raises:
        ValueError: There is no such file or variant, or the model is no grouper on a ResNet.
    """
    config = load(argument)
    if config.model.kind != "zegformer" or config.model.backbone.name != "resnet":
        raise ValueError(f"--config: {argument}: only the grouper on a ResNet is compared")
    return config


def make_batch(config: Any, size: int, classes: int) -> dict[str, np.ndarray]:
    """Makes images of noise, and label maps of a few large regions of different classes."""
    rng = np.random.default_rng(0)
    rows, columns = REGIONS
    side = config.input.crop_size
    labels = np.empty((size, side, side), np.min_scalar_type(classes))
    for label in labels:
        ids = rng.choice(classes, rows * columns, replace=False).reshape(rows, columns)
        places = (
            np.sort(rng.choice(np.arange(1, side), parts - 1, replace=False)).searchsorted(
                np.arange(side), side="right"
            )
            for parts in REGIONS
        )
        label[:] = ids[np.ix_(*places)]
    return {"image": rng.integers(0, 256, (size, side, side, 3), np.uint8), "label": labels}


def make_text(classes: int) -> np.ndarray:
    """Makes text embeddings, float32 [C, D] of unit length."""
    text_cd = np.random.default_rng(0).normal(size=(classes, EMBED_DIM)).astype(np.float32)
    return text_cd / np.linalg.norm(text_cd, axis=-1, keepdims=True)


class OurStep:
    """The compiled step of this project, and its state."""

    def __init__(self, config: Any, dtype: str, batch: dict[str, np.ndarray], text: np.ndarray):
        """Makes the state and compiles the step."""
        mesh = make_mesh(jax.devices()[:1])
        config = ConfigDict(config.to_dict())
        config.dtype = dtype
        experiment = Experiment(config, "")
        self.loss, self.objective = experiment.loss, GrouperObjective(experiment, text)
        optimiser, step = step_of(experiment, self.objective, mesh)
        key = jax.random.key(experiment.seed)
        variables = random_variables(self.objective.init, key)
        state = make_state(variables, self.objective.metrics, optimiser)
        constants = dict(self.objective.constants)
        self.state, self.constants, self.key = replicate((state, constants, key), mesh)
        self.batch = to_devices(batch, mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
        lowered = jitted.lower(self.state, self.constants, self.batch, self.key)
        self._compiled, self.flops = lowered.compile(), count_flops(lowered)
        self._metrics = {}

    def __call__(self) -> None:
        """Starts a step after the previous one ended, as the training does."""
        self.state, metrics = self._compiled(self.state, self.constants, self.batch, self.key)
        jax.block_until_ready(self._metrics)
        self._metrics = metrics

    def wait(self) -> None:
        """Waits for the last step."""
        jax.block_until_ready(self.state)

    def memory(self) -> float:
        """Returns the peak memory in bytes."""
        return peak_bytes(self._compiled)

    def matching_seconds(self, seconds: float) -> float:
        """Returns the seconds of matching all layers alone, on the model's output."""
        loss, text_cd = self.loss, self.constants["text_cd"]
        variables = {"params": self.state.params, "constants": self.state.constants}
        images = normalise_images(self.batch["image"])
        output = jax.jit(self.objective.model.apply)(variables, images, text_cd)
        targets = self.objective.targets(self.batch)
        match = jax.jit(
            lambda output, targets: matching.match_layers(
                *output, targets, loss.mask_weight, loss.dice_weight
            )
        )
        return 1 / rate(lambda: jax.block_until_ready(match(output, targets)), seconds)


def rate(step: Callable[[], Any], seconds: float, wait: Callable[[], Any] = lambda: None) -> float:
    """Returns calls per second over some seconds, at least one, after two warm-up calls."""
    for _ in range(WARM_UP):
        step()
    wait()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        step()
        count += 1
    wait()
    return count / (time.perf_counter() - start)


def measured_peak(dtype: str) -> float:
    """Returns the FLOP/s of a matmul of two large square matrices."""
    side = MATMUL_SIDE.get(jax.default_backend(), LARGE_MATMUL_SIDE)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(MATMULS):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def attempt(make: Callable[[], Any]) -> Any:
    """Makes a step and runs it once; returns None if the memory is too small."""
    try:
        step = make()
        step()
        step.wait()
        step.peak = step.memory()  # before another step allocates
        return step
    except RuntimeError as error:  # jax's and torch's derive from it
        if "out of memory" not in str(error).lower():
            raise
        return None


def compare(options: argparse.Namespace, config: Any, dtype: str, size: int) -> None:
    """Measures one batch size and dtype, and prints the results."""
    vocabulary = load_vocabulary(config.dataset.vocabulary)
    text = make_text(len(vocabulary.seen_indices))
    arguments = (config, dtype, make_batch(config, size, len(text)), text)
    makers = {OURS: lambda: OurStep(*arguments)}
    if not options.alone and all(importlib.util.find_spec(name) for name in NEEDED):
        from torch_step import TorchStep

        makers["PyTorch"] = lambda: TorchStep(*arguments)
        if options.compile:
            makers["torch.compile"] = lambda: TorchStep(*arguments, compiles=True)
    head = f"{options.config} {config.input.crop_size} {dtype} batch {size}"
    made = {name: attempt(make) for name, make in makers.items()}
    for name in [name for name, step in made.items() if step is None]:
        print(f"{head}  {name}: out of memory", flush=True)
    steps = {name: step for name, step in made.items() if step is not None}
    if OURS not in steps:
        return
    rates = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            rates[name].append(size * rate(step, options.seconds, step.wait))
    report(options, head, dtype, steps, rates)


def report(
    options: argparse.Namespace, head: str, dtype: str, steps: dict, rates: dict[str, list[float]]
) -> None:
    """Prints medians, memory, FLOP/s and the matching's share; writes the profile of --profile."""
    ours, size = steps[OURS], len(steps[OURS].batch["image"])
    peak = options.peak * 1e12 if options.peak else measured_peak(dtype)
    source = "--peak" if options.peak else "measured by a matmul"
    print(f"{head}  {ours.flops / 1e9:.0f} GFLOP, peak {peak / 1e12:.2f} TFLOP/s ({source})")
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    for name, values in rates.items():
        share = 100 * ours.flops * medians[name] / size / peak
        print(
            f"  {name:<14}{medians[name]:8.3f} images/s ({min(values):.3f} to {max(values):.3f})"
            f"{steps[name].peak / 2**30:8.2f} GiB{share:7.1f} % of the peak"
        )
        if name != OURS:
            fastest = max(rates[OURS]) / max(values)
            print(f"  ours is {medians[OURS] / medians[name]:.2f} times as fast as {name}", end="")
            print(f", {fastest:.2f} times by the fastest rounds")
    matching = ours.matching_seconds(options.seconds) * medians[OURS] / size
    print(f"  the matching takes {100 * matching:.2f} % of our step", flush=True)
    if options.profile:
        folder = options.profile / f"{dtype}-{size}"
        with jax.profiler.trace(str(folder)):
            for _ in range(PROFILED):
                ours()
            ours.wait()
        print(f"  {PROFILED} steps profiled in {folder}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags; errors end the program with one line."""

    def positive(kind: type) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            if (number := kind(text)) <= 0:
                raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
            return number

        read.__name__ = kind.__name__  # named in argparse's message
        return read

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/pascal_voc.py:r50", help="FILE[:VARIANT]")
    parser.add_argument("--batch", type=positive(int), nargs="+", default=[1, 2])
    parser.add_argument("--crop", type=positive(int), help="input.crop_size; default: the config's")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=positive(int), default=3)
    parser.add_argument("--seconds", type=positive(float), default=20, help="per step and round")
    parser.add_argument("--peak", type=positive(float), help="TFLOP/s of the device")
    parser.add_argument("--compile", action="store_true", help="measures torch.compile, too")
    parser.add_argument("--alone", action="store_true", help="measures this project only")
    parser.add_argument("--profile", type=Path, help="folder for jax.profiler's traces")
    parser.error = lambda message: sys.exit(f"benchmarks/train_step.py: {message}")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measures all dtypes and batch sizes and prints the results."""
    options = parse(arguments)
    try:
        config = read_config(options.config).unlock()
    except ValueError as error:
        sys.exit(str(error))
    config.input.crop_size = options.crop or config.input.crop_size
    print(f"device: {jax.devices()[0].device_kind}, {os.cpu_count()} cores of the host")
    for dtype in options.dtypes:
        for size in options.batch:
            compare(options, config, dtype, size)
            gc.collect()  # frees the states before the next are made


if __name__ == "__main__":
    main(sys.argv[1:])
