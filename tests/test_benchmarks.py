# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The benchmarks run, count what can be counted by hand, and their references are what they stand for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from builders import TINY_CHANNELS

from benchmarks import cli, profiling
from benchmarks.inference import filled_network, network_case, scenario
from benchmarks.measure import H100, HOST, Operation, Parts, WorkCounter, work_of_batch
from benchmarks.profiling import inference_parts, training_parts, training_work
from benchmarks.reference import citim_against_literal
from benchmarks.training import training_speed

TINY = {"width": TINY_CHANNELS, "bank_size": 4, "image_size": 32}
TINY_TRAINING = {**TINY, "batch_size": 2, "discriminator_channels": 4}


def test_training_speed_of_the_bundle_config() -> None:
    row = training_speed("cpu", warmup=1, repeats=1, **TINY_TRAINING)
    assert row["samples_per_second"] == pytest.approx(2000 / row["milliseconds"])
    assert row["first_seconds"] > 0


def test_parts_of_training_and_inference_cover_the_network_and_the_step() -> None:
    branches = {"encoders, pass 1", "encoders, pass 2", "CITIM", "segmentation decoder", "synthesis decoders"}
    branches |= {"fusion of the contrasts", "stacking and retrieval", *(f"CCP, scale {j}" for j in range(1, 6))}
    assert set(inference_parts(**TINY)) == branches | {"rest"}
    step = {"rest of the forward pass", "losses", "backward", "discriminators", "optimizers", "moving average"}
    seconds = training_parts(**TINY_TRAINING, warmup=1)
    assert set(seconds) - {"rest", "dependency loss"} == branches | step | {"bank", HOST}


def test_counted_work_of_a_matrix_product_a_view_and_a_sum() -> None:
    counter = WorkCounter(Parts())
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    with counter:
        (a @ b).view(5, 2).add_(1.0)
    product, sum_ = counter.operations
    assert product == Operation("rest", "aten.mm", 2 * 2 * 3 * 5, 4 * (6 + 15 + 10))
    assert sum_ == Operation("rest", "aten.add_", 0, 4 * (10 + 10))


def test_work_of_a_batch_is_affine_in_its_size() -> None:
    small = [Operation("p", "aten.mm", 100, 10 + 2 * 3)]
    large = [Operation("p", "aten.mm", 150, 10 + 3 * 3)]
    work = work_of_batch([small, large], (2, 3), 16)["p"]
    assert work.flops == 800 and work.traffic == 10 + 16 * 3 and work.kernels == 1
    assert work.seconds == max(800 / H100.flops, 58 / H100.bandwidth)
    with pytest.raises(RuntimeError, match="different operations"):
        work_of_batch([small, []], (2, 3), 16)


def test_work_of_training_grows_with_the_batch() -> None:
    work = training_work(4, dtype="float32", **{k: v for k, v in TINY_TRAINING.items() if k != "batch_size"})
    assert work["encoders, pass 1"].flops == work["encoders, pass 2"].flops > 0
    assert work["optimizers"].flops == 0 < work["optimizers"].traffic


def test_steps_of_other_trainings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "STEPS", {k: v for k, v in profiling.STEPS.items() if "discriminators" not in k})
    tiny = {"width": TINY_CHANNELS, "dtype": "float32", "bank_size": 4, "discriminator_channels": 4}
    default, recipe, unet = profiling.step_work([32], 4, **tiny)
    assert default["GFLOP/sample"] > recipe["GFLOP/sample"] > 0 < unet["GFLOP/sample"]
    assert min(default["kernels"], recipe["kernels"]) > unet["kernels"] > 0


@pytest.mark.parametrize("aggregation", ["attention", "concat"])
def test_literal_citim_equals_the_factorized_one(aggregation: str) -> None:
    (row,) = citim_against_literal(
        width=TINY_CHANNELS, sizes=(5,), batch=2, aggregation=aggregation, image_size=64, min_time=0.0
    )
    assert row["difference"] < 1e-4 and row["speedup"] > 0


def test_network_of_a_benchmark_uses_its_bank() -> None:
    net = filled_network(torch.device("cpu"), TINY_CHANNELS, 4)
    assert bool(net.bank_present.all())
    image = network_case(2, 32, 3, torch.device("cpu"))
    assert image[:, 4:].amax(dim=(2, 3)).bool().tolist() == [list(scenario(3))] * 2 == [[False, True, False, False]] * 2


def test_command_line_writes_tables_and_notes_a_failed_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_case(name: str, case: dict, threads: int, timeout: float) -> list[dict]:
        assert name in cli.CASES and threads == 1
        return [{"failed": "out of memory"}] if name == "study_speed" else [{"figure": 1.5}]

    monkeypatch.setattr(cli, "run_case", run_case)
    output = tmp_path / "out.json"
    assert cli.main(["--threads", "1", "--device", "cpu", "--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert report["facts"]["device"] == "CPU" and report["facts"]["torch"] == torch.__version__
    assert report["tables"]["Whole study, files to files"]["rows"][0]["failed"] == "out of memory"
    assert len(report["tables"]) == 11 and "| out of memory |" in capsys.readouterr().out


def test_each_option_varies_alone() -> None:
    options = cli.parse(
        ["--parts", "training", "--widths", "small", "base", "--batches", "2", "8", "--bank_sizes", "5"]
    )
    ((_, _, cases),) = cli.plan(options)
    assert [(columns["width"], columns["batch_size"]) for columns, _ in cases[:3]] == [
        ("small", 2),
        ("base", 2),
        ("small", 8),
    ]


def test_case_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\n\nOutOfMemoryError: no room\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert cli.run_case("training_speed", {}, 1, 60.0) == [{"failed": "OutOfMemoryError: no room"}]
