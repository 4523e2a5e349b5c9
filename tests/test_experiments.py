# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Experiments: folds, a plan that skips, goes on and fails as it should, overlays of the ablations, phases."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BUNDLE_ROOT, TINY_CHANNELS, config_files, make_scores, tiny_net, write_scores
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from scripts.contrasts import StudyError
from scripts.data.datalist import PARTS, cross_validation_splits, write_whole
from scripts.networks.weights import save_weights, with_shared_weights
from scripts.research.experiments import Experiments, make_splits
from scripts.research.report import write_report
from scripts.research.tables import KINDS
from scripts.training.trainer import TimeLimit

PARSER = ConfigParser()
PARSER.read_config(BUNDLE_ROOT / "configs" / "experiments.json")
CONFIG = {name: PARSER.get_parsed_content(name) for name in ("sets", "experiments", "tables", "evaluations")}
ABLATIONS = sorted(path.stem for path in (BUNDLE_ROOT / "configs" / "ablations").glob("*.json"))


# -------------------------------------------------------------------------------------------------------------- folds
def cohort(patients: int) -> list[dict[str, str]]:
    """Two studies of each patient."""
    return [{"study": f"P{i:02d}_{visit}", "patient": f"P{i:02d}"} for i in range(patients) for visit in "ab"]


@pytest.mark.parametrize("patients, folds", [(6, 5), (23, 4)])
def test_every_patient_is_tested_once(patients: int, folds: int) -> None:
    items = cohort(patients)
    splits = cross_validation_splits(items, folds, 0.2, seed=1)
    assert len(splits) == folds
    tested = [item["study"] for split in splits for item in split["test"]]
    assert sorted(tested) == [item["study"] for item in items]
    for split in splits:
        assert tuple(split) == PARTS and all(split.values())
        parts = [{item["patient"] for item in split[part]} for part in PARTS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == patients
        assert sum(len(split[part]) for part in PARTS) == 2 * patients
    sizes = [len(split["test"]) for split in splits]
    assert max(sizes) - min(sizes) <= 2
    assert cross_validation_splits(items[::-1], folds, 0.2, seed=1) == splits
    assert cross_validation_splits(items, folds, 0.2, seed=2) != splits


def test_folds_that_cannot_be_are_refused() -> None:
    assert not any(split["validation"] for split in cross_validation_splits(cohort(4), 2, 0.0))
    with pytest.raises(StudyError, match="3 patients cannot make 4 folds"):
        cross_validation_splits(cohort(3), 4)
    for folds, fraction in ((1, 0.1), (2, 1.0)):
        with pytest.raises(ValueError, match="folds must be"):
            cross_validation_splits(cohort(3), folds, fraction)


# --------------------------------------------------------------------------------------------------------------- plan
#: Stands in the place of Python in the commands: ``-m monai.bundle run <id> --config_file <file>``.
FAKE_PYTHON = """
    #!{python} -S
    import json, os, pathlib, shutil, sys
    config = json.loads(pathlib.Path(sys.argv[6]).read_text())
    folder, root = pathlib.Path(config["output_dir"]), pathlib.Path(__file__).parent
    step = f"{{pathlib.Path(sys.argv[6]).with_suffix('').relative_to(root / 'out')}}"
    with (root / "calls.txt").open("a") as file:
        print(sys.argv[4], step, os.getcwd(), file=file)
    print("some lines\\nwhat went wrong\\n")
    broken = root / "broken.txt"
    if broken.is_file() and broken.read_text() in step:
        sys.exit(3)
    if sys.argv[4] == "training":
        pathlib.Path(config["last_ckpt_path"]).write_bytes(b"weights")
        (folder / "checkpoints").mkdir()
    elif sys.argv[4] in ("building", "joining"):
        assert all(pathlib.Path(config[key]).is_file() for key in ("source_path", "companion_path") if config[key])
        pathlib.Path(config["site_path"]).write_bytes(b"weights")
    else:
        assert pathlib.Path(config["ckpt_path"]).is_file()
        fold = pathlib.Path(config["split_file"]).stem
        shutil.copytree(root / "scores" / fold, config["report_dir"], dirs_exist_ok=True)
"""


class PreparedExperiments(Experiments):
    """As if the slices of every fold were in the cache."""

    def prepare(self) -> int:
        return 40


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files with the names of seven patients' studies, of two visits the first; and no Python but a fake."""
    for i in range(7):
        for visit in "ab" if i == 0 else "a":
            folder = tmp_path / "data" / f"P{i:02d}_{visit}"
            folder.mkdir(parents=True)
            (folder / f"P{i:02d}_{visit}_t1.nii").touch()
    fake = tmp_path / "fake python"  # a path that a shell would take apart
    fake.write_text(textwrap.dedent(FAKE_PYTHON).strip().format(python=sys.executable))
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    return tmp_path / "data"


def experiments(data: Path, folds: int | None = 3, **changes: Any) -> Experiments:
    """Two experiments and a control over two seeds and three folds."""
    output_dir = changes.get("output_dir", data.parent / "out")
    splits = make_splits(output_dir / "splits", data, patient_pattern=r"(P\d\d)_\w$", folds=folds, held_out=["P06"])
    for file, split in splits.items():
        folder = data.parent / "scores" / Path(file).stem
        if not folder.is_dir():
            scores = make_scores(0, studies={name: name[:3] for name in split["test"]})
            write_scores(folder, scores[scores["score"] == "psnr"])
    tables = {"mean": {"title": "Mean", "kind": "scores", "reference": "first"}}
    settings = {
        "experiments": {
            "first": {"configs": ["ablations/ccp"], "share": 0.5},
            "second": {"configs": ["ablations/bank_10", "ablations/two_stage"], "uses": {"pretrained_path": "first"}},
            "control": {"overrides": {"retrieval": "random"}, "weights_of": "second"},
        },
        "names": ["control", "first"],
        "output_dir": output_dir,
        "dataset_dir": data,
        "splits": splits,
        "bundle_root": BUNDLE_ROOT,
        "report": lambda **runs: write_report(
            directory=output_dir, tables=tables, bootstrap_samples=20, **runs | {"panels": None}
        ),
        "settings": {"bank_size": 20, "image_size": 64},
        "budget": {"max_epochs": 8, "decay_start": 4, "epoch_samples": 10},
        "seeds": [0, 1],
        "evaluations": CONFIG["evaluations"],
        "evaluate_with": ["evaluation"],
    }
    return PreparedExperiments(**{**settings, **changes})


def one_run(data: Path, **changes: Any) -> Experiments:
    """The first experiment for one seed and one split."""
    return experiments(data, folds=None, **{"names": "first", "seeds": [0], **changes})


ONE_RUN = (("training", "training"), ("evaluating", "evaluation"))


def calls(data: Path) -> list[str]:
    """The steps that were run since the last call of this function."""
    path = data.parent / "calls.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    path.unlink(missing_ok=True)
    assert all(line.endswith(f" {BUNDLE_ROOT}") for line in lines)
    return [line.removesuffix(f" {BUNDLE_ROOT}") for line in lines]


def test_everything_runs_once_and_is_skipped_afterwards(data: Path) -> None:
    plan = experiments(data)
    plan.run()
    done = calls(data)
    # six runs of each: two train and evaluate, the control evaluates alone
    assert sorted(call.split()[0] for call in done) == ["evaluating"] * 18 + ["training"] * 12
    assert len(set(done)) == 30
    out = Path(plan.output_dir)
    assert not list(out.rglob("checkpoints"))
    untouched = json.loads((out / "splits" / "untouched.json").read_text())
    assert untouched["test"] == ["P06_a"] and len(untouched["training"]) + len(untouched["validation"]) == 7
    text = (out / "tables" / "mean.md").read_text()
    assert "6 patients (7 studies)" in text and "(2 seeds" in text and "| control |" in text
    assert "first" in (out / "index.html").read_text()
    (times,) = plan.times()
    assert set(zip(times.cells["row"], times.cells["block"], strict=True)) == {
        *((name, step) for name in ("first", "second") for step in ("training", "evaluation")),
        ("control", "evaluation"),
    }
    assert "max_epochs 8, decay_start 4, epoch_samples 10" in (out / "tables" / "times.md").read_text()
    experiments(data).run()
    assert calls(data) == []


def test_dry_run_prints_commands_that_another_program_can_run(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = one_run(data, names=["control", "first"], dry_run=True)
    plan.run()
    assert calls(data) == []
    scripts = sorted(Path(plan.output_dir).glob("plan_*.sh"))
    commands = [path.read_text().splitlines() for path in scripts]
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if not line.startswith("#")] == [line for lines in commands for line in lines]
    # what stands in one file needs nothing of the same file
    steps = [[line.split("started")[0].rpartition("/out/")[2] for line in lines] for lines in commands]
    folder = "seed_0/fold_0"
    assert steps == [
        [f"first/{folder}/training."],
        [f"first/{folder}/evaluation.", f"second/{folder}/training."],
        [f"second/{folder}/evaluation.", f"control/{folder}/evaluation."],
    ]
    for lines in commands:
        for line in reversed(lines):
            subprocess.run(["bash", "-c", line], check=True, cwd="/")
    assert len(calls(data)) == 5
    one_run(data, names=["control", "first"]).run()
    assert calls(data) == [] and "| control |" in (Path(plan.output_dir) / "tables" / "mean.md").read_text()


def test_failed_step_is_named_and_the_others_go_on(data: Path) -> None:
    (data.parent / "broken.txt").write_text("second/seed_1/fold_2/training")
    with pytest.raises(StudyError) as stopped:
        experiments(data).run()
    # its evaluation and that of the control cannot run either
    assert str(stopped.value).startswith("3 of 30 steps failed, the others are complete; first ")
    assert "fold_2/training: it ended with status 3 (what went wrong), see " in str(stopped.value)
    assert len(calls(data)) == 30 - 2
    text = (data.parent / "out" / "tables" / "mean.md").read_text()
    assert "| first |" in text and "| second |" in text and text.count("not complete") == 2
    (data.parent / "broken.txt").unlink()
    experiments(data).run()
    again = ["training second", "evaluating second", "evaluating control"]
    assert [call.split("/")[0] for call in calls(data)] == again


def test_training_without_weights_has_failed(data: Path) -> None:
    with pytest.raises(StudyError, match=r"2 of 2 steps failed.* ended with status 2 \(ls: .*model\.pt"):
        one_run(data, weights="best").run()
    assert not (data.parent / "out" / "index.html").exists()


def test_other_settings_of_a_training_are_refused_and_of_an_evaluation_done_again(data: Path) -> None:
    # nothing was trained with these
    one_run(data, dry_run=True, budget={"max_epochs": 3, "decay_start": 1, "epoch_samples": 5}).run()
    one_run(data).run()
    assert len(calls(data)) == 2
    with pytest.raises(StudyError, match=r"fold_0 was trained with another max_epochs: give another output_dir"):
        one_run(data, budget={"max_epochs": 12, "decay_start": 4, "epoch_samples": 10}).run()
    split = data.parent / "out" / "splits" / "fold_0.json"
    before = split.read_text()
    (data / "P01_a" / "P01_a_t1.nii").unlink()
    with pytest.raises(StudyError, match=r"fold_0 was trained with another split_studies"):
        one_run(data).run()
    assert split.read_text() == before
    (data / "P01_a" / "P01_a_t1.nii").touch()
    changed = CONFIG["evaluations"]["evaluation"] | {"overrides": {"lpips": False}}
    one_run(data, evaluations={"evaluation": changed}).run()
    assert calls(data) == ["evaluating first/seed_0/fold_0/evaluation"]


def test_what_used_weights_that_were_trained_anew_is_done_again(data: Path) -> None:
    plan = one_run(data, names=["control", "first"])
    plan.run()
    assert len(calls(data)) == 5
    (plan.directory("second", 0, 0) / "model_last.pt").unlink()
    one_run(data, names=["control", "first"]).run()
    again = ["training second", "evaluating second", "evaluating control"]
    assert [call.split("/")[0] for call in calls(data)] == again
    # by another program, whose plan did not have the others
    done = plan.directory("first", 0, 0) / "training.done"
    os.utime(done, (time.time() + 1,) * 2)
    one_run(data, names=["control"], dry_run=True).run()
    steps = [line.split("started")[0] for path in data.parent.glob("out/plan_*.sh") for line in path.open()]
    assert len(steps) == 4 and not any("first/seed_0/fold_0/training" in step for step in steps)


def test_other_weights_are_evaluated_and_a_moved_folder_is_not(data: Path) -> None:
    plan = one_run(data)
    plan.run()
    calls(data)
    (plan.directory("first", 0, 0) / "model.pt").touch()
    for weights in ("best", "last"):
        one_run(data, weights=weights).run()
        assert calls(data) == ["evaluating first/seed_0/fold_0/evaluation"]
    Path(plan.output_dir).rename(data.parent / "moved")
    one_run(data, output_dir=data.parent / "moved").run()
    assert calls(data) == []


def test_settings_of_a_step_are_in_order(data: Path) -> None:
    plan = experiments(
        data,
        minutes=3.0,
        evaluations={"evaluation": {**CONFIG["evaluations"]["evaluation"], "overrides": {"reference_methods": []}}},
    )
    config = {(name, step.path.name): step.config for name in plan.names for step in plan.steps(name, 0, 1)}
    first, second = config["first", "training"], config["second", "training"]
    # an own config stands above the common settings, the budget above both
    assert (first["bank_size"], second["bank_size"]) == (20, 10) and first["segmentation"] == "none"
    assert (first["max_epochs"], first["decay_start"], first["epoch_samples"]) == (4, 2, 10)
    assert (second["max_epochs"], second["decay_start"], second["image_size"]) == (8, 4, 64)
    # the share of the first is one half
    limit = {"_target_": "scripts.training.trainer.TimeLimit", "limit_sec": 90}
    assert first["train"]["handlers"][-1] == limit and first["resume"] is False
    folder = plan.directory("first", 0, 1)
    assert second["pretrained_path"] == str(folder / "model_last.pt") and first["output_dir"] == str(folder)
    control = config["control", "evaluation"]
    assert control["retrieval"] == "random" and control["reference_methods"] == [] != first.get("reference_methods")
    assert control["ckpt_path"] == str(plan.directory("second", 0, 1) / "model_last.pt")
    assert control["report_dir"] == str(plan.directory("control", 0, 1) / "evaluation")
    assert {one["cache_dir"] for one in config.values()} == {str(Path(plan.output_dir) / "cache")}


def test_settings_that_do_not_fit_are_refused_before_anything_runs(data: Path) -> None:
    evaluation = CONFIG["evaluations"]["evaluation"]
    for changes, message in (
        ({"settings": {"chanels": "small"}}, "There is no setting chanels: did you mean channels"),
        ({"budget": {"max_epoch": 3}}, "There is no setting max_epoch: did you mean max_epochs"),
        ({"budget": {"max_epochs": 3}}, "budget has no decay_start: give all of max_epochs, decay_start, epoch_samp"),
        ({"experiments": {"first": {"overrides": {"bank_size": "few"}}}}, "bank_size must be a whole number, got 'few"),
        ({"evaluations": {"evaluation": {**evaluation, "overrides": {"lpip": False}}}}, "no setting lpip: did you"),
    ):
        with pytest.raises(StudyError, match=message):
            one_run(data, dry_run=True, **changes).run()
    assert not (data.parent / "out").exists()
    mmgan = {"configs": ["baselines/mmgan"], "overrides": {"curriculum": None}}  # None in the config below
    one_run(data, dry_run=True, experiments={"first": mmgan}, settings={"compile": "false", "device": "cuda:9"}).run()
    config = json.loads((data.parent / "out" / "first" / "seed_0" / "fold_0" / "training.json").read_text())
    assert config["compile"] is False and config["curriculum"] is None


def test_bank_larger_than_the_training_slices_is_not_run(data: Path) -> None:
    rows = {"unet": {"configs": ["baselines/unet"]}, "bank_100": {"configs": ["ablations/bank_100"]}}
    one_run(data, experiments=rows, names=["unet", "bank_100"]).run()
    assert calls(data) == [f"{call} unet/seed_0/fold_0/{step}" for call, step in ONE_RUN]
    text = (data.parent / "out" / "tables" / "mean.md").read_text()
    assert "n/a: 40 training slices cannot fill a bank of 100" in text


def test_sets_have_their_own_seeds_and_what_is_needed_has_them_too(data: Path) -> None:
    sets = {"once": ["first"], "often": ["control"]}
    plan = one_run(data, names=["control", "first"], sets=sets, seeds={"once": [3], "often": [0, 1]})
    # the control evaluates the second's weights, which start from the first's
    assert plan.seeds_of == {"first": [0, 1, 3], "second": [0, 1], "control": [0, 1]}
    plan.run()
    assert len(calls(data)) == 3 * 2 + 2 * 2 + 2
    assert "second 2, control 2 alone" in (data.parent / "out" / "tables" / "mean.md").read_text()


def test_evaluation_is_done_for_those_that_it_names(data: Path) -> None:
    evaluations = {"evaluation": CONFIG["evaluations"]["evaluation"]}
    evaluations["task"] = {**evaluations["evaluation"], "uses": {"other_path": "first"}, "only": ["chosen"]}
    plan = one_run(
        data,
        names=["second", "fourth"],
        experiments={"first": {"evaluated": False}, "second": {}, "third": {}, "fourth": {}},
        sets={"chosen": ["second", "third"]},
        evaluations=evaluations,
        evaluate_with=["evaluation", "task"],
    )
    # the first is needed by the task alone
    steps = [f"{name} {step.path.name}" for name in plan.names for step in plan.steps(name, 0, 0)]
    assert sorted(steps) == [
        *("first training", "fourth evaluation", "fourth training"),
        *("second evaluation", "second task", "second training"),
    ]
    (task,) = [step for step in plan.steps("second", 0, 0) if step.path.name == "task"]
    assert task.config["other_path"] == str(plan.directory("first", 0, 0) / "model_last.pt")
    assert plan.directory("first", 0, 0) / "training" in task.needs


def test_untouched_patients_are_in_no_fold_with_any_of_their_studies(data: Path) -> None:
    options = {"patient_pattern": r"(P\d\d)_\w$", "folds": 3}
    splits = make_splits(data.parent / "splits", data, held_out=["P00_b"], **options)
    given = data.parent / "splits" / "untouched.json"
    untouched = splits.pop(str(given))
    for split in splits.values():
        assert sorted(study for part in split.values() for study in part) == [f"P{i:02d}_a" for i in range(1, 7)]
    # a given split is the only one
    write_whole(given, untouched)
    assert make_splits(data.parent / "final", data, split_file=given) == {f"{data.parent}/final/fold_0.json": untouched}
    for folder, changes, words in (
        (data, {"held_out": ["P99"]}, "names P99"),
        (data / "nowhere", {}, "nowhere"),
        (data, {"split_file": given, "held_out": ["P00_b"]}, "has P00 of held_out"),
        (data, {"validation_fraction": 0}, "no study for the validation"),
    ):
        with pytest.raises(StudyError, match=words):
            make_splits(data.parent / "splits", folder, **{**options, **changes})


def test_unknown_names_are_refused(data: Path) -> None:
    for changes, message in (
        ({"names": "thrid"}, "names has no thrid: choose from "),
        ({"evaluate_with": ["x"]}, "evaluate_with has no x"),
        ({"weights": "newest"}, "weights has no newest: choose from last, best"),
        ({"reference": "frist"}, "reference has no frist: choose from None, first"),
        ({"panels": ["frist"]}, "panels has no frist: choose from first"),
        ({"seeds": {"frist": [0]}}, "seeds has no frist: choose from first"),
        ({"seeds": {"second": [0]}}, "seeds gives none for control: name it or a set that has it"),
        (
            {"experiments": {"a": {"uses": {"x": "b"}}, "b": {"uses": {"x": "a"}}}, "names": "a"},
            "a and b need each other",
        ),
    ):
        with pytest.raises(StudyError, match=message):
            experiments(data, **changes)
    with pytest.raises(StudyError, match="No config of the experiment a has pretrained_path"):
        experiments(data, names="a", experiments={"a": {"uses": {"pretrained_path": "b"}}, "b": {}}).run()
    assert calls(data) == []


# ------------------------------------------------------------------------------------------------------------ configs
def test_recipe_makes_its_weights_phase_by_phase_and_evaluates_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = ConfigParser()
    parser.read_config(config_files("experiments", "recipe"))
    names = ("base", "evaluation_base", "budget", "names", "experiments", "evaluations")
    content = {name: parser.get_parsed_content(name) for name in names}
    plan = experiments(data, None, seeds=[0], settings={"lpips_weights": "alexnet.pth"}, **content)
    assert set(plan._too_large(40)) == {"bank", "joined", "sscf"}
    monkeypatch.setattr(plan, "prepare", lambda: 1000)
    plan.run()
    phases = ["unet_half_size training", "unet training", "backbone training", "whole training"]
    phases += ["full_size training", "bank building", "joined joining"]
    done = [f"{step.split('/')[0]} {run_id}" for run_id, step in (call.split(maxsplit=1) for call in calls(data))]
    assert sorted(done) == sorted([*phases, "unet evaluating", "sscf evaluating"])
    assert all(done.index(first) < done.index(second) for first, second in itertools.pairwise(phases[2:]))

    def config(name: str, step: str = "training") -> dict[str, Any]:
        return json.loads((data.parent / "out" / name / "seed_0" / "fold_0" / f"{step}.json").read_text())

    def made(name: str, file: str = "model_last.pt") -> str:
        return str(data.parent / "out" / name / "seed_0" / "fold_0" / file)

    for name, file in (("backbone", "1_backbone"), ("whole", "2_whole"), ("full_size", "3_full_size")):
        overlay = json.loads((BUNDLE_ROOT / "configs" / "recipe" / f"{file}.json").read_text())
        lengths = {key: overlay[key] for key in ("max_epochs", "decay_start")}
        assert config(name).items() >= {"batch_size": 4, "lpips_weights": "alexnet.pth", **lengths}.items()
    assert config("whole")["pretrained_path"] == made("backbone")
    assert config("full_size")["pretrained_path"] == made("whole")
    assert config("unet")["pretrained_path"] == made("unet_half_size")
    bank, joined = config("bank", "building"), config("joined", "joining")
    assert (bank["source_path"], bank["site_path"]) == (made("full_size"), made("bank", "model.pt"))
    assert (bank["bank_size"], bank["slice_choice"], bank["half"]) == (80, "brain", True)
    assert (joined["source_path"], joined["companion_path"]) == (made("bank", "model.pt"), made("unet"))
    assert joined["half"] and config("sscf", "evaluation")["ckpt_path"] == made("joined", "model.pt")
    assert "from_weights" in str(config("sscf", "evaluation")["network_def"]["_target_"])


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


# ------------------------------------------------------------------------------------------------------------- phases
def test_training_ends_when_its_minutes_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    completed: list[int] = []

    def step(*_: object) -> None:
        now[0] += 20.0

    engine = Engine(step)
    engine.add_event_handler(Events.COMPLETED, lambda e: completed.append(e.state.iteration))
    limit = TimeLimit(60)
    now[0] = 5000.0  # what lies before the start does not count
    limit.attach(engine)
    engine.run(range(10), max_epochs=2)
    assert completed == [4]


def test_second_phase_takes_what_both_phases_have(tmp_path: Path) -> None:
    first, second = tiny_net(0, synthesis=False), tiny_net(1)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    before = {name: value.clone() for name, value in second.state_dict().items()}
    assert with_shared_weights(second, tmp_path / "first.pt") is second
    ours = dict(first.named_parameters())
    shared = set(ours) & {name for name, _ in second.named_parameters()}
    assert any("encoder" in name for name in shared) and any("segmentation" in name for name in shared)
    for name, value in second.state_dict().items():
        assert torch.equal(value, ours[name] if name in shared else before[name]), name
    save_weights(tmp_path / "other.pt", torch.nn.Linear(1, 1))
    with pytest.raises(StudyError, match="has no tensor of this network"):
        with_shared_weights(second, tmp_path / "other.pt")
    with pytest.raises(StudyError, match="There are no weights"):
        with_shared_weights(second, tmp_path / "none.pt")
    with pytest.raises(StudyError, match=r"give its model_last\.pt as pretrained_path"):
        with_shared_weights(second, None)


def test_second_stage_is_joint_training_without_the_closed_loop() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "ablations/two_stage"))
    weights = parser.get_parsed_content("loss").weights
    assert min(weights[name] for name in ("ctdl", "bce", "dice", "synthesis")) > 0
    assert parser["closed_loop"] is False


def test_sensitivity_changes_one_weight_at_a_time() -> None:
    default = json.loads((BUNDLE_ROOT / "configs" / "train.json").read_text())
    for name in {*CONFIG["sets"]["alpha"], *CONFIG["sets"]["beta"]} - {"sscf"}:
        ((weight, value),) = CONFIG["experiments"][name]["overrides"].items()
        given, usual = ([value], [default["alpha"]]) if weight == "alpha" else (value, default["beta"])
        assert sum(a != b for a, b in zip(given, usual, strict=True)) == 1
