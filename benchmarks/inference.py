"""Seconds and memory of inference: this project compared with a pipeline of PyTorch's parts.

    python benchmarks/inference.py [--parts=speed,batch,clip,modes,memory,classes,devices]
        [--dtypes float32] [--queries=100] [--chunk=4] [--chunks 4 10 25 100] [--repeats=3]
        [--alone] [--compile] [--tiny]

The sizes of the models (ResNet-50, ViT-B/16 at 224) and all operations from the image to the label
map are real. The data is synthetic: parameters are random and the image is noise. The grouper runs,
but its logits are then replaced by random class logits and by masks of ellipses of all sizes,
distinct and not empty, so that CLIP encodes every segment (exact mode) unless a row says otherwise.
Text embeddings are random, as they are computed once per vocabulary.

speed: seconds per image by part, for an image of 480x640 resized to 512x683 and padded to 512x704.
This project and PyTorch (`torch_inference.py`, if torch and transformers are installed) take turns;
the figures are medians. `all` is one compiled function, so the parts need not add up to it.
batch: the exact mode, by the number of images that go through the networks together.
clip: CLIP alone by the number of crops per batch, compared with a large matmul.
modes: the modes that show CLIP fewer segments.
memory: growth at the peak of one call, each in a separate process: resident memory on a CPU, the
device's count on accelerators; and XLA's allocations for temporaries and output.
classes: the step of the real Evaluator with small models, and the label map alone.
devices: the same step on virtual CPU devices. They share the host's cores: it shows the overhead.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for PyTorch

import jax
import jax.numpy as jnp
from inference_parts import Case, Pipeline, in_process, peak_bytes

from zegformer_jax.segmentation.classifiers.crops import CHUNK, CHUNK_ON  # noqa: E402
from zegformer_jax.segmentation.skipping import Skipping  # noqa: E402

PARTS = ("speed", "batch", "clip", "modes", "memory", "classes", "devices")
BY_DTYPE = PARTS[:5]  # measured for each of --dtypes
DTYPES = ("float32", "bfloat16")
OURS, PYTORCH, COMPILED = "this project", "PyTorch", "torch.compile"
NEEDED = ("torch", "transformers")
BATCHES = (1, 4)
KEPT = (30, 10)  # segments that are not empty
LEFT = 10  # segments that CLIP sees with `eval.skip_below` and `eval.top_segments`
MATMUL_SIDE = {"cpu": 2048}  # of the matmul that measures the device's speed
LARGE_MATMUL_SIDE = 8192  # on accelerators
LARGE = {"size": (1024, 1366), "original": (960, 1280)}
HUGE = {"original": (1500, 2000), "classes": 847}
CLASSES, DEVICES, IMAGES = (20, 171, 847), (1, 2, 4, 8), 8
SMALL = {"size": (256, 341), "original": (240, 320)}  # size of the images for `devices`
TINY = {"size": (64, 85), "original": (60, 80), "queries": 4, "chunk": 4}  # with --tiny


def take_turns(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Returns the median seconds of calls that take turns, each after one warm-up call.

    A call that returns a float, or a dict of floats by part, is not timed: these are its seconds.
    """
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            own = call()
            seconds = time.perf_counter() - start
            times[name].append(own if isinstance(own, dict | float) else seconds)
    return {name: _median(values) for name, values in times.items()}


def _median(values: list) -> Any:
    if isinstance(values[0], dict):
        return {part: float(np.median([x[part] for x in values])) for part in values[0]}
    return float(np.median(values))


def compile_all(makers: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Returns what the makers return, which compile side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(makers, pool.map(lambda make: make(), makers.values()), strict=True))


@cache
def pipelines(case: Case, alone: bool, compiles: bool) -> tuple[Pipeline, dict[str, Any]]:
    """Returns this project's pipeline, and PyTorch's by name, none if it is not wanted or there."""
    ours = Pipeline(case)
    if alone or not all(importlib.util.find_spec(name) for name in NEEDED):
        return ours, {}
    from torch_inference import TorchPipeline

    theirs = {PYTORCH: TorchPipeline(case, ours.made)}
    return ours, theirs | ({COMPILED: TorchPipeline(case, ours.made, True)} if compiles else {})


def prepare(options: argparse.Namespace, dtype: str, part: str) -> tuple[Pipeline, dict[str, Any]]:
    """Prints what is measured; returns the pipelines."""
    fields = {"queries": options.queries, "chunk": options.chunk} | (TINY if options.tiny else {})
    case = Case(dtype=dtype, **fields)
    print(f"{part}: {case.size[0]}x{case.size[1]}, {dtype}, {case.queries} queries, ", end="")
    print(f"{case.classes} classes, chunks of {case.chunk}; seconds per image", flush=True)
    return pipelines(case, options.alone, options.compile)


def speed(options: argparse.Namespace, dtype: str) -> None:
    """Prints the seconds of the grouper, crops, CLIP, label map, and of all in exact mode."""
    ours, theirs = prepare(options, dtype, "speed")
    encode = partial(ours.encoder, -(-ours.case.queries // ours.chunks))
    parts = compile_all(
        {
            "grouper": ours.run_grouper,
            "crops": ours.run_crops,
            "CLIP": encode,
            "map": ours.run_map,
            "all": ours.whole,
        }
    )
    medians = take_turns(parts | theirs, options.repeats)
    medians["CLIP"] *= ours.chunks  # only one chunk is timed
    print(f"  {'':<10}{OURS:>14}" + "".join(f"{name:>14}{'ours/theirs':>14}" for name in theirs))
    for part in parts:
        line = f"  {part:<10}{medians[part]:>14.4f}"
        for name in theirs:
            line += f"{medians[name][part]:>14.4f}{medians[part] / medians[name][part]:>14.2f}"
        print(line, flush=True)


def batch(options: argparse.Namespace, dtype: str) -> None:
    """Prints the images per second of the exact mode by images in a batch."""
    ours, _ = prepare(options, dtype, "batch")
    calls = compile_all({count: partial(ours.batch, count) for count in BATCHES})
    for count, seconds in take_turns(calls, options.repeats).items():
        print(
            f"  {count} images {seconds / count:9.4f} s {count / seconds:9.2f} images/s", flush=True
        )


def modes(options: argparse.Namespace, dtype: str) -> None:
    """Prints the seconds of the whole inference with fewer segments for CLIP."""
    ours, _ = prepare(options, dtype, "modes")
    skipping = Skipping(skip_below=ours.threshold(LEFT))
    makers = {"exact": ours.whole}
    makers |= {f"{kept} not empty": partial(ours.whole, kept=kept) for kept in KEPT}
    makers[f"skip_below leaves {LEFT}"] = partial(ours.whole, skipping)
    makers[f"top_segments = {LEFT}"] = partial(ours.whole, Skipping(top_segments=LEFT))
    makers["one_pass"] = partial(ours.whole, classifier=ours.one_pass())
    medians = take_turns(compile_all(makers), options.repeats)
    for mode, seconds in medians.items():
        share = seconds / medians["exact"]
        print(f"  {mode:<24}{seconds:9.4f} s{share:8.2f} of exact mode", flush=True)


def speed_of_clip(options: argparse.Namespace, dtype: str) -> None:
    """Prints CLIP's seconds per crop by crops per batch, and GFLOP/s compared with a matmul."""
    ours, theirs = prepare(options, dtype, "clip")
    side = MATMUL_SIDE.get(jax.default_backend(), LARGE_MATMUL_SIDE)
    x = jnp.ones((side, side), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    calls = {("matmul", OURS): lambda: jax.block_until_ready(multiply(x, x))}
    calls |= {("matmul", name): partial(y.multiply_seconds, side) for name, y in theirs.items()}
    counts = [ours.case.chunk] if options.tiny else options.chunks
    encoders = compile_all({count: partial(ours.encoder, count) for count in counts})
    for count in encoders:
        calls[count, OURS] = encoders[count]
        calls |= {(count, name): partial(y.encode_seconds, count) for name, y in theirs.items()}
    medians = take_turns(calls, options.repeats)
    work = {"matmul": 2 * side**3} | {count: count * ours.flops() for count in encoders}
    for count in work:
        line = f"  {'matmul' if count == 'matmul' else f'CLIP, {count} crops':<18}"
        for name in (OURS, *theirs):
            rate = work[count] / medians[count, name] / 1e9
            each = "" if count == "matmul" else f"{medians[count, name] / count:.5f} s per crop"
            line += f"  {name} {rate:.0f} GFLOP/s {each}"
        print(line, flush=True)


def memory(options: argparse.Namespace, dtype: str) -> None:
    """Prints the peak memory of one call in addition to models and inputs."""
    exact = {"kind": "exact", "dtype": dtype, "chunk": options.chunk}
    torch = {**exact, "kind": "torch"}
    few, many = {"queries": options.queries}, {"queries": 3 * options.queries}
    cases = [exact | few, torch | few, exact | few | LARGE, torch | few | LARGE, exact | many]
    cases += [exact | few | HUGE | {"kind": "map"}]
    if options.tiny:
        cases = [exact | TINY, torch | TINY]
    if options.alone or not all(importlib.util.find_spec(name) for name in NEEDED):
        cases = [case for case in cases if case["kind"] != "torch"]
    print(f"memory: {dtype}, in addition to models and inputs")
    for case in cases:
        measured = in_process(__file__, case, dict(os.environ))
        shape = _case(case)
        print(
            f"  {case['kind']:<7}{shape.size[0]}x{shape.size[1]} to {shape.original[0]}x"
            f"{shape.original[1]}, {shape.queries} queries, {shape.classes} classes: "
            f"{measured['peak'] / 2**20:.0f} MiB at the peak, "
            f"XLA {measured['xla'] / 2**20:.0f} MiB",
            flush=True,
        )


def classes(options: argparse.Namespace) -> None:
    """Prints the seconds of the evaluation's step by size of the vocabulary."""
    print("classes: seconds per image of 512x683, small models")
    print(f"  {'classes':>8}{'label map':>12}{'ensemble':>12}{'4 methods':>12}{'and oracles':>13}")
    for count in CLASSES:
        case = {"kind": "classes", "classes": count, "queries": options.queries}
        measured = in_process(__file__, case | {"repeats": options.repeats}, dict(os.environ))
        cells = "".join(f"{value:>12.3f}" for value in measured["seconds"])
        print(f"  {count:>8}{cells}", flush=True)


def devices(options: argparse.Namespace) -> None:
    """Prints the seconds of the same step by number of virtual devices, which share the cores."""
    print(f"devices: {IMAGES} images of 256x341, small models, {os.cpu_count()} cores in all")
    first = None
    for count in DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        environment = dict(os.environ) | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        case = {"kind": "devices", "queries": options.queries, "repeats": options.repeats} | SMALL
        took = in_process(__file__, case, environment)["seconds"]
        first = first or took
        print(f"  {count} devices {took:8.3f} s, {took / first:.2f} of one device's", flush=True)


def _case(fields: dict[str, Any]) -> Case:
    """Makes a case of its JSON fields, in which tuples are lists."""
    known = {name: fields[name] for name in Case._fields if name in fields}
    return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Measures one case in this process."""
    case, kind = _case(fields), fields["kind"]
    if kind in ("classes", "devices"):
        from inference_evaluator import classes_row, step_seconds

        repeats = fields["repeats"]
        if kind == "devices":
            return {"seconds": step_seconds(case, IMAGES, repeats, ("ensemble",), False)}
        alone = take_turns({"map": Pipeline(case).run_map()}, repeats)["map"]
        return {"seconds": [alone, *classes_row(case, repeats)]}
    if kind == "torch":
        from inference_parts import make
        from torch_inference import TorchPipeline

        return {"peak": TorchPipeline(case, make(case)).peak_bytes(), "xla": float("nan")}
    ours = Pipeline(case)
    run = ours.run_map() if kind == "map" else ours.whole()
    return {"peak": peak_bytes(run), "xla": run.allocated}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags; errors end the program with one line."""

    def positive(text: str) -> int:
        if (number := int(text)) <= 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
        return number

    def parts(text: str) -> list[str]:
        if wrong := set(text.split(",")) - set(PARTS):
            raise argparse.ArgumentTypeError(f"'{min(wrong)}': choose of {', '.join(PARTS)}")
        return text.split(",")

    on_cpu = jax.default_backend() == "cpu"  # bfloat16 is slow there
    chunk = CHUNK_ON.get(jax.default_backend(), CHUNK)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[: 2 - on_cpu])
    parser.add_argument("--queries", type=positive, default=100)
    parser.add_argument("--chunk", type=positive, default=chunk, help="eval.clip_chunk")
    parser.add_argument("--chunks", type=positive, nargs="+", default=[4, 10, 25, 100])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--compile", action="store_true", help="measures torch.compile, too")
    parser.add_argument("--alone", action="store_true", help="measures this project only")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"benchmarks/inference.py: {message}")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Runs the chosen measurements."""
    options = parse(arguments)
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    print(f"device: {jax.devices()[0].device_kind}, {os.cpu_count()} cores of the host")
    measure_part = {"speed": speed, "batch": batch, "clip": speed_of_clip, "modes": modes}
    measure_part["memory"] = memory
    for part in options.parts:
        if part in BY_DTYPE:
            for dtype in options.dtypes:
                measure_part[part](options, dtype)
        else:
            {"classes": classes, "devices": devices}[part](options)


if __name__ == "__main__":
    main(sys.argv[1:])
