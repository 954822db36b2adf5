"""Seconds and memory of inference: this project's beside PyTorch's parts as users join them.

    python benchmarks/inference.py [--parts=speed,memory,classes,devices] [--dtypes float32]
        [--queries=100] [--chunk=4] [--chunks 4 10 25 100] [--repeats=3] [--compile]

Real: the models' sizes (ResNet-50, ViT-B/16 at 224) and every operation from the picture to the
label map. Made: parameters are random, the picture is noise, and the queries' logits, after the
grouper ran, are replaced by random ones and by ellipses of all sizes, all distinct and none empty;
so every segment is CLIP's to encode (exact mode) unless a row says otherwise. Text embeddings are
random, too: they are made once for a vocabulary.

speed: seconds a picture by part, at 512x683 (padded to 512x704) and 480x640 originally; ours and
PyTorch's (`torch_inference.py`, where torch and transformers are there) take turns, figures are
medians. `all` is one compiled function of ours, so parts need not add up to it. Then the modes that
show CLIP fewer segments, and CLIP alone by the number of crops at once, beside a large matmul.
memory: the growth at the peak of one call, each in a process of its own: resident memory on a CPU,
the device's count elsewhere; and what XLA allocates, temporaries and output.
classes: the real Evaluator's step with small models; and the label map alone.
devices: the same step on virtual CPU devices. They share the host's cores: it shows the overhead.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's

import jax
import jax.numpy as jnp
from inference_parts import Case, Pipeline, in_process, peak_bytes

from zegformer_jax.segmentation.classifiers.crops import CHUNK, CHUNK_ON  # noqa: E402
from zegformer_jax.segmentation.skipping import Skipping  # noqa: E402

PARTS = ("speed", "memory", "classes", "devices")
DTYPES = ("float32", "bfloat16")
OURS, PYTORCH, COMPILED = "this project", "PyTorch", "torch.compile"
NEEDED = ("torch", "transformers")
KEPT = (30, 10)  # segments that are not empty
LEFT = 10  # segments that `eval.skip_below` and `eval.top_segments` leave to CLIP
MATMUL_SIDE = {"cpu": 2048}  # of the matmul that shows what the device can
LARGE_MATMUL_SIDE = 8192  # on accelerators
LARGE = {"size": (1024, 1366), "original": (960, 1280)}
HUGE = {"original": (1500, 2000), "classes": 847}
CLASSES, DEVICES, PICTURES = (20, 171, 847), (1, 2, 4, 8), 8
SMALL = {"size": (256, 341), "original": (240, 320)}  # pictures of the devices' table


def take_turns(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of calls that take turns, each warmed up; a call may say its own seconds."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            said = call()
            took = time.perf_counter() - start
            times[name].append(said if isinstance(said, dict | float) else took)
    return {name: _median(values) for name, values in times.items()}


def _median(values: list) -> Any:
    if isinstance(values[0], dict):
        return {part: float(np.median([x[part] for x in values])) for part in values[0]}
    return float(np.median(values))


def others(case: Case, made: Any, compiles: bool) -> dict[str, Any]:
    """PyTorch's pipelines, where it is installed."""
    if not all(importlib.util.find_spec(name) for name in NEEDED):
        return {}
    from torch_inference import TorchPipeline

    pipelines = {PYTORCH: TorchPipeline(case, made)}
    return pipelines | ({COMPILED: TorchPipeline(case, made, True)} if compiles else {})


def speed(options: argparse.Namespace, dtype: str) -> None:
    """By part, by mode, and by crops at once."""
    case = Case(queries=options.queries, dtype=dtype, chunk=options.chunk)
    ours = Pipeline(case)
    theirs = others(case, ours.made, options.compile)
    print(f"speed: {case.size[0]}x{case.size[1]}, {dtype}, {case.queries} queries, ", end="")
    print(f"{case.classes} classes, chunks of {case.chunk}; seconds a picture", flush=True)
    parts, modes, chunks = calls_by_part(ours), calls_by_mode(ours), ours.chunks
    medians = take_turns(parts | theirs | modes, options.repeats)
    medians["CLIP"] *= chunks  # one is timed
    print(f"  {'':<10}{OURS:>14}" + "".join(f"{name:>14}{'ours/theirs':>14}" for name in theirs))
    for part in parts:
        line = f"  {part:<10}{medians[part]:>14.3f}"
        for name in theirs:
            line += f"{medians[name][part]:>14.3f}{medians[part] / medians[name][part]:>14.2f}"
        print(line, flush=True)
    for mode in modes:
        share = medians[mode] / medians["all"]
        print(f"  {mode:<24}{medians[mode]:8.3f} s{share:8.2f} of exact mode", flush=True)
    speed_of_clip(options, ours, theirs)


def calls_by_part(ours: Pipeline) -> dict[str, Callable[[], Any]]:
    """Grouper, crops, one chunk of CLIP's, map, and everything in exact mode."""
    return {
        "grouper": ours.run_grouper(),
        "crops": ours.run_crops(),
        "CLIP": ours.encoder(-(-ours.case.queries // ours.chunks)),
        "map": ours.run_map(),
        "all": ours.whole(),
    }


def calls_by_mode(ours: Pipeline) -> dict[str, Callable[[], Any]]:
    """Everything, where CLIP sees fewer segments."""
    skipping = Skipping(skip_below=ours.threshold(LEFT))
    calls = {f"{kept} not empty": ours.whole(kept=kept) for kept in KEPT}
    calls[f"skip_below leaves {LEFT}"] = ours.whole(skipping)
    calls[f"top_segments = {LEFT}"] = ours.whole(Skipping(top_segments=LEFT))
    calls["one_pass"] = ours.whole(classifier=ours.one_pass())
    return calls


def speed_of_clip(options: argparse.Namespace, ours: Pipeline, theirs: dict[str, Any]) -> None:
    """Prints CLIP's time a crop by the number of crops at once, and GFLOP/s beside a matmul's."""
    side = MATMUL_SIDE.get(jax.default_backend(), LARGE_MATMUL_SIDE)
    x = jnp.ones((side, side), jnp.dtype(ours.case.dtype))
    multiply = jax.jit(jnp.matmul)
    calls = {("matmul", OURS): lambda: jax.block_until_ready(multiply(x, x))}
    calls |= {("matmul", name): partial(y.multiply_seconds, side) for name, y in theirs.items()}
    for count in options.chunks:
        calls[count, OURS] = ours.encoder(count)
        calls |= {(count, name): partial(y.encode_seconds, count) for name, y in theirs.items()}
    medians = take_turns(calls, options.repeats)
    work = {"matmul": 2 * side**3} | {count: count * ours.flops() for count in options.chunks}
    for count in work:
        line = f"  {'matmul' if count == 'matmul' else f'CLIP, {count} crops':<18}"
        for name in (OURS, *theirs):
            rate = work[count] / medians[count, name] / 1e9
            each = "" if count == "matmul" else f"{medians[count, name] / count:.4f} s a crop"
            line += f"  {name} {rate:.0f} GFLOP/s {each}"
        print(line, flush=True)


def memory(options: argparse.Namespace, dtype: str) -> None:
    """Prints the peak of one call beyond models and inputs."""
    exact = {"kind": "exact", "dtype": dtype, "chunk": options.chunk}
    torch = {**exact, "kind": "torch"}
    few, many = {"queries": options.queries}, {"queries": 3 * options.queries}
    cases = [exact | few, exact | many, exact | few | LARGE]
    cases += [exact | few | HUGE | {"kind": "map"}]
    if all(importlib.util.find_spec(name) for name in NEEDED):
        cases += [torch | few, torch | few | LARGE]
    print(f"memory: {dtype}, beyond models and inputs")
    for case in cases:
        said = in_process(__file__, case, dict(os.environ))
        shape = _case(case)
        print(
            f"  {case['kind']:<7}{shape.size[0]}x{shape.size[1]} to {shape.original[0]}x"
            f"{shape.original[1]}, {shape.queries} queries, {shape.classes} classes: "
            f"{said['peak'] / 2**20:.0f} MiB at the peak, XLA {said['xla'] / 2**20:.0f} MiB",
            flush=True,
        )


def classes(options: argparse.Namespace) -> None:
    """Prints how the evaluation's step grows with the vocabulary."""
    print("classes: seconds a picture of 512x683, small models")
    print(f"  {'classes':>8}{'label map':>12}{'ensemble':>12}{'4 methods':>12}{'and oracles':>13}")
    for count in CLASSES:
        case = {"kind": "classes", "classes": count, "queries": options.queries}
        said = in_process(__file__, case | {"repeats": options.repeats}, dict(os.environ))
        cells = "".join(f"{value:>12.3f}" for value in said["seconds"])
        print(f"  {count:>8}{cells}", flush=True)


def devices(options: argparse.Namespace) -> None:
    """Prints the same work on more virtual devices, which share the host's cores."""
    print(f"devices: {PICTURES} pictures of 256x341, small models, {os.cpu_count()} cores in all")
    first = None
    for count in DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        environment = dict(os.environ) | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        case = {"kind": "devices", "queries": options.queries, "repeats": options.repeats} | SMALL
        took = in_process(__file__, case, environment)["seconds"]
        first = first or took
        print(f"  {count} devices {took:8.3f} s, {took / first:.2f} of one device's", flush=True)


def _case(fields: dict[str, Any]) -> Case:
    """The fields of a case, sizes as tuples."""
    known = {name: fields[name] for name in Case._fields if name in fields}
    return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Measures one case in this process."""
    case, kind = _case(fields), fields["kind"]
    if kind in ("classes", "devices"):
        from inference_evaluator import classes_row, step_seconds

        repeats = fields["repeats"]
        if kind == "devices":
            return {"seconds": step_seconds(case, PICTURES, repeats, ("ensemble",), False)}
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
    """Reads the flags; wrong ones end the program with one line."""

    def positive(text: str) -> int:
        if (number := int(text)) <= 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
        return number

    def parts(text: str) -> list[str]:
        if wrong := set(text.split(",")) - set(PARTS):
            raise argparse.ArgumentTypeError(f"'{min(wrong)}': choose of {', '.join(PARTS)}")
        return text.split(",")

    on_cpu = jax.default_backend() == "cpu"  # where bfloat16 is slow
    chunk = CHUNK_ON.get(jax.default_backend(), CHUNK)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[: 2 - on_cpu])
    parser.add_argument("--queries", type=positive, default=100)
    parser.add_argument("--chunk", type=positive, default=chunk, help="eval.clip_chunk")
    parser.add_argument("--chunks", type=positive, nargs="+", default=[4, 10, 25, 100])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile besides")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"benchmarks/inference.py: {message}")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    options = parse(arguments)
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    print(f"device: {jax.devices()[0].device_kind}, {os.cpu_count()} cores of the host")
    for part in options.parts:
        if part in ("speed", "memory"):
            for dtype in options.dtypes:
                {"speed": speed, "memory": memory}[part](options, dtype)
        else:
            {"classes": classes, "devices": devices}[part](options)


if __name__ == "__main__":
    main(sys.argv[1:])
