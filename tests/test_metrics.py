# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Scores against independent implementations, closed forms and literal loops."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from builders import generator
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from scripts.contrasts import REGIONS, SCENARIOS, label_map, scenario_name
from scripts.evaluation.metrics import (
    MAX_PSNR,
    ScenarioScores,
    fill_background,
    mean_of_available,
    reference_output,
    zero_filling,
)

SIZE = (24, 20)
#: Position of the scenario "T1ce+T2", which leaves FLAIR and T1 to synthesize.
T1CE_T2 = [scenario_name(row) for row in SCENARIOS].index("T1ce+T2")


def make_batch(number: int, seed: int = 0, scenario: int | None = None) -> dict[str, torch.Tensor]:
    """Random predictions of random slices, some without a contrast, a mask or any tumor."""
    draw = generator(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draw)

    target = uniform(number, 4, *SIZE) * 1.9 - 0.95
    target[..., :3, :] = -1.0  # a border without brain
    has_contrast = uniform(number, 4) < 0.8
    has_contrast[0] = True
    target = torch.where(has_contrast.view(number, 4, 1, 1), target, -1.0)
    chosen = torch.randint(0, len(SCENARIOS), (number,), generator=draw)
    if scenario is not None:
        chosen = torch.full_like(chosen, scenario)
    label = torch.randint(0, 4, (number, 1, *SIZE), generator=draw)
    label = torch.where(uniform(number, 1, 1, 1) < 0.3, 0, label)
    return {
        "pred": torch.cat([(target + 0.4 * uniform(number, 4, *SIZE) - 0.2), uniform(number, 3, *SIZE) ** 3], dim=1),
        "target": target,
        "unclipped": target + (target > 0.8) * 0.6,  # what is clipped in the target
        "label": label.to(torch.uint8),
        "available": torch.tensor(SCENARIOS, dtype=torch.bool)[chosen] & has_contrast,
        "has_contrast": has_contrast,
        "has_mask": uniform(number) < 0.8,
        "study_index": torch.randint(0, 3, (number,), generator=draw),
        "scenario": chosen,
    }


def complete_batch(number: int, scenario: int = T1CE_T2) -> dict[str, torch.Tensor]:
    """Slices of complete studies with a mask, one study each, under one scenario."""
    batch = make_batch(number, scenario=scenario)
    batch["target"] = batch["unclipped"] = torch.rand((number, 4, *SIZE), generator=generator(9)) * 1.9 - 0.95
    batch["pred"][:, :4] = batch["target"]
    batch["has_contrast"] = torch.ones(number, 4, dtype=torch.bool)
    batch["available"] = torch.tensor(SCENARIOS, dtype=torch.bool)[batch["scenario"]]
    batch["has_mask"] = torch.ones(number, dtype=torch.bool)
    batch["study_index"] = torch.arange(number)
    return batch


def score(*batches: dict[str, torch.Tensor], studies: int = 3, **options: object) -> ScenarioScores:
    metric = ScenarioScores([f"study{i}" for i in range(studies)], **options)  # type: ignore[arg-type]
    for batch in batches:
        metric.update([batch[key] for key in metric.required_output_keys])
    return metric


def literal_pair(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR and SSIM of a slice in [-1, 1] with the defaults of scikit-image, in the range of the true slice."""
    prediction = np.clip(prediction.astype(np.float64), -1, 1)
    low, high = truth.min(), truth.max()
    t, g = (truth.astype(np.float64) - low) / (high - low), np.clip((prediction - low) / (high - low), 0, 1)
    return peak_signal_noise_ratio(t, g, data_range=1), structural_similarity(t, g, data_range=1)


# ------------------------------------------------------------------------------------------------- single slices
def test_identical_images_have_the_largest_scores() -> None:
    means = score(complete_batch(3)).compute()
    assert means["psnr"] == MAX_PSNR == 100.0
    assert means["ssim"] == pytest.approx(1.0, abs=1e-6)


def test_predictions_out_of_the_range_of_the_true_slice_count_as_the_nearest_value_in_it() -> None:
    batch = complete_batch(3)
    batch["unclipped"] = batch["target"] = torch.full_like(batch["target"], 0.0)
    batch["target"][..., 0, :2] = torch.tensor([-0.5, 0.5])
    batch["pred"][:, :4] = torch.where(batch["target"] == 0, 7.0, batch["target"])
    share = 1 - 2 / (SIZE[0] * SIZE[1])
    assert score(batch).compute()["psnr"] == pytest.approx(-20 * math.log10(0.5) - 10 * math.log10(share), abs=1e-4)


def test_slice_of_one_value_is_not_scored() -> None:
    batch = complete_batch(3)
    batch["unclipped"] = batch["target"].clone()
    batch["unclipped"][1, 0] = 0.3
    assert score(batch).tables()["psnr"][:, T1CE_T2, 0].isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------- segmentation
def one_region_batch(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    """One slice whose predicted and annotated class maps are given."""
    batch = complete_batch(1)
    batch["pred"][:, 4:] = torch.stack([(ours == k + 1).float() for k in range(3)]).unsqueeze(0)
    batch["label"] = theirs.to(torch.uint8).view(1, 1, *SIZE)
    return batch


def class_map(**areas: slice) -> torch.Tensor:
    out = torch.zeros(SIZE, dtype=torch.int64)
    for name, rows in areas.items():
        out[rows, 4:14] = ("ED", "ET", "NET").index(name) + 1
    return out


def test_dice_where_a_region_is_empty() -> None:
    edema = class_map(ED=slice(4, 8))
    both = score(one_region_batch(edema, edema)).compute()
    assert (both["dice_WT"], both["dice_TC"], both["dice_ET"]) == (1.0, 1.0, 1.0)
    one = score(one_region_batch(class_map(ET=slice(4, 8)), edema)).compute()
    assert (one["dice_WT"], one["dice_TC"], one["dice_ET"]) == (1.0, 0.0, 0.0)
    none = score(one_region_batch(torch.zeros(SIZE, dtype=torch.int64), edema)).compute()
    assert (none["dice_WT"], none["dice_TC"], none["dice_ET"]) == (0.0, 1.0, 1.0)


def test_study_without_a_mask_has_no_dice() -> None:
    edema = class_map(ED=slice(4, 8))
    unknown = one_region_batch(edema, torch.zeros(SIZE, dtype=torch.int64))
    unknown["has_mask"][:] = False
    unknown["study_index"][:] = 1
    metric = score(one_region_batch(edema, edema), unknown)
    assert metric.tables()["dice"][1].isnan().all()
    assert metric.compute()["dice_WT"] == 1.0
    assert math.isnan(score(unknown).compute()["dice"])


# ---------------------------------------------------------------------------------------------- studies together
def literal_scores(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """All means by loops over slices, studies, targets, scenarios."""
    images: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    voxels: dict[tuple, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for i in range(len(batch["scenario"])):
        scenario, study = int(batch["scenario"][i]), int(batch["study_index"][i])
        given = [k for k in range(4) if SCENARIOS[scenario][k]]
        if not all(bool(batch["has_contrast"][i, k]) for k in given):
            continue
        brain = np.zeros(SIZE, bool)
        for k in given:
            brain |= batch["target"][i, k].numpy() > -1
        for k in range(4):
            if k not in given and bool(batch["has_contrast"][i, k]):
                prediction = np.where(brain, batch["pred"][i, k].numpy(), -1.0)
                images[scenario, k, study].append(literal_pair(prediction, batch["unclipped"][i, k].numpy()))
        if bool(batch["has_mask"][i]):
            classes = batch["pred"][i, 4:].numpy()
            ours = np.where(classes.max(axis=0) < 0.5, 0, classes.argmax(axis=0) + 1)
            theirs = batch["label"][i, 0].numpy()
            for name, members in REGIONS.items():
                of = [("ED", "ET", "NET").index(m) + 1 for m in members]
                voxels[name, scenario, study].append((np.isin(ours, of), np.isin(theirs, of)))
    out = {}
    for j, name in enumerate(("psnr", "ssim")):
        by_scenario = []
        for scenario in sorted({key[0] for key in images}):
            by_target = []
            for target in sorted({key[1] for key in images if key[0] == scenario}):
                by_study = [
                    np.mean([pair[j] for pair in v]) for key, v in images.items() if key[:2] == (scenario, target)
                ]
                by_target.append(np.mean(by_study))
            by_scenario.append(np.mean(by_target))
        out[name] = float(np.mean(by_scenario))
    for name in REGIONS:
        by_scenario = []
        for scenario in sorted({key[1] for key in voxels}):
            by_study = []
            for key, pairs in voxels.items():
                if key[:2] == (name, scenario):
                    ours, theirs = (np.stack(part) for part in zip(*pairs, strict=True))
                    both = ours.sum() + theirs.sum()
                    by_study.append(2 * (ours & theirs).sum() / both if both else 1.0)
            by_scenario.append(np.mean(by_study))
        out[f"dice_{name}"] = float(np.mean(by_scenario))
    out["dice"] = float(np.mean([out[f"dice_{name}"] for name in REGIONS]))
    return out


def test_means_are_over_slices_then_studies_then_targets_then_scenarios() -> None:
    batch = make_batch(90, seed=1)
    expected = literal_scores(batch)
    means = score(batch).compute()
    assert set(means) == set(expected)
    for name, value in expected.items():
        assert means[name] == pytest.approx(value, abs=1e-4), name


def test_batches_add_up_to_one_large_batch() -> None:
    batch = make_batch(40, seed=2)
    parts = [
        {key: value[rows] for key, value in batch.items()} for rows in (slice(0, 13), slice(13, 14), slice(14, 40))
    ]
    whole, apart = score(batch), score(*parts)
    for name, table in whole.tables().items():
        torch.testing.assert_close(apart.tables()[name], table, rtol=1e-6, atol=1e-7, equal_nan=True)
    apart.reset()
    assert all(bool(table.isnan().all()) for table in apart.tables().values())


def test_contrast_that_a_study_lacks_is_neither_scored_nor_taken_for_given() -> None:
    batch = complete_batch(3)
    batch["pred"][:, :4] += 0.1
    for missing in (0, 2):  # of study 1 a target of the scenario is missing, of study 2 one of its given contrasts
        batch["has_contrast"][1 + missing // 2, missing] = False
        batch["target"][1 + missing // 2, missing] = batch["unclipped"][1 + missing // 2, missing] = float("nan")
    batch["available"] &= batch["has_contrast"]
    metric = score(batch)
    scored = ~metric.tables()["psnr"][:, T1CE_T2].isnan()
    assert scored.tolist() == [[True, True, False, False], [False, True, False, False], [False] * 4]
    assert metric.tables()["dice"][:, T1CE_T2].isnan().all(dim=1).tolist() == [False, False, True]
    assert metric.compute()["psnr"] == pytest.approx(-20 * math.log10(0.05 / 0.95), abs=0.2)


def test_scores_carry_the_prefix_and_have_dice_where_it_is_wanted() -> None:
    batch = complete_batch(2)
    assert "x_dice_WT" in score(batch, prefix="x_").compute()
    assert set(score(batch, with_dice=False, prefix="x_").compute()) == {"x_psnr", "x_ssim"}


# ---------------------------------------------------------------------------------------------------- the parts
def test_label_map_takes_the_likeliest_class_from_one_half_on() -> None:
    probabilities = torch.tensor([[0.2, 0.49, 0.1], [0.5, 0.1, 0.2], [0.6, 0.7, 0.65], [0.1, 0.2, 0.9], [0, 0, 0]])
    classes = label_map(probabilities.T.reshape(1, 3, 5, 1))
    assert classes.dtype == torch.uint8 and classes.shape == (1, 1, 5, 1)
    assert classes.flatten().tolist() == [0, 1, 2, 3, 0]


def test_background_is_outside_all_available_brains() -> None:
    inputs = torch.full((1, 4, 1, 4), -1.0)
    inputs[0, 0, 0, 0] = 0.5  # brain of an available contrast
    inputs[0, 1, 0, 1] = -0.99  # of another one, however dark
    inputs[0, 2, 0, 2] = 0.5  # of a missing one: not known
    available = torch.tensor([[True, True, False, False]])
    filled = fill_background(torch.full((1, 4, 1, 4), 0.3), inputs, available)
    assert torch.equal(filled, torch.tensor([0.3, 0.3, -1.0, -1.0]).expand(1, 4, 1, 4))


def test_floors() -> None:
    target = torch.rand((2, 4, *SIZE), generator=generator(0))
    target[1, 2] = float("nan")
    available = torch.tensor([[True, False, True, True], [False, True, False, False]])
    mean = mean_of_available(target, available)
    assert mean.shape == target.shape
    for k in range(4):
        torch.testing.assert_close(mean[0, k], (target[0, 0] + target[0, 2] + target[0, 3]) / 3)
        assert torch.equal(mean[1, k], target[1, 1])
    assert torch.equal(zero_filling(target, available), torch.full_like(target, -1.0))


def test_floor_takes_the_place_of_the_images_and_has_no_mask() -> None:
    batch = make_batch(5)
    before = batch["pred"].clone()
    output = reference_output(mean_of_available)(batch)
    assert torch.equal(output["pred"][:, :4], mean_of_available(batch["target"], batch["available"]))
    assert float(output["pred"][:, 4:].abs().sum()) == 0 and torch.equal(batch["pred"], before)
    assert all(output[key] is batch[key] for key in batch if key != "pred")
