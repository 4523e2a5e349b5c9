# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The downstream task: complete studies, replaced contrasts, Dice of every scenario, and whole runs of its configs."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import TINY_RUN, config_files, generator, tiny_run, train_in_process
from monai.bundle import ConfigParser
from torch import nn

from scripts.contrasts import SCENARIOS, StudyError, scenario_name
from scripts.data.slices import CachedStudy, PreparedSlices, SliceDataset
from scripts.evaluation.metrics import mean_of_available, zero_filling
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.weights import read_state, save_weights
from scripts.research.downstream import (
    BrainInferer,
    DownstreamScores,
    build_segmenter,
    complete_slices,
    load_segmenter,
    segmentation_batch,
    study_dice,
)

SIZE = 6
#: Configs of the evaluation of a U-Net by the downstream task.
EVALUATION = ("train", "baselines/unet", "evaluate", "downstream")
#: Classes of each region, written out here once more.
REGION_CLASSES = {"WT": {1, 2, 3}, "TC": {2, 3}, "ET": {2}}
TINY_SEGMENTER = {
    "segmenter_channels": [4, 4, 4, 8, 8, 4],
    "segmenter_epochs": 2,
    "segmenter_batch_size": 4,
    "segmenter_val_interval": 1,
    "segmenter_learning_rate": 0.01,
}


class FewStudies:
    """A cohort of three studies with two slices each: ``b`` lacks T1, ``c`` has no mask."""

    def __init__(self, directory: Path) -> None:
        self.studies = []
        for k, name in enumerate("abc"):
            (directory / name).mkdir()
            np.save(directory / name / "image.npy", np.full((2, 4, SIZE, SIZE), k, dtype=np.float16))
            np.save(directory / name / "label.npy", np.full((2, SIZE, SIZE), k, dtype=np.uint8))
            info = {
                "z": [3, 4],
                "tumor_area": [1, 0],
                "brain_fraction": [1.0, 1.0],
                "has_contrast": [True, name != "b", True, True],
                "has_mask": name != "c",
                "size": [SIZE, SIZE],
            }
            self.studies.append(CachedStudy(name, f"patient {name}", directory / name, info))

    def slices(self, part: str, **options: object) -> SliceDataset:
        assert part in ("test", "training")
        kept = self.studies if part == "test" else self.studies[1:]
        return SliceDataset(PreparedSlices(kept), **options)  # type: ignore[arg-type]


def test_studies_without_a_contrast_or_mask_are_left_out(tmp_path: Path) -> None:
    cohort = FewStudies(tmp_path)
    dataset = complete_slices(cohort, "test", choice="brain")  # type: ignore[arg-type]
    assert dataset.studies == ["a"] and len(dataset) == 2 and dataset.weights.tolist() == [3.0, 1.0]
    with pytest.raises(StudyError, match="None of 2 studies of the training part has all four contrasts and a mask"):
        complete_slices(cohort, "training")  # type: ignore[arg-type]


class Segmenter(nn.Module):
    """Logits that depend on every contrast at the voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 3, 1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn((3, 4, 1, 1), generator=generator(3)) * 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.mix(image)


#: Three slices of a study, a column of which is background, and what a network gives under each scenario.
TARGET = torch.rand((3, 4, SIZE, SIZE), generator=generator(0)) * 1.8 - 0.9
TARGET[..., 0] = -1.0
TARGET[:, 1, :, 1] = -1.0  # the brain of T1 alone is smaller
LABEL = torch.randint(0, 4, (3, 1, SIZE, SIZE), generator=generator(1)).to(torch.uint8)
LABEL[LABEL == 2] = 0  # no ET
PREDICTED = torch.rand((14, 3, 7, SIZE, SIZE), generator=generator(2)) * 1.8 - 0.9
REFERENCE_METHODS = {"mean": mean_of_available, "zero": zero_filling}


def filled_in(k: int) -> dict[str, object]:
    """The study after the network, under one scenario."""
    slices = {"target": TARGET, "label": LABEL, "shown": torch.arange(3)}
    slices |= {"has_contrast": torch.ones(4, dtype=torch.bool), "has_mask": torch.tensor(True)}
    return {"study": "s", "patient": "p", "scenario": k, "slices": slices, "pred": PREDICTED[k].permute(1, 2, 3, 0)}


def scored(path: Path, batch_size: int = 2) -> DownstreamScores:
    """Scores of all scenarios."""
    path.write_bytes(b"weights")
    scores = DownstreamScores(Segmenter(), path, REFERENCE_METHODS, batch_size)
    for k in range(len(SCENARIOS)):
        scores(filled_in(k))
    return scores


def literal_dice(images: torch.Tensor, region: str) -> float:
    """Dice of the segmenter on a stack of slices, voxel by voxel."""
    overlap = one = other = 0
    probability = torch.sigmoid(Segmenter()(images)).detach()
    for z in range(3):
        for y in range(SIZE):
            for x in range(SIZE):
                best = max(range(3), key=lambda k: float(probability[z, k, y, x]))
                brain = any(float(images[z, k, y, x]) > -1 for k in range(4))
                ours = best + 1 if brain and probability[z, best, y, x] >= 0.5 else 0
                theirs = int(LABEL[z, 0, y, x])
                one, other = one + (ours in REGION_CLASSES[region]), other + (theirs in REGION_CLASSES[region])
                overlap += ours in REGION_CLASSES[region] and theirs in REGION_CLASSES[region]
    return 2 * overlap / (one + other) if one + other else 1.0


def test_dice_of_every_scenario_equals_a_literal_loop(tmp_path: Path) -> None:
    scores = scored(tmp_path / "s.pt")
    rows = scores.rows
    assert scores.regions == {"WT": 1, "TC": 1}
    assert len(rows) == (1 + 3 * 14) * 3 and {(r["study"], r["patient"]) for r in rows} == {("s", "p")}
    values = {(r["method"], r["scenario"], r["of"]): r["value"] for r in rows}
    for region in REGION_CLASSES:
        real = literal_dice(TARGET, region)
        assert values["real", "FLAIR+T1+T1ce+T2", region] == pytest.approx(real)
    for s, scenario in enumerate(SCENARIOS):
        given = [k for k in range(4) if scenario[k]]
        for method in ("network", *REFERENCE_METHODS):
            filled = TARGET.clone()
            for z in range(3):
                brain = torch.stack([TARGET[z, k] > -1 for k in given]).any(dim=0)
                for k in set(range(4)) - set(given):
                    mean = sum(TARGET[z, j] for j in given) / len(given)
                    made = {"network": PREDICTED[s, z, k], "mean": mean, "zero": torch.full_like(mean, -1.0)}[method]
                    filled[z, k] = torch.where(brain, made, -1.0)
            for region in REGION_CLASSES:
                key = (method, scenario_name(scenario), region)
                assert values[key] == pytest.approx(literal_dice(filled, region)), key
    assert 0 < values["real", "FLAIR+T1+T1ce+T2", "WT"] < 1


def test_the_batch_size_changes_nothing_and_background_has_no_tumor(tmp_path: Path) -> None:
    assert scored(tmp_path / "s.pt", batch_size=1).rows == scored(tmp_path / "s.pt", batch_size=8).rows
    probabilities = BrainInferer(2)(TARGET, lambda images: torch.full_like(images[:, :3], 9.0))
    assert (probabilities[..., 0] == 0).all() and (probabilities[..., 1:] > 0.99).all()


def test_segmenter_is_refused_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    dataset = FewStudies(tmp_path / "cohort").slices("test")
    path, preprocessing = tmp_path / "segmenter.pt", {"image_size": 32, "scaling": "brain"}
    channels = [4, 4, 4, 4, 4, 4]
    with pytest.raises(StudyError, match="There is no segmenter"):
        load_segmenter(path, "cpu", dataset, preprocessing)
    network = build_segmenter(2, channels).eval()
    arguments = {"spatial_dims": 2, "channels": channels}
    settings = {"arguments": arguments, "preprocessing": preprocessing, "training_patients": [1, 2]}
    save_weights(path, network, settings)
    loaded = load_segmenter(path, "cpu", dataset, preprocessing)
    image = torch.rand((1, 4, 32, 32), generator=generator(8))
    assert torch.equal(loaded(image), network(image)) and not loaded.training
    with pytest.raises(StudyError, match="image_size is 32, not 64"):
        load_segmenter(path, "cpu", dataset, preprocessing | {"image_size": 64})
    save_weights(path, network, settings | {"training_patients": [1, int(dataset.patients[0])]})
    with pytest.raises(StudyError, match="trained on 1 of the patients"):
        load_segmenter(path, "cpu", dataset, preprocessing)


def test_segmenter_loss_of_the_config_is_dice_plus_binary_cross_entropy() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "downstream_train"))
    logits = torch.randn((2, 3, 4, 4), generator=generator(9))
    truth = (torch.rand((2, 3, 4, 4), generator=generator(10)) > 0.6).float()
    dice = bce = 0.0
    for k in range(3):
        overlap = total = 0.0
        for value, true in zip(logits[:, k].flatten().double(), truth[:, k].flatten().double(), strict=True):
            p = 1 / (1 + (-value).exp())
            overlap, total = overlap + float(p * true), total + float(p + true)
            bce -= float(true * p.log() + (1 - true) * (1 - p).log()) / truth.numel()
        dice += (1 - (2 * overlap + 1e-5) / (total + 1e-5)) / 3
    assert float(parser.get_parsed_content("loss")(logits, truth)) == pytest.approx(dice + bce, abs=1e-5)


def test_segmenter_learns_classes_that_the_contrasts_show() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "downstream_train"))
    label = torch.zeros((2, 1, 32, 32), dtype=torch.uint8)
    label[:, :, 4:16, 4:16], label[:, :, 8:14, 8:14], label[:, :, 18:28, 6:20] = 1, 2, 3
    contrasts = torch.cat([label == k for k in range(4)], dim=1).float() - 0.5
    image, truth = segmentation_batch({"target": contrasts, "label": label})
    assert torch.equal(truth.argmax(dim=1) + truth.any(dim=1), label[:, 0].long())
    torch.manual_seed(0)
    network, loss = build_segmenter(2, [8, 8, 8, 8, 8, 8]), parser.get_parsed_content("loss")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss(network(image), truth).backward()
        optimizer.step()
    probabilities = BrainInferer()(image, network.eval())
    assert float(study_dice({"pred": probabilities, "label": truth})) > 0.9


def test_rate_of_the_segmenter_falls_to_zero_and_an_extended_training_has_its_own() -> None:
    def build(epochs: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        parser = ConfigParser()
        parser.read_config(config_files("train", "downstream_train"))
        parser.update(TINY_SEGMENTER | {"segmenter_epochs": epochs, "device": "cpu"})
        return parser.get_parsed_content("optimizer"), parser.get_parsed_content("lr_scheduler")

    (optimizer, scheduler), (extended, later) = build(4), build(8)
    reference = torch.optim.lr_scheduler.PolynomialLR(torch.optim.SGD([torch.zeros(1)], lr=0.01), 4, 0.9)
    for _ in range(4):
        assert scheduler.get_last_lr() == pytest.approx(reference.get_last_lr())
        optimizer.step()
        scheduler.step()
        reference.optimizer.step()
        reference.step()
    assert scheduler.get_last_lr() == [0]
    extended.load_state_dict(optimizer.state_dict())
    later.load_state_dict(scheduler.state_dict())
    assert extended.param_groups[0]["lr"] == later.get_last_lr()[0] == 0.01 * 0.5**0.9


def test_configs_train_a_segmenter_and_test_a_network_with_it(tmp_path: Path, phantom_cohort: Path) -> None:
    segmenter = tmp_path / "segmenter.pt"
    overrides = tiny_run(phantom_cohort, tmp_path, segmenter_path=str(segmenter))
    workflow = train_in_process(config_files("train", "downstream_train"), {**overrides, **TINY_SEGMENTER})
    settings = read_state(tmp_path / "segmenter.pt")[1]
    assert len(settings["training_patients"]) == 3
    assert settings["arguments"]["channels"] == TINY_SEGMENTER["segmenter_channels"]
    with (tmp_path / "segmenter" / "validation.csv").open() as file:
        validated = [float(row["dice"]) for row in csv.DictReader(file)]
    assert len(validated) == 2
    best = workflow.parser.get_parsed_content("best_model")
    assert best.best == pytest.approx(max(validated)) and best.epoch == validated.index(max(validated)) + 1
    files = {path.name for path in (tmp_path / "segmenter" / "checkpoints").iterdir()}
    assert files == {"checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "config.json"}

    save_weights(tmp_path / "model.pt", PlainUNet(2, TINY_RUN["channels"]))  # type: ignore[arg-type]
    train_in_process(config_files(*EVALUATION), overrides)
    report = json.loads((tmp_path / "downstream" / "metrics.json").read_text())
    with (tmp_path / "downstream" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = {"real", "network", "mean_of_available", "nearest_contrast", "zero_filling"}
    assert {row["method"] for row in rows} == methods and len(rows) == (1 + 14 * 4) * 3
    assert {(row["protocol"], row["score"]) for row in rows} == {("downstream", "dice")}
    metadata = report["metadata"]
    assert metadata["studies"] == json.loads((tmp_path / "split.json").read_text())["test"]
    assert hashlib.sha256(segmenter.read_bytes()).hexdigest() in metadata["protocols"]["downstream"]
    overall = {e["method"]: e["mean"] for e in report["summary"] if (e["group"], e["of"]) == ("all", "all")}
    assert set(overall) == methods
    mean = sum(float(r["value"]) for r in rows if r["method"] == "network") / 42
    assert overall["network"] == pytest.approx(mean)

    # the patients of its training are refused
    with pytest.raises(StudyError, match="trained on 3 of the patients"):
        train_in_process(config_files(*EVALUATION), overrides | {"evaluated_part": "training"})
