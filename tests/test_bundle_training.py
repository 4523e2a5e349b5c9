# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Whole runs of the training side, as a user starts them: train, evaluate, fine-tune, several processes, bad data."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import (
    BUNDLE_ROOT,
    TINY_CHANNELS,
    assert_same,
    bundle_command,
    config_files,
    run_bundle,
    run_python,
    tiny_run,
    train_in_process,
)
from monai.bundle import ConfigParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.contrasts import StudyError, find_study_error
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.weights import network_from_weights, read_state, save_weights

ONE_EPOCH = {"max_epochs": 1, "decay_start": 1, "val_interval": 1}
REPOSITORY = BUNDLE_ROOT.parent


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bundle_files() -> set[Path]:
    return {*BUNDLE_ROOT.glob("*"), *BUNDLE_ROOT.glob("models/*")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, phantom_cohort: Path) -> Path:
    """Output folder of one epoch, started in the root of the repository."""
    output_dir = tmp_path_factory.mktemp("trained")
    overrides = tiny_run(phantom_cohort, output_dir, bundle_root="sscf_bundle", **ONE_EPOCH)
    before = bundle_files()
    config = ["sscf_bundle/configs/train.json"]
    status, printed = run_bundle("training", config, overrides, output_dir / "log.txt", cwd=REPOSITORY)
    assert status == 0, printed
    assert bundle_files() == before  # all paths were given, so nothing is written elsewhere
    return output_dir


def test_training_from_the_repository_root_writes_models_scores_and_split(trained: Path) -> None:
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"checkpoint_epoch=1.pt", "config.json"}
    config = json.loads((trained / "checkpoints" / "config.json").read_text())
    assert (
        config["image_size"] == 64 and config["learning_rate"] == 2e-4 and config["train"]["trainer"]["amp"] == "@amp"
    )
    # one epoch was validated, so the best model is the last one
    assert_same(load(trained / "model.pt"), load(trained / "model_last.pt"))
    model = load(trained / "model.pt")
    assert all(isinstance(value, torch.Tensor) for value in model.values())
    assert bool(model["bank_present"].all()) and model["bank_key"].shape[0] == 8
    (row,) = read_csv(trained / "validation.csv")
    scores = {name: float(value) for name, value in row.items()}
    assert scores["epoch"] == 1 and scores["psnr"] > scores["zero_filling_psnr"] > 0
    assert {"ssim", "dice_WT", "mean_of_available_psnr"} <= set(scores)
    split = json.loads((trained / "split.json").read_text())
    assert {part: len(studies) for part, studies in split.items()} == {"training": 3, "validation": 1, "test": 1}
    listed = json.loads((trained / "bank_slices.json").read_text())
    assert len(listed) == 8 and {entry["study"] for entry in listed} == set(split["training"])
    assert not (trained / "failures.json").exists()


def test_evaluation_scores_the_test_part_and_its_floors(trained: Path, phantom_cohort: Path) -> None:
    overrides = tiny_run(phantom_cohort, trained, lpips=False, protocols=["per_slice"])
    train_in_process(config_files("train", "evaluate"), overrides)
    report = json.loads((trained / "evaluation" / "metrics.json").read_text())
    (test_study,) = json.loads((trained / "split.json").read_text())["test"]
    assert report["metadata"]["studies"] == [test_study] and report["metadata"]["part"] == "test"
    means = {
        (entry["method"], entry["score"]): entry["mean"]
        for entry in report["summary"]
        if (entry["protocol"], entry["region"], entry["group"]) == ("per_slice", "whole", "all")
    }
    methods = {"network", "mean_of_available", "nearest_contrast", "zero_filling"}
    assert set(means) == {(method, score) for method in methods for score in ("psnr", "ssim", "nmse")}
    # black images are the worst reference_method; every score is a number
    assert means["zero_filling", "psnr"] < min(means[method, "psnr"] for method in methods - {"zero_filling"})
    assert all(value == value for value in means.values())
    rows = read_csv(trained / "evaluation" / "scores.csv")
    # 28 targets over the 14 scenarios; WT, TC and ET of one method, by slice those that there are
    whole = [row for row in rows if row["region"] == "whole" and row["score"] == "psnr"]
    assert len(whole) == 28 * len(methods)
    assert len([row for row in rows if row["protocol"] == "segmentation"]) == 14 * 3
    assert {row["study"] for row in rows} == {test_study}


def test_patients_of_the_bank_are_refused_by_the_evaluation(trained: Path, phantom_cohort: Path) -> None:
    overrides = tiny_run(phantom_cohort, trained, evaluated_part="training", lpips=False)
    with pytest.raises(StudyError, match="3 of the evaluated patients are in the memory bank"):
        train_in_process(config_files("train", "evaluate"), overrides)


def test_evaluation_needs_training_studies_for_the_nearest_contrast_alone(phantom_cohort: Path, tmp_path: Path) -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "evaluate"))
    parser.update(tiny_run(phantom_cohort, tmp_path, split_fractions=[0, 0, 1], reference_methods=["zero_filling"]))
    assert list(parser.get_parsed_content("evaluation#reference_methods")) == ["zero_filling"]
    parser["reference_methods"] = ["nearest_contrast"]
    parser.parse(reset=True)
    with pytest.raises(RuntimeError) as refused:
        parser.get_parsed_content("evaluation#reference_methods")
    told = str(find_study_error(refused.value))
    assert "The training part of the split has no study" in told and "or leave nearest_contrast out" in told


def test_fine_tuning_starts_from_the_trained_weights(trained: Path, tmp_path: Path, phantom_cohort: Path) -> None:
    # the network is that of the weights, whatever train.json says
    changes = {"pretrained_path": str(trained / "model.pt"), "channels": "base", **ONE_EPOCH}
    overrides = tiny_run(phantom_cohort, tmp_path, **changes)
    with pytest.raises(StudyError, match=r"does not fit \(image_size is 64, not 80\)"):
        train_in_process(config_files("train", "finetune"), overrides | {"image_size": 80})
    # with a rate of 0 the weights stay where they started, and the bank is frozen from the same slices
    train_in_process(config_files("train", "finetune"), overrides | {"learning_rate": 0.0})
    assert_same(load(tmp_path / "model.pt"), load(trained / "model.pt"))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "model.pt").unlink()
    train_in_process(config_files("train", "finetune"), overrides)
    ours, theirs = load(tmp_path / "model.pt"), load(trained / "model.pt")
    moved = max(
        float((ours[k] - theirs[k]).abs().max()) for k in ours if ours[k].is_floating_point() and "bank" not in k
    )
    assert 0 < moved < 0.01


def test_what_was_measured_with_the_network_is_left_out_of_another_one_with_a_warning(
    trained: Path, tmp_path: Path, phantom_cohort: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, network = tmp_path / "source.pt", network_from_weights(trained / "model.pt")
    measured = {"correction": {"patients": 3, "scenarios": {}}, "trust": {"studies": 9}, "intensities": {"studies": 3}}
    save_weights(source, network, measured)
    assert not caplog.records
    changes = {"source_path": str(source), "site_path": str(tmp_path / "site.pt"), "pretrained_path": str(source)}
    fractions = {"build_bank": [1.0, 0.0, 0.0], "finetune": [0.6, 0.2, 0.2]}
    for config, written in (("build_bank", "site.pt"), ("finetune", "model_last.pt")):
        known = json.loads(Path(config_files(config)[0]).read_text())
        overrides = tiny_run(phantom_cohort, tmp_path, split_fractions=fractions[config], **ONE_EPOCH)
        overrides |= {name: value for name, value in changes.items() if name in known}
        caplog.clear()
        (tmp_path / "split.json").unlink(missing_ok=True)
        train_in_process(config_files("train", config), overrides)
        settings = read_state(tmp_path / written)[1]
        assert not {"correction", "trust"} & set(settings) and settings["intensities"]["studies"] in (3, 5)
        (told,) = {r.getMessage() for r in caplog.records if "Left out" in r.getMessage()}
        assert told.endswith("source.pt: correction and trust; run correcting and calibrating with the new weights.")


def test_bank_of_a_site_is_built_without_training(trained: Path, tmp_path: Path, phantom_cohort: Path) -> None:
    paths = {"source_path": str(trained / "model.pt"), "site_path": str(tmp_path / "site.pt")}
    overrides = tiny_run(phantom_cohort, tmp_path, split_fractions=[1.0, 0.0, 0.0], **paths)
    theirs = load(trained / "model.pt")
    for changes in ({}, {"bank_size": 12, "half": True}):
        train_in_process(config_files("train", "build_bank"), {**overrides, **changes})
        ours = load(tmp_path / "site.pt")
        assert len(ours["bank_patient"]) == changes.get("bank_size", 8)
        assert len(set(ours["bank_patient"].tolist())) == 5 and len(set(theirs["bank_patient"].tolist())) == 3
        network = network_from_weights(tmp_path / "site.pt")
        for name, value in network.named_parameters():
            assert value.dtype == torch.float32
            assert torch.equal(value, theirs[name].to(ours[name].dtype).float()), name
    assert any(value.dtype == torch.float16 for value in ours.values())
    with pytest.raises(StudyError, match=r"cannot have a bank of another size \(.*'bank_size'"):
        save_weights(tmp_path / "unet.pt", PlainUNet(2, TINY_CHANNELS))
        network_from_weights(tmp_path / "unet.pt", bank_size=12)
    assert (tmp_path / "site.pt").stat().st_size < (trained / "model.pt").stat().st_size


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_tracks_training_and_evaluation(tmp_path: Path, phantom_cohort: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    overrides = tiny_run(phantom_cohort, tmp_path, tracking="mlflow", **ONE_EPOCH)
    train_in_process(config_files("train"), overrides)
    (experiment,) = client.search_experiments(filter_string="name = 'monai_experiment'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {"iteration_loss", "train_loss", "psnr", "ssim"} <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "iteration_loss")) == 4

    train_in_process(config_files("train", "evaluate"), overrides | {"lpips": False, "protocols": ["per_slice"]})
    (later,) = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_id != run.info.run_id]
    assert later.info.status == "FINISHED"
    report = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    means = {
        "/".join(entry[part] for part in ("protocol", "region", "method", "of", "score")): entry["mean"]
        for entry in report["summary"]
        if entry["group"] == "all" and entry["method"] == "network"
    }
    for name in ("per_slice/whole/network/all/psnr", "segmentation/whole/network/WT/dice"):
        assert later.data.metrics[name] == pytest.approx(means[name])
    assert {file.path for file in client.list_artifacts(later.info.run_id)} == {"metrics.json", "scores.csv"}


@pytest.mark.slow
def test_two_processes_train_and_the_first_alone_writes(tmp_path: Path, phantom_cohort: Path) -> None:
    output_dir = tmp_path / "run"
    configs = ["configs/train.json", "configs/multi_gpu_train.json"]
    overrides = tiny_run(phantom_cohort, output_dir, log_interval=1, **ONE_EPOCH)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "-m", "monai.bundle"]
    command = [*launcher, *bundle_command("training", configs, overrides)]
    status, printed = run_python(command, tmp_path / "log.txt")
    assert status == 0, printed
    assert {path.name for path in (output_dir / "checkpoints").iterdir()} == {"checkpoint_epoch=1.pt", "config.json"}
    state = torch.load(output_dir / "checkpoints" / "checkpoint_epoch=1.pt", weights_only=True)
    # 8 samples of an epoch over two processes with two each are two steps, and the bank has all of them
    assert state["average"]["steps"] == 2 and int(state["step"]["bank.count"]) == 8
    assert len(read_csv(output_dir / "validation.csv")) == 1
    (events,) = (output_dir / "tensorboard").iterdir()  # one writer
    board = EventAccumulator(str(events)).Reload()
    tags = set(board.Tags()["scalars"])
    assert {"iteration/loss", "iteration/learning_rate", "train_loss", "validation/psnr"} <= tags
    assert [event.step for event in board.Scalars("train_loss")] == [1]
    assert [event.step for event in board.Scalars("iteration/loss")] == [1, 2]
    assert board.Scalars("iteration/learning_rate")[0].value == pytest.approx(2e-4)
    assert board.Tags()["images"] == ["validation/panel"]
    assert len(re.findall(r"Epoch\[1\] Metrics", printed)) == 1
    assert sorted(path.name for path in output_dir.glob("model*.pt")) == ["model.pt", "model_last.pt"]
    assert not list(output_dir.rglob("tmp*"))


def logged(text: str) -> list[int]:
    """Numbers of the iterations that a training logged."""
    return [int(number) for number in re.findall(r"Epoch: 1/1, Iter: (\d+)/8 -- .*loss: ", text)]


def test_where_stderr_is_no_terminal_every_few_steps_leave_a_line(tmp_path: Path, phantom_cohort: Path) -> None:
    at_terminal = (
        "import runpy, sys; sys.stderr.isatty = lambda: True; runpy.run_module('monai.bundle', None, '__main__', True)"
    )
    # a terminal has the progress bar instead
    for start, numbers in ((["-m", "monai.bundle"], [3, 6]), (["-c", at_terminal], [])):
        overrides = tiny_run(phantom_cohort, tmp_path / start[0], **ONE_EPOCH, log_interval=3) | {"epoch_samples": 16}
        command = bundle_command("training", ["configs/train.json"], overrides)
        status, printed = run_python([*start, *command], tmp_path / "log.txt")
        assert status == 0 and "Epoch[1] Metrics" in printed, printed
        assert logged(printed) == numbers


def test_broken_study_does_not_stop_the_others_but_shows_in_the_exit_status(
    trained: Path, tmp_path: Path, phantom_cohort: Path
) -> None:
    data, output_dir = Path(shutil.copytree(phantom_cohort, tmp_path / "data")), tmp_path / "run"
    broken = json.loads((trained / "split.json").read_text())["training"][0]
    volume = data / broken / f"{broken}_t1ce.nii.gz"
    volume.write_bytes(volume.read_bytes()[:3000])
    status, printed = run_bundle(
        "training", ["configs/train.json"], tiny_run(data, output_dir, **ONE_EPOCH), tmp_path / "log.txt"
    )
    assert status == 1
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    report = output_dir / "failures.json"
    assert last == f"The run is complete, but 1 of 5 studies could not be used: {report} says why."
    (failure,) = json.loads(report.read_text())
    assert failure["study"] == broken and str(volume) in failure["reason"]
    assert bool(load(output_dir / "model.pt")["bank_present"].all())
    listed = json.loads((output_dir / "bank_slices.json").read_text())
    assert broken not in {entry["study"] for entry in listed} and len({entry["study"] for entry in listed}) == 2
