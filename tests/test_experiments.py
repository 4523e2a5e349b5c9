# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Experiments: folds, the runner that skips, goes on and fails as it should, overlays of the ablations, stages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from builders import BUNDLE_ROOT, TINY_CHANNELS, config_files, tiny_net
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from test_tables import FACTS, make_scores

import scripts.training.stages
from scripts.contrasts import StudyError
from scripts.data.datalist import PARTS, cross_validation_splits
from scripts.research.experiments import Experiments
from scripts.research.tables import KINDS
from scripts.training.stages import TimeLimit, with_shared_weights

CONFIG = json.loads((BUNDLE_ROOT / "configs" / "experiments.json").read_text())
ABLATIONS = sorted(path.stem for path in (BUNDLE_ROOT / "configs" / "ablations").glob("*.json"))


# -------------------------------------------------------------------------------------------------------------- folds
def cohort(patients: int) -> list[dict[str, str]]:
    """Two studies of each patient."""
    return [{"study": f"P{i:02d}_{visit}", "patient": f"P{i:02d}"} for i in range(patients) for visit in "ab"]


@pytest.mark.parametrize("patients, folds", [(6, 5), (23, 4)])
def test_every_patient_is_tested_once_and_the_untouched_never_appear(patients: int, folds: int) -> None:
    items = cohort(patients)
    splits = cross_validation_splits(items, folds, 0.2, ["P01_b"], seed=1)
    assert len(splits) == folds
    tested = [item["study"] for split in splits for item in split["test"]]
    assert sorted(tested) == [item["study"] for item in items if item["patient"] != "P01"]
    for split in splits:
        assert tuple(split) == PARTS and all(split.values())
        parts = [{item["patient"] for item in split[part]} for part in PARTS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == patients - 1
        assert sum(len(split[part]) for part in PARTS) == 2 * (patients - 1)
    sizes = [len(split["test"]) for split in splits]
    assert max(sizes) - min(sizes) <= 2
    assert cross_validation_splits(items[::-1], folds, 0.2, ["P01"], seed=1) == splits
    assert cross_validation_splits(items, folds, 0.2, ["P01"], seed=2) != splits


def test_folds_that_cannot_be_are_refused() -> None:
    assert not any(split["validation"] for split in cross_validation_splits(cohort(4), 2, 0.0))
    with pytest.raises(StudyError, match="3 patients cannot make 4 folds"):
        cross_validation_splits(cohort(3), 4)
    with pytest.raises(StudyError, match="names P99"):
        cross_validation_splits(cohort(3), 2, held_out=["P99"])
    for folds, fraction in ((1, 0.1), (2, 1.0)):
        with pytest.raises(ValueError, match="folds must be"):
            cross_validation_splits(cohort(3), folds, fraction)


# ------------------------------------------------------------------------------------------------------------- runner
class FakeExperiments(Experiments):
    """Runs no process: a training writes its weights, an evaluation the scores of its test studies."""

    commands: list[list[str]]
    broken: str = ""
    with_report: bool = False

    def report(self, folds: int, notes: Mapping[str, str]) -> None:
        if self.with_report:
            super().report(folds, notes)

    def prepare(self, split_files: Sequence[Path]) -> int:
        return 40

    def execute(self, command: Sequence[str], log: Path, device: str | int | None) -> int:
        overlay = json.loads(Path(json.loads(command[-1].partition("=")[2].replace("'", '"'))[-1]).read_text())
        self.commands.append([command[4], str(log.relative_to(self.output_dir)), device])
        log.write_text("some lines\nwhat went wrong\n\n")
        if self.broken and self.broken in str(log):
            return 3
        if command[4] == "training":
            Path(overlay["last_ckpt_path"]).write_bytes(b"weights")
            checkpoints = Path(overlay["output_dir"]) / "checkpoints"
            checkpoints.mkdir()
            (checkpoints / "checkpoint_epoch=8.pt").write_bytes(b"state")
        else:
            assert Path(overlay["ckpt_path"]).is_file()
            studies = json.loads(Path(overlay["split_file"]).read_text())["test"]
            folder = Path(overlay["report_dir"])
            folder.mkdir(exist_ok=True)
            scores = make_scores(overlay["seed"], studies={name: name[:3] for name in studies})
            scores.to_csv(folder / "scores.csv", index=False)
            (folder / "metrics.json").write_text(json.dumps({"facts": FACTS | {"seed": overlay["seed"]}}))
        return 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Empty files with the names of seven patients' studies, of two visits the first."""
    for i in range(7):
        for visit in "ab" if i == 0 else "a":
            folder = tmp_path / "data" / f"P{i:02d}_{visit}"
            folder.mkdir(parents=True)
            (folder / f"P{i:02d}_{visit}_t1.nii").touch()
    return tmp_path / "data"


def experiments(data: Path, with_report: bool = False, **changes: Any) -> FakeExperiments:
    """Two experiments and a control over two seeds and three folds."""
    settings = {
        "experiments": {
            "first": {"configs": ["ablations/ccp"], "share": 0.5},
            "second": {"configs": ["ablations/bank_10"], "after": "first"},
            "control": {"overrides": {"retrieval": "random"}, "weights_of": "second"},
        },
        "names": ["control", "first"],
        "output_dir": data.parent / "out",
        "bundle_root": BUNDLE_ROOT,
        "dataset_dir": str(data),
        "settings": {"bank_size": 20, "image_size": 64},
        "budget": {"max_epochs": 8, "decay_start": 4, "epoch_samples": 10},
        "seeds": [0, 1],
        "folds": 3,
        "held_out": ["P06"],
        "patient_pattern": r"(P\d\d)_\w$",
        "evaluations": CONFIG["evaluations"],
        "evaluate_with": ["evaluation"],
        "draws": 20,
        "tables": {"mean": {"title": "Mean", "kind": "scores", "reference": "first"}},
    }
    runner = FakeExperiments(**{**settings, **changes})
    runner.commands, runner.with_report = [], with_report
    return runner


def test_everything_runs_once_and_is_skipped_afterwards(data: Path) -> None:
    runner = experiments(data, with_report=True)
    assert runner.names == ["first", "second", "control"]
    runner.run()
    # six runs of each: two train and evaluate, the control evaluates alone
    assert len(runner.commands) == 6 * (2 + 2 + 1)
    assert sorted(command[0] for command in runner.commands) == ["evaluating"] * 18 + ["training"] * 12
    scores = pd.concat(
        pd.read_csv(path) for path in sorted((runner.output_dir / "first" / "seed_1").glob("*/evaluation/scores.csv"))
    )
    tested = scores.drop_duplicates(["study", "scenario", "of", "method", "score"])
    assert len(tested) == len(scores) and set(scores["patient"]) == {f"P{i:02d}" for i in range(6)}
    assert not list(runner.output_dir.rglob("checkpoint_*.pt"))
    untouched = json.loads((runner.output_dir / "splits" / "untouched.json").read_text())
    assert untouched["test"] == ["P06_a"] and len(untouched["training"]) + len(untouched["validation"]) == 7
    text = (runner.output_dir / "tables" / "mean.md").read_text()
    assert "6 patients (7 studies)" in text and "(2 seeds" in text and "| control |" in text
    assert "first" in (runner.output_dir / "index.html").read_text()
    times = runner.times(3)
    assert set(zip(times.cells["row"], times.cells["block"], strict=True)) == {
        *((name, step) for name in ("first", "second") for step in ("training", "evaluation")),
        ("control", "evaluation"),
    }
    assert "max_epochs 8, decay_start 4, epoch_samples 10" in (runner.output_dir / "tables" / "times.md").read_text()
    again = experiments(data)
    again.run()
    assert again.commands == []


def test_failed_run_is_named_and_the_others_go_on(data: Path) -> None:
    runner = experiments(data, with_report=True)
    runner.broken = "second/seed_1/fold_2/training"
    with pytest.raises(StudyError) as stopped:
        runner.run()
    # the control of the same seed and fold cannot run either
    assert str(stopped.value).startswith("2 of 18 runs failed, the others are complete; first ")
    assert "(seed 1, fold 2)" in str(stopped.value)
    assert len(runner.commands) == 30 - 2
    text = (runner.output_dir / "tables" / "mean.md").read_text()
    assert "| first |" in text and "| second |" in text and text.count("not complete") == 2
    again = experiments(data)
    again.run()
    assert [(command[0], command[1]) for command in again.commands] == [
        ("training", "second/seed_1/fold_2/training.log"),
        ("evaluating", "second/seed_1/fold_2/evaluation.log"),
        ("evaluating", "control/seed_1/fold_2/evaluation.log"),
    ]


def test_reason_of_a_failure_is_its_last_line(data: Path) -> None:
    runner = experiments(data, names="first", seeds=[0], folds=None)
    runner.broken = "first"
    with pytest.raises(StudyError, match=r"training ended with status 3 \(what went wrong\), see .*training\.log"):
        runner.run()


def test_training_without_weights_has_failed(data: Path) -> None:
    with pytest.raises(StudyError, match=r"training ended without writing model\.pt, see"):
        experiments(data, names="first", seeds=[0], folds=None, weights="best").run()


def test_other_settings_of_a_training_are_refused_and_of_an_evaluation_done_again(data: Path) -> None:
    experiments(data).run()
    with pytest.raises(StudyError, match=r"fold_0 was trained with another max_epochs: give another output_dir"):
        experiments(data, budget={"max_epochs": 9, "decay_start": 4, "epoch_samples": 10}).run()
    changed = CONFIG["evaluations"]["evaluation"] | {"overrides": {"lpips": False}}
    runner = experiments(data, evaluations={"evaluation": changed})
    runner.run()
    assert [command[0] for command in runner.commands] == ["evaluating"] * 18


def test_configs_and_overrides_of_a_run_are_in_order(data: Path) -> None:
    runner = experiments(data)
    runner.run()

    def overlay(path: str) -> dict[str, Any]:
        return json.loads((runner.output_dir / path).read_text())

    def combined(name: str, path: str) -> dict[str, Any]:
        return overlay(f"{name}/seed_0/fold_1/{path}.told.json")

    first, second = combined("first", "training"), combined("second", "training")
    # an own config stands above the common settings, the budget above both
    assert (first["bank_size"], second["bank_size"]) == (20, 10) and first["segmentation"] == "none"
    assert (first["max_epochs"], first["decay_start"], first["epoch_samples"]) == (4, 2, 10)
    assert (second["max_epochs"], second["decay_start"], second["image_size"]) == (8, 4, 64)
    assert first["seed"] == 0 and first["split"] == overlay("splits/fold_1.json")
    weights = str(runner.output_dir / "first" / "seed_0" / "fold_1" / "model_last.pt")
    assert overlay("second/seed_0/fold_1/training.json")["pretrained_path"] == weights
    control = overlay("control/seed_0/fold_1/evaluation.json")
    assert control["retrieval"] == "random"
    assert control["ckpt_path"] == weights.replace("first", "second")
    assert control["report_dir"] == str(runner.output_dir / "control" / "seed_0" / "fold_1" / "evaluation")
    caches = {overlay(str(path))["cache_dir"] for path in runner.output_dir.rglob("training.json")}
    assert caches == {str(runner.output_dir / "cache")}


def test_bank_larger_than_the_training_slices_is_not_run(data: Path) -> None:
    rows = {"sscf": {}, "bank_100": {"configs": ["ablations/bank_100"]}}
    runner = experiments(data, experiments=rows, names=["sscf", "bank_100"], seeds=[0], with_report=True)
    runner.run()
    assert not any("bank_100" in command[1] for command in runner.commands)
    assert "n/a: 40 training slices cannot fill a bank of 100" in (runner.output_dir / "tables/mean.md").read_text()


def test_what_only_an_evaluation_reads_does_not_belong_to_the_training(data: Path) -> None:
    rows = {"first": {"evaluation_overrides": {"reference_methods": []}}}
    evaluations = {
        "evaluation": {**CONFIG["evaluations"]["evaluation"], "overrides": {"reference_methods": ["zero_filling"]}}
    }
    runner = experiments(data, experiments=rows, names="first", seeds=[0], folds=None, evaluations=evaluations)
    runner.run()
    folder = runner.directory("first", 0, 0)
    assert "reference_methods" not in json.loads((folder / "training.told.json").read_text())
    assert json.loads((folder / "evaluation.told.json").read_text())["reference_methods"] == []
    # so that other reference_methods are only evaluated anew
    again = experiments(data, experiments={"first": {}}, names="first", seeds=[0], folds=None, evaluations=evaluations)
    again.run()
    assert [command[0] for command in again.commands] == ["evaluating"]


def test_minutes_replace_the_end_of_the_epochs(data: Path) -> None:
    runner = experiments(data, names="first", seeds=[0], folds=None, minutes=3.0)
    runner.run()
    told = json.loads((runner.directory("first", 0, 0) / "training.told.json").read_text())
    # the share of the experiment is one half
    assert told["train"]["handlers"][-1] == {"_target_": "scripts.training.stages.TimeLimit", "minutes": 1.5}
    assert told["resume"] is False


def test_sets_have_their_own_seeds_and_what_is_needed_has_them_too(data: Path) -> None:
    sets = {"once": ["first"], "often": ["control"]}
    runner = experiments(data, sets=sets, seeds={"once": [3], "often": [0, 1]}, folds=None, with_report=True)
    # the control evaluates the second's weights, which start from the first's
    assert runner.seeds == {"first": [0, 1, 3], "second": [0, 1], "control": [0, 1]}
    runner.run()
    trained = sorted(command[1] for command in runner.commands if command[0] == "training")
    expected = [f"first/seed_{seed}" for seed in (0, 1, 3)] + [f"second/seed_{seed}" for seed in (0, 1)]
    assert trained == [f"{run}/fold_0/training.log" for run in expected]
    assert "second 2, control 2 alone" in (runner.output_dir / "tables" / "mean.md").read_text()


def test_evaluation_is_done_for_those_that_it_names(data: Path) -> None:
    evaluations = {"evaluation": CONFIG["evaluations"]["evaluation"]}
    evaluations["task"] = {**evaluations["evaluation"], "uses": {"other_path": "first"}, "only": ["chosen"]}
    runner = experiments(
        data,
        names=["second", "fourth"],
        experiments={"first": {"evaluated": False}, "second": {}, "third": {}, "fourth": {}},
        sets={"chosen": ["second", "third"]},
        evaluations=evaluations,
        evaluate_with=["evaluation", "task"],
        seeds=[0],
        folds=None,
    )
    # the first is needed by the task alone
    assert runner.names == ["first", "second", "fourth"]
    runner.run()
    done = [command[1] for command in runner.commands if command[0] == "evaluating"]
    assert sorted(done) == [
        "fourth/seed_0/fold_0/evaluation.log",
        "second/seed_0/fold_0/evaluation.log",
        "second/seed_0/fold_0/task.log",
    ]


def test_given_split_is_the_only_one(data: Path) -> None:
    first = experiments(data)
    first.split_files()
    given = first.output_dir / "splits" / "untouched.json"
    runner = experiments(data, output_dir=data.parent / "final", split_file=given)
    files = runner.split_files()
    assert len(files) == 1 and json.loads(files[0].read_text()) == json.loads(given.read_text())


def test_jobs_share_the_devices(data: Path) -> None:
    runner = experiments(data, jobs=2, devices=["4", "5"])
    runner.run()
    assert len(runner.commands) == 30 and {command[2] for command in runner.commands} <= {"4", "5"}


def test_unknown_names_are_refused(data: Path) -> None:
    for changes, message in (
        ({"names": "thrid"}, "There is no experiment thrid: choose from first, second, control"),
        ({"evaluate_with": ["x"]}, "There is no evaluation x"),
        ({"weights": "newest"}, "weights must be last or best"),
        ({"seeds": {"frist": [0]}}, "seeds names frist, which is no set and no experiment"),
        ({"seeds": {"second": [0]}}, "seeds gives none for control: name it or a set that has it"),
        ({"experiments": {"a": {"after": "b"}, "b": {"after": "a"}}, "names": "a"}, "need each other"),
    ):
        with pytest.raises(StudyError, match=message):
            experiments(data, **changes)


def test_a_process_gets_its_threads_and_its_device(data: Path, tmp_path: Path) -> None:
    runner = Experiments({}, [], tmp_path / "out", BUNDLE_ROOT, dataset_dir=str(data), threads=3)
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd()); exit(7)"
    assert runner.execute([sys.executable, "-c", code], tmp_path / "log.txt", "1") == 7
    assert (tmp_path / "log.txt").read_text().split() == ["3", "1", str(BUNDLE_ROOT)]
    assert os.environ.get("OMP_NUM_THREADS") != "3"


# ------------------------------------------------------------------------------------------------------------ configs
def test_experiments_name_configs_and_tables_name_experiments() -> None:
    known = CONFIG["experiments"]
    named = {config for one in known.values() for config in one.get("configs", ())}
    assert all((BUNDLE_ROOT / "configs" / f"{config}.json").is_file() for config in named)
    assert {f"ablations/{name}" for name in ABLATIONS} <= named
    for one in CONFIG["tables"].values():
        assert set(one["rows"]) <= set(known) and one["kind"] in {*KINDS, "protocols"}
        assert one.get("reference", "sscf") in known
    assert {name for names in CONFIG["sets"].values() for name in names} <= set(known)
    assert not set(CONFIG["sets"]) & set(known)  # a name is of one or the other
    paper = json.loads((BUNDLE_ROOT / "configs" / "paper_values.json").read_text())["tables"]
    assert {one["paper"] for one in CONFIG["tables"].values() if "paper" in one} <= set(paper)
    for one in paper.values():
        assert {len(row) for row in one["rows"].values()} == {len(one["blocks"]) * len(one["scores"])}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_the_training_and_its_network_runs(name: str) -> None:
    base, parser = ConfigParser(), ConfigParser()
    base.read_config(config_files("train"))
    parser.read_config(config_files("train", f"ablations/{name}"))
    changes = json.loads((BUNDLE_ROOT / "configs" / "ablations" / f"{name}.json").read_text())
    for key, value in changes.items():
        assert key in base or key == "pretrained_path"
        assert base.get(key) != value if key in base else True
    parser.update({"channels": list(TINY_CHANNELS), "bank_size": min(parser["bank_size"], 6), "device": "cpu"})
    network = parser.get_parsed_content("network_def").eval()
    with torch.no_grad():
        pred = network(torch.rand(1, 8, 32, 32))
    assert pred.shape == (1, 7, 32, 32) and bool(pred.isfinite().all())


# ------------------------------------------------------------------------------------------------------------- stages
def test_training_ends_when_its_minutes_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(scripts.training.stages.time, "monotonic", lambda: now[0])
    completed: list[int] = []

    def step(*_: object) -> None:
        now[0] += 20.0

    engine = Engine(step)
    engine.add_event_handler(Events.COMPLETED, lambda e: completed.append(e.state.iteration))
    limit = TimeLimit(1.0)
    now[0] = 5000.0  # what lies before the start does not count
    limit.attach(engine)
    engine.run(range(10), max_epochs=2)
    assert completed == [4]
    with pytest.raises(ValueError, match="above 0"):
        TimeLimit(0)


def test_second_stage_takes_what_both_stages_have(tmp_path: Path) -> None:
    first, second = tiny_net(0, synthesis=False), tiny_net(1)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    before = {name: value.clone() for name, value in second.state_dict().items()}
    assert with_shared_weights(second, tmp_path / "first.pt") is second
    ours = dict(first.named_parameters())
    shared = set(ours) & {name for name, _ in second.named_parameters()}
    assert any("encoder" in name for name in shared) and any("segmentation" in name for name in shared)
    for name, value in second.state_dict().items():
        assert torch.equal(value, ours[name] if name in shared else before[name]), name
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    for path, message in (("other.pt", "has no tensor of this network"), ("none.pt", "cannot be read")):
        with pytest.raises(StudyError, match=message):
            with_shared_weights(second, tmp_path / path)
