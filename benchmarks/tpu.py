"""Table of the compiler's estimates for TPUs: every published config on every slice.

    python benchmarks/tpu.py [--configs FILE:VARIANT ...] [--slices NAME ...] [--programs ...]
        [--dtypes ...] [--sharding replicated data] [--seconds=SECONDS]
        [--records=records/tpu] [--output=docs/tpu.md]

Runs `compile --json` for each combination, in the order of the arguments, which takes some five
minutes each on two cores. What it says is kept in the folder of --records, so that a run which was
stopped goes on where it was, and the table can be extended later. --seconds: starts no other
program after that time. The table has all that is kept.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("configs/pascal_voc.py:r50", "configs/coco_stuff.py:r101", "configs/ade20k_full.py:r50")
SLICES = ("v5e:2x2", "v5e:4x4", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4", "v5e:8x8")
PROGRAMS = ("train", "evaluate")
DTYPES = ("bfloat16", "float32")
SHARDINGS = {"replicated": "", "data": "data"}
DTYPE_FIELDS = {"train": "dtype", "evaluate": "eval.dtype"}
HEAD = ("config", "slice", "program", "dtype", "parameters", "images", "memory a chip",
        "images/s a chip", "share of peak", "compiled in")  # fmt: skip
TEXT = """# Estimates for TPUs

    .venv/bin/python benchmarks/tpu.py

The compiler's estimates by libtpu, not measurements:
[how they are made](accelerators.md#compiling-for-a-tpu-that-you-do-not-have). Images are those of a
step, on all chips of the slice; for an evaluation, on those of one host. Parameters are replicated,
or split over the devices (`sharding.params=data`). Compiling took so long on two CPU cores, which
had other work for a part of the time.

"""


def case_of(config: str, slice_: str, program: str, dtype: str, sharding: str) -> dict[str, str]:
    """Returns a combination as it is kept."""
    return {
        "config": config, "slice": slice_, "program": program, "dtype": dtype,
        "parameters": sharding,
    }  # fmt: skip


def compile_case(case: dict[str, str]) -> dict[str, Any]:
    """Compiles a program in a process of its own; returns what it says, or its error."""
    command = [
        sys.executable, "-m", "zegformer_jax.cli.main", "compile", "--json",
        f"--config={case['config']}", f"--topology={case['slice']}", f"--what={case['program']}",
        f"--config.{DTYPE_FIELDS[case['program']]}={case['dtype']}",
        f"--config.sharding.params={SHARDINGS[case['parameters']]}",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


def row(record: dict[str, Any]) -> list[str]:
    """Returns a row of the table."""
    case, found = record["case"], record["found"]
    head = [case["config"].removeprefix("configs/"), *list(case.values())[1:]]
    if "error" in found:
        return [*head, "", found["error"], "", "", ""]
    return [
        *head,
        str(found["images"]),
        f"{found['memory'] / 2**30:.2f} of {found['available'] / 2**30:.0f} GiB",
        f"{found['images_per_second'] / found['chips']:.1f}",
        f"{found['share_of_peak']:.0%}",
        f"{found['compile_seconds']:.0f} s",
    ]


def parse() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="FILE:VARIANT")
    parser.add_argument("--slices", nargs="+", default=SLICES, metavar="NAME")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--sharding", nargs="+", default=tuple(SHARDINGS), choices=SHARDINGS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--records", type=Path, default=ROOT / "records" / "tpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tpu.md")
    return parser.parse_args()


def main() -> None:
    """Compiles what is missing, and writes the table."""
    options, start = parse(), time.monotonic()
    options.records.mkdir(parents=True, exist_ok=True)
    wanted = itertools.product(
        options.sharding, options.dtypes, options.slices, options.configs, options.programs
    )
    for sharding, dtype, slice_, config, program in wanted:
        case = case_of(config, slice_, program, dtype, sharding)
        name = "-".join(case.values()).replace("/", "_").replace(":", "_")
        path = options.records / f"{name}.json"
        if path.exists() or (program == "evaluate" and sharding != "replicated"):
            continue  # an evaluation never splits its parameters
        if time.monotonic() - start > options.seconds:
            break
        record = {"case": case, "found": compile_case(case)}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(*row(record), sep="  ", flush=True)
    records = [json.loads(path.read_text()) for path in sorted(options.records.glob("*.json"))]
    table = tabulate(map(row, records), HEAD, tablefmt="github", disable_numparse=True)
    options.output.write_text(f"{TEXT}{table}\n")


if __name__ == "__main__":
    main()
