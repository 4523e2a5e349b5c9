# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line: which cases, each in a process of its own, and the report as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import inference, profiling, reference, training
from .measure import H100, facts, markdown

PARTS = ("training", "inference", "study", "reference", "profile", "work")


def measured_parts(kind: Callable[..., dict[str, float]]) -> Callable[..., list[dict[str, Any]]]:
    return lambda **case: profiling.time_rows(kind(**case))


def counted_work(kind: Callable[..., Any], count_batch: int, **case: Any) -> list[dict[str, Any]]:
    return profiling.work_rows(kind(batch_size=count_batch, **case), count_batch)


#: What a process of its own can be asked to measure; each gives a row or rows.
CASES: dict[str, Callable[..., Any]] = {
    "training_speed": training.training_speed,
    "network_speed": inference.network_speed,
    "bank_size_ratio": inference.bank_size_ratio,
    "study_speed": inference.study_speed,
    "citim_against_literal": reference.citim_against_literal,
    "bank_against_full_maps": reference.bank_against_full_maps,
    "training_parts": measured_parts(profiling.training_parts),
    "inference_parts": measured_parts(profiling.inference_parts),
    "training_work": lambda batch_size, **case: counted_work(profiling.training_work, batch_size, **case),
    "step_work": profiling.step_work,
    "inference_work": lambda batch_size, **case: counted_work(profiling.inference_work, batch_size, **case),
}


def truth(text: str) -> bool:
    """``True`` or ``False``, as in the configs."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"give True or False, not {text}")
    return text.lower() == "true"


def width(text: str) -> Any:
    """A preset, or five channels as ``4,8,8,8,16``."""
    return [int(number) for number in text.split(",")] if "," in text else text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Where several values are given, the first is the reference and each other one varies it alone."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    add("--device", default="cuda:0" if gpu else "cpu", help="where")
    add("--widths", nargs="+", type=width, default=["base", "small", "paper"] if gpu else ["small", "base"])
    add("--batches", nargs="+", type=int, default=[16, 8, 2] if gpu else [2, 8], help="of training")
    add("--slices", nargs="+", type=int, default=[1, 8, 16, 32] if gpu else [1, 8], help="batches of inference")
    add("--bank_sizes", nargs="+", type=int, default=[300, 10, 1000] if gpu else [300, 10], help="L, of training")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"] if gpu else ["float32", "bfloat16"], help="autocast")
    add("--compile", nargs="+", type=truth, default=[False, True] if gpu else [False], help="torch.compile")
    add("--channels_last", nargs="+", type=truth, default=[False, True], help="memory format")
    add("--missing", nargs="+", type=int, default=[1, 2, 3], help="missing contrasts, of inference")
    add("--ratio_sizes", nargs="+", type=int, default=[10, 1000], help="L, of inference")
    add("--literal_sizes", nargs="+", type=int, default=[10, 100, 300], help="L, of the literal CITIM")
    add("--literal_width", type=width, default="base", help="of the references")
    add("--aggregations", nargs="+", default=["attention", "concat"], help="of CITIM in the references")
    add("--work_width", type=width, default="base", help="of the counted work")
    add("--work_batch", type=int, default=16, help="of the counted work")
    add("--step_sizes", nargs="+", type=int, default=[96, 192], help="slices of the trainings that are counted")
    add("--studies", type=int, default=3 if gpu else 2, help="the first one warms up")
    add("--study_shape", nargs=3, type=int, default=[240, 240, 155])
    add("--phantoms", default=None, help="folder that keeps the phantom studies between runs")
    add("--image_size", type=int, default=192)
    add("--warmup", type=int, default=10 if gpu else 1, help="training iterations before the timed ones")
    add("--repeats", type=int, default=5 if gpu else 3, help="timed blocks of training, of which the median counts")
    add("--block", type=int, default=10 if gpu else 1, help="training iterations of a block")
    add("--min_time", type=float, default=2.0 if gpu else 0.5, help="seconds over which a call is repeated")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--timeout", type=float, default=1800.0, help="seconds for one case")
    add("--output", default="build/benchmark.json", help="JSON file")
    add("--case", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_case(name: str, case: dict[str, Any], threads: int, timeout: float) -> list[dict[str, Any]]:
    """Measures one case in a fresh process, so that neither memory nor a crash of one reaches another.

    Returns:
        Its rows; one row with ``failed`` where it did not end well.
    """
    case_text = json.dumps({"name": name, **case})
    command = [sys.executable, str(Path(__file__).parent), "--threads", str(threads), "--case", case_text]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [{"failed": f"not finished after {timeout:g} s"}]
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return [{"failed": (lines or [f"exit status {done.returncode}"])[-1][:200]}]
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    return rows if isinstance(rows, list) else [rows]


def plan(options: argparse.Namespace) -> list[tuple[str, str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """What to measure.

    Returns:
        Tables: a title, the name of a case, and for each process the columns that say what it is and its arguments.
    """
    common = {"device": options.device, "image_size": options.image_size}
    tables = []
    lists = {
        "width": options.widths,
        "batch_size": options.batches,
        "dtype": options.dtypes,
        "compiled": options.compile,
        "channels_last": options.channels_last,
        "bank_size": options.bank_sizes,
    }
    center = {key: values[0] for key, values in lists.items()}
    varied = [center, *({**center, key: value} for key, values in lists.items() for value in values[1:])]
    first = {key: center[key] for key in ("width", "dtype", "bank_size")}
    timed = {"min_time": options.min_time}
    if "training" in options.parts:
        repeated = {"warmup": options.warmup, "repeats": options.repeats, "block": options.block}
        cases = [(case, {**common, **repeated, **case}) for case in varied]
        tables.append(("Training iteration", "training_speed", cases))
    if "inference" in options.parts:
        usual = {**first, "compiled": center["compiled"], "channels_last": center["channels_last"]}
        formats = [usual, *({**usual, key: v} for key in ("compiled", "channels_last") for v in lists[key][1:])]
        sizes = {"batches": options.slices, "missing": options.missing}
        cases = [(case, {**common, **timed, **sizes, **case}) for case in formats]
        tables.append(("Inference of slices", "network_speed", cases))
        ratio = {"width": center["width"], "dtype": center["dtype"]}
        arguments = {**common, **timed, "batch": options.slices[-1], "sizes": options.ratio_sizes, **ratio}
        tables.append(("Inference by bank size", "bank_size_ratio", [(ratio, arguments)]))
    if "study" in options.parts:
        study = {"width": center["width"], "bank_size": center["bank_size"]}
        files = {"studies": options.studies, "shape": options.study_shape, "phantoms": options.phantoms}
        tables.append(("Whole study, files to files", "study_speed", [(study, {**common, **files, **study})]))
    if "reference" in options.parts:
        wide = {"width": options.literal_width}
        cases = [
            (wide, {**common, **timed, **wide, "sizes": options.literal_sizes, "aggregation": aggregation})
            for aggregation in options.aggregations
        ]
        tables.append(("CITIM against its literal form", "citim_against_literal", cases))
        full = {**wide, "bank_size": options.literal_sizes[-1]}
        title = "Bank against a bank of whole feature maps"
        tables.append((title, "bank_against_full_maps", [(full, {**common, **timed, **full})]))
    if "profile" in options.parts:
        sized = {**first, "batch_size": center["batch_size"]}
        arguments = {**common, **sized, "warmup": options.warmup}
        tables.append(("Parts of a training iteration", "training_parts", [({}, arguments)]))
        sized = {**first, "batch_size": options.slices[-1]}
        tables.append(("Parts of inference", "inference_parts", [({}, {**common, **sized})]))
    if "work" in options.parts:
        counted = {
            "width": options.work_width,
            "batch_size": options.work_batch,
            "dtype": "bfloat16",
            "bank_size": center["bank_size"],
            "image_size": options.image_size,
        }
        tables.append(("Counted work of a training iteration", "training_work", [({}, counted)]))
        steps = {"width": "small", "batch_size": 8, "dtype": "bfloat16", "image_sizes": options.step_sizes}
        tables.append(("Counted work of trainings", "step_work", [({}, steps)]))
        tables.append(("Counted work of inference", "inference_work", [({}, counted)]))
    return tables


def note(name: str, arguments: dict[str, Any]) -> str:
    """One line under a title that says what the table does not."""
    if name.endswith("_parts"):
        wanted = ("width", "batch_size", "dtype", "bank_size")
        return ", ".join(f"{key} {arguments[key]}" for key in wanted)
    if name == "step_work":
        return "width small, batch 8, bfloat16, default bank. Counted, not measured; half of the contrasts missing."
    if name.endswith("_work"):
        rates = f"{H100.flops / 1e12:.0f} TFLOP/s, {H100.bandwidth / 1e12:.2f} TB/s"
        wanted = ("width", "batch_size", "dtype", "bank_size", "image_size")
        listed = ", ".join(f"{key} {arguments[key]}" for key in wanted)
        return f"{listed}. Counted, not measured; the times are a roofline estimate for {H100.name} ({rates})."
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        Exit status: 1 if a case failed.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.case:
        case = json.loads(options.case)
        print("\n" + json.dumps(CASES[case.pop("name")](**case)))
        return 0
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"facts": facts(torch.device(options.device)), "options": vars(options), "tables": {}}
    print(markdown([{"fact": name, "value": value} for name, value in report["facts"].items()]), flush=True)
    failed = False
    for title, name, cases in plan(options):
        rows = [
            {**columns, **row}
            for columns, arguments_of_case in cases
            for row in run_case(name, arguments_of_case, options.threads, options.timeout)
        ]
        failed = failed or any("failed" in row for row in rows)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        report["tables"][title] = {"note": note(name, cases[0][1]), "rows": rows}
        print(f"\n### {title}\n{report['tables'][title]['note']}\n", flush=True)
        print(markdown([{key: row.get(key) for key in keys} for row in rows]), flush=True)
        # after each table, so that an interrupted run keeps what it has
        output.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)
