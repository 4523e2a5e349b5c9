# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""An interrupted training goes on as if nothing had happened: real kills, the same bits at the end."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders import assert_same, bundle_command, bundle_workflow, run_bundle, run_python, tiny_run
from ignite.engine import Engine, Events

from scripts.contrasts import StudyError

CONFIG = ["configs/train.json"]
EPOCHS, BATCHES = 4, 4

#: Starts ``monai.bundle`` and kills it from within, at the place that its first argument names.
KILLER = """
import io, os, runpy, signal, sys
import torch
from scripts.networks.memory_bank import MemoryBank

where, at = sys.argv.pop(1).split(":")
calls = 0
enqueue, save = MemoryBank.enqueue, torch.save

def killed_before_the_bank_is_written(self, entries):
    global calls
    calls += 1
    if where == "batch" and calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    enqueue(self, entries)

def killed_while_writing(state, file, **options):
    global calls
    if where == "checkpoint" and "engine" in state:
        calls += 1
        if calls == int(at):
            whole = io.BytesIO()
            save(state, whole, **options)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(state, file, **options)

if where == "batch":
    MemoryBank.enqueue = killed_before_the_bank_is_written
else:
    torch.save = killed_while_writing
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir() if path.name != "config.json")


def names(*epochs: int) -> list[str]:
    return [f"checkpoint_epoch={epoch}.pt" for epoch in epochs]


def assert_same_result(output_dir: Path, unbroken: Path) -> None:
    """Final checkpoint and both models hold the same bits, and the best model was chosen at the same epoch."""
    for file in (f"checkpoints/checkpoint_epoch={EPOCHS}.pt", "model.pt", "model_last.pt"):
        ours, theirs = (torch.load(folder / file, weights_only=True) for folder in (output_dir, unbroken))
        assert_same(ours, theirs, file)
    for file in ("validation.csv", "bank_slices.json", "split.json"):
        assert (output_dir / file).read_text() == (unbroken / file).read_text(), file


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, phantom_cohort: Path) -> Path:
    """Output folder of a run that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    status, printed = run_bundle("training", CONFIG, tiny_run(phantom_cohort, output_dir), output_dir / "log.txt")
    assert status == 0, printed
    return output_dir


@pytest.fixture
def copy(tmp_path: Path, unbroken: Path) -> Path:
    """A copy of the unbroken run's folder that a test may damage."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def test_unbroken_run_keeps_the_newest_checkpoints_with_the_whole_state(unbroken: Path) -> None:
    assert checkpoints(unbroken) == names(2, 3, 4)
    state = torch.load(unbroken / "checkpoints" / names(4)[0], weights_only=True)
    parts = {"step", "discriminators", "average", "best_model", "engine", "settings"}
    parts |= {f"{who}{what}" for who in ("", "discriminator_") for what in ("optimizer", "lr_scheduler")}
    assert set(state) == parts
    assert state["engine"]["epoch"] == EPOCHS and state["average"]["steps"] == EPOCHS * BATCHES
    assert int(state["step"]["bank.count"]) == 8 and state["best_model"]["epoch"] in (2, 4)
    assert {int(item["step"]) for item in state["optimizer"]["state"].values()} == {EPOCHS * BATCHES}
    earlier = torch.load(unbroken / "checkpoints" / names(3)[0], weights_only=True)
    with pytest.raises(AssertionError, match=r"step|optimizer"):
        assert_same(state, earlier)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_bits(tmp_path: Path, phantom_cohort: Path, unbroken: Path) -> None:
    """Killed in the middle of an epoch with workers, then without while a checkpoint is written, then let run on."""
    output_dir = tmp_path / "run"
    without, workers = (
        bundle_command("training", CONFIG, tiny_run(phantom_cohort, output_dir, num_workers=n)) for n in (0, 2)
    )

    status, printed = run_python(["-c", KILLER, f"batch:{BATCHES + 3}", *workers], tmp_path / "log.txt")
    assert status == -signal.SIGKILL, printed
    assert checkpoints(output_dir) == names(1)

    status, printed = run_python(["-c", KILLER, "checkpoint:2", *without], tmp_path / "log.txt")
    assert status == -signal.SIGKILL, printed
    assert "going on after epoch 1" in printed
    half, *complete = checkpoints(output_dir)
    assert complete == names(1, 2) and half.startswith(f".{names(3)[0]}.")
    assert (output_dir / "checkpoints" / half).stat().st_size > 10000

    status, printed = run_python(["-m", "monai.bundle", *workers], tmp_path / "log.txt")
    assert status == 0, printed
    assert "going on after epoch 2" in printed
    assert checkpoints(output_dir) == names(2, 3, 4)
    assert_same_result(output_dir, unbroken)


def test_complete_run_started_again_ends_at_once_and_changes_nothing(
    copy: Path, tmp_path: Path, phantom_cohort: Path, unbroken: Path
) -> None:
    newest = copy / "checkpoints" / names(EPOCHS)[0]
    written = newest.stat().st_mtime_ns
    # validation of the first weights would take the place of the best model, if it ran before they are restored
    overrides = tiny_run(phantom_cohort, copy, val_at_start=True)
    status, printed = run_bundle("training", CONFIG, overrides, tmp_path / "log.txt")
    assert status == 0, printed
    assert f"going on after epoch {EPOCHS}" in printed and "This training is complete" in printed
    assert "Epoch[" not in printed
    assert newest.stat().st_mtime_ns == written
    assert_same_result(copy, unbroken)


def test_run_does_not_go_on_with_other_patients(copy: Path, tmp_path: Path, phantom_cohort: Path) -> None:
    split = json.loads((copy / "split.json").read_text())
    moved = {**split, "training": split["training"][1:], "test": [*split["test"], split["training"][0]]}
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    overrides = tiny_run(phantom_cohort, copy, split_file=str(tmp_path / "moved.json"))
    with pytest.raises(StudyError, match=r"does not fit the configured run \(split is"):
        bundle_workflow("train", **overrides).run()
    assert json.loads((copy / "split.json").read_text()) == split


def rates_of(cohort: Path, output_dir: Path, **changes: object) -> dict[int, tuple[float, float]]:
    """Learning rates of network and discriminators in every epoch that a run goes on with."""
    workflow = bundle_workflow("train", **tiny_run(cohort, output_dir, **changes))
    parser = workflow.parser
    rates: dict[int, tuple[float, float]] = {}
    optimizers = [parser.get_parsed_content(name) for name in ("optimizer", "discriminator_optimizer")]

    def note(engine: Engine) -> None:
        one, other = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        rates[engine.state.epoch] = one, other

    parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_STARTED, note)
    workflow.run()
    return rates


def test_run_with_another_schedule_has_its_rates_from_the_first_epoch_on(
    copy: Path, phantom_cohort: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # the checkpoint of the end has a rate of 0
    with caplog.at_level("INFO"):
        rates = rates_of(phantom_cohort, copy, max_epochs=6, decay_start=2)
    assert rates == {5: (1e-4, 1e-4), 6: (5e-5, 5e-5)}
    told = "The learning rate after epoch 4 is 0.0001, not 0.0: its schedule is not that of the checkpoint."
    assert [record.getMessage() for record in caplog.records].count(told) == 2
    assert rates_of(phantom_cohort, copy, max_epochs=7, decay_start=7) == {7: (2e-4, 2e-4)}
