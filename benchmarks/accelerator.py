"""Measures this project on an accelerator: the most important first, until the time is up.

    python benchmarks/accelerator.py [--seconds=540] [--tiny] [--output=FOLDER]

numbers    the published system's, on the device (tests/check_golden.py)
inference  seconds per image of the whole method by part, beside PyTorch; images/s by batch
training   the training step, beside PyTorch, with the shares of the peak and of the matching
memory     growth at the peak of an inference

Most of the time goes by in compiling, so that the last sections may have no turn.

Each section is a process of its own, which is stopped when its share of the time is over; a section
whose turn comes too late is skipped. Prints everything, and writes it with the exit statuses to
`accelerator.json` in FOLDER (default: $OUT, or the current folder).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = "accelerator.json"
LEAST_SECONDS = 20  # a section that has less is skipped
# Parity is exact arithmetic's; and XLA's Triton fusions abort on a small transposed convolution
# (jax 0.11, "subdim_size_accumulator == dim_size").
EXACT = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """One measurement.

    Attributes:
        name: Its name.
        command: Program below the repository, and its arguments.
        share: Part of the whole time that it may take.
        environment: Variables that are set for it; flags are added to the user's.
    """

    name: str
    command: tuple[str, ...]
    share: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def sections(tiny: bool) -> list[Section]:
    """Returns the sections in their order."""
    program = "benchmarks/inference.py"
    inference = (program, "--dtypes", "bfloat16", "float32")
    alone = (program, "--dtypes", "bfloat16", "--alone")
    step = ("benchmarks/train_step.py", "--dtypes", "bfloat16")
    voc, coco = "configs/pascal_voc.py:r50", "configs/coco_stuff.py:r101"
    numbers = ("tests/check_golden.py", "tests/golden/small")
    if tiny:
        step = ("benchmarks/train_step.py", "--dtypes", "float32")
        small = ("--batch", "1", "--crop", "64", "--seconds", "1", "--rounds", "1")
        return [
            Section("numbers", numbers, 0.4, EXACT),
            Section("inference", (program, "--tiny", "--parts", "speed,batch,clip,modes"), 0.4),
            Section("training VOC R-50", (*step, "--config", voc, *small), 0.2),
            Section("memory", (program, "--tiny", "--parts", "memory"), 0.1),
        ]
    timing = ("--batch", "32", "--seconds", "3", "--rounds", "1")
    compiled = (program, "--dtypes", "bfloat16", "--compile", "--parts", "speed")
    return [
        Section("numbers", numbers, 0.3, EXACT),
        Section("inference", (*inference, "--parts", "speed"), 0.2),
        Section("training VOC R-50", (*step, "--config", voc, *timing), 0.22),
        Section("training COCO R-101", (*step, "--config", coco, *timing, "--alone"), 0.25),
        Section("inference by batch", (*alone, "--parts", "batch,clip"), 0.2),
        Section("memory", (*inference, "--parts", "memory"), 0.15),
        Section("inference, torch.compile", compiled, 0.2),
        Section("inference, modes", (*alone, "--parts", "modes"), 0.2),
    ]


def run(section: Section, seconds: float) -> dict:
    """Runs a section, prints its lines as they come, and returns them.

    Args:
        section: The section.
        seconds: Time after which it is stopped.
    """
    print(f"\n== {section.name} (at most {seconds:.0f} s)", flush=True)
    environment = dict(os.environ)
    for name, value in section.environment.items():
        own = environment.get(name, "") if name == "XLA_FLAGS" else ""
        environment[name] = f"{own} {value}".strip()
    start, lines = time.monotonic(), []
    command = ["timeout", f"{seconds:.0f}", sys.executable, "-u", *section.command]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    took = time.monotonic() - start
    print(f"== {section.name}: exit status {process.returncode} after {took:.0f} s", flush=True)
    return {"lines": lines, "exit_status": process.returncode, "seconds": took}


def main() -> int:
    """Runs the sections; returns 1 if one of them failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="for everything; default: 540")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    options = parser.parse_args()
    end, found = time.monotonic() + options.seconds, {}
    options.output.mkdir(parents=True, exist_ok=True)
    for section in sections(options.tiny):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"\n== {section.name}: skipped, the time is up", flush=True)
            found[section.name] = {"lines": [], "exit_status": None, "seconds": 0.0}
        else:
            found[section.name] = run(section, min(left, section.share * options.seconds))
        (options.output / FILE).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(result["exit_status"] != 0 for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
