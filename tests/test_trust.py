# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Checks of the input, scores and verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from builders import BUNDLE_ROOT, TINY_CHANNELS, bundle_workflow, random_entries, tiny_net
from monai.data import MetaTensor
from scipy import ndimage
from studies import PREPROCESSING, brain_volume, write_study
from torch import nn

from scripts.contrasts import CONTRAST_KEYS, NUM_CONTRASTS, StudyError
from scripts.data.datalist import find_studies
from scripts.inference.calibration import calibrate, conformal_limit, expected_scores, fit
from scripts.inference.checks import CHECKS, CheckStudyd, findings, grain, grid_of, measure, side_slope
from scripts.inference.preprocessing import inference_transforms
from scripts.inference.trust import OVERALL, TrustAssessor, read_reference, study_scores
from scripts.networks import sscf
from scripts.networks.availability import network_input
from scripts.networks.blocks import scale_statistics
from scripts.networks.memory_bank import CompiledBank
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import network_from_weights, save_weights
from scripts.research.reliability import corruptions, reliability

SPACING = (4.0, 4.0, 4.0)
ALL = [True] * NUM_CONTRASTS
SLACK = json.loads((BUNDLE_ROOT / "configs" / "calibrate.json").read_text())["statistics_slack"]
SLICES = {"number": 3, "slices_for_one": 45}
#: Rim, white matter and center as a share of the brightest, by contrast.
TISSUES = ((0.2, 0.5, 0.3), (0.3, 0.9, 0.2), (0.35, 0.8, 0.25), (0.9, 0.4, 1.0))


def head(seed: int) -> torch.Tensor:
    """Four contrasts of an ellipsoid with a rim, a few blobs and a center, on 4 mm cells."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (46, 52, 40)], indexing="ij"), -1)
    radius = np.linalg.norm(grid / (np.array([0.72, 0.85, 0.7]) * rng.uniform(0.95, 1.0)), axis=-1)
    blobs = np.cos(9 * grid[..., 0]) * np.sin(7 * grid[..., 1] + 0.3) * np.cos(8 * grid[..., 2])
    image = np.zeros((4, *radius.shape), np.float32)
    for volume, (rim, white, center) in zip(image, TISSUES, strict=True):
        volume[:] = np.where(radius > 0.8, rim, np.where(radius > 0.3, white * (1 + 0.2 * blobs), center))
        volume *= 1000 * rng.uniform(0.9, 1.1) * (1 + 0.03 * rng.standard_normal(radius.shape))
        volume[radius > 1] = 0
    return torch.from_numpy(image.clip(0))


@pytest.fixture(scope="module")
def statistics() -> dict:
    return fit([measure(head(seed), SPACING, 0, ALL) for seed in range(6)], margin=2.0, slack=SLACK)


def judged(image: torch.Tensor, statistics: dict) -> tuple[set[str], dict[str, float]]:
    found, doubts = findings(measure(image, SPACING, 0, ALL), statistics)
    return {one["code"] for one in found}, doubts


def test_sound_study_has_no_finding(statistics: dict) -> None:
    codes, doubts = judged(head(9), statistics)
    assert codes == set() and max(doubts.values()) <= 1


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("skull_left_on", "not_skull_stripped"),
        ("misregistration", "not_coregistered"),
        ("mislabelled", "mislabelled"),
        ("noise", "noisy"),
        ("resolution", "blurred"),
        ("bias_field", "uneven"),
    ],
)
def test_what_is_wrong_is_found(kind: str, code: str, statistics: dict) -> None:
    image = corruptions()[kind](head(9), 2.0 if kind == "misregistration" else 1.0, 0)
    codes, doubts = judged(image, statistics)
    assert code in codes and doubts[code] > 1


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_noise_is_measured_whatever_lies_below_it(share: float) -> None:
    """White noise gives its own standard deviation on a ramp with edges; blur of white noise is 1."""
    ramp = 500 + 4 * torch.arange(60.0)[:, None, None] + 3 * torch.arange(64.0)[:, None] + torch.zeros(60, 64, 12)
    ramp[20:40, 20:40] += 200
    draw = torch.Generator().manual_seed(0)
    top = float(ramp.flatten().kthvalue(int(0.995 * ramp.numel()))[0])
    measured = grain(ramp + share * top * torch.randn(ramp.shape, generator=draw))
    assert measured["noise"] == pytest.approx(share, rel=0.2)
    assert grain(100 + torch.rand(60, 64, 12))["blur"] == pytest.approx(1, rel=0.1)
    assert grain(ramp[:, :2])["noise"] == grain(ramp[::2, ::2] * (torch.arange(32) % 2)[:, None])["noise"] == 0
    assert grain(ramp)["noise"] < 1e-4 and grain(ramp)["blur"] == 1000


def test_sides_are_compared_along_the_axis_from_left_to_right() -> None:
    volume = np.exp(np.linspace(-0.3, 0.3, 30))[:, None, None] * np.ones((30, 20, 10))
    assert side_slope(volume, 0) == pytest.approx(np.linspace(-0.3, 0.3, 30).std())
    assert side_slope(volume, 1) == pytest.approx(0) and side_slope(volume[:1], 0) == 0
    sagittal = torch.tensor([[0.0, 0, -3, 9], [2, 0, 0, 9], [0, -1, 0, 9], [0, 0, 0, 1]])
    assert grid_of(sagittal) == ([2.0, 1.0, 3.0], 2)


def test_registration_is_advised_where_it_was_not_done(statistics: dict) -> None:
    measured = measure(corruptions()["misregistration"](head(9), 2.0, 0), SPACING, 0, ALL)
    for registered, advice in ((False, "give --register True"), (True, "although it was registered: use another tool")):
        found, _ = findings(measured, statistics, registered)
        found = [f["finding"] for f in found if f["code"] == "not_coregistered"]
        assert found and all(advice in sentence for sentence in found)
    steps = inference_transforms(checks=True, register=lambda fixed, moving: moving.affine).transforms
    assert [step.registered for step in steps if isinstance(step, CheckStudyd)] == [True]


def test_brain_masks_that_differ_are_no_movement(statistics: dict) -> None:
    image = head(9)
    image[1][~torch.from_numpy(ndimage.binary_erosion(image[1].numpy() > 0, iterations=4))] = 0
    measured = measure(image, SPACING, 0, ALL)
    assert measured["pairs"][0, 1][0] < statistics["limits"]["dice"]
    assert "not_coregistered" not in judged(image, statistics)[0]


def test_a_limit_below_0_of_studies_that_every_movement_makes_worse_is_a_limit_too() -> None:
    studies = [{**measure(head(seed), SPACING, 0, ALL), "pairs": {(0, 1): (1.0, -0.2 - 0.1 * seed)}} for seed in (0, 1)]
    worse = fit(studies, margin=0.25, slack=SLACK)
    assert worse["limits"]["gain"] == pytest.approx(-0.2 + 0.25 * 0.2 + SLACK["gain"])
    for gain, doubt in ((-0.3, 0.84), (-0.14, 1.0), (-0.1, 1.04), (0.1, 1.24)):
        found, doubts = findings({**studies[0], "pairs": {(0, 1): (1.0, gain)}}, worse)
        assert doubts["not_coregistered"] == pytest.approx(doubt)
        assert ("not_coregistered" in {one["code"] for one in found}) == (gain > -0.14)


def test_normalized_and_unusual_intensities_are_found(statistics: dict) -> None:
    image = head(9)
    assert "normalized" in judged(image / image.max(), statistics)[0]
    ranks = image.clone()
    ranks[0][ranks[0] > 0] = 1000 * torch.rand(int((ranks[0] > 0).sum())) ** 9 + 1
    assert "unusual_intensities" in judged(ranks, statistics)[0]


def test_a_finding_rejects_only_where_that_is_set(statistics: dict) -> None:
    image = head(9)
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    item = {"study": "a", "image": MetaTensor(image / image.max(), affine=affine), "has_contrast": torch.tensor(ALL)}
    assert [f["code"] for f in CheckStudyd(statistics=statistics)(item)["checks"]] == ["normalized"] * 4
    with pytest.raises(StudyError, match="Study a: FLAIR has no value above"):
        CheckStudyd(rejecting=["normalized"], statistics=statistics)(item)
    with pytest.raises(StudyError, match="rejecting_checks has no skull"):
        CheckStudyd(rejecting=["skull"])


def test_shipped_statistics_fit_the_checks() -> None:
    check = CheckStudyd()
    weights = np.array(check.statistics["weights"])
    assert weights.shape == (4, 11) and set(check.statistics["limits"]) == {
        *("filled", "ml", "shell", "dice", "gain", "odds", "top", "noise", "blur", "sides")
    }
    assert len(CHECKS) == 8


# ------------------------------------------------------------------------------------------ scores, verdict and maps
def filled_net(seed: int = 0, **changes: object) -> SSCFNet:
    net = tiny_net(seed, **changes).eval()
    bank = net.new_bank((48, 48))
    bank.enqueue(random_entries(bank, range(6), seed))
    with torch.no_grad():
        net.load_bank(net.compile_bank(bank.entries()))
    return net


def bank_of(net: SSCFNet) -> tuple[CompiledBank, torch.Tensor]:
    return net.stored_bank(), net.bank_present.any(dim=1).expand(2, -1)


def test_scores_of_no_slice_are_refused() -> None:
    with pytest.raises(StudyError, match="trust_slices_for_one must be at least 1, got 0"):
        TrustAssessor(number=3, slices_for_one=0, reject=2.0)


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, str]]:
    for number in range(3):
        for channel, key in enumerate(CONTRAST_KEYS):
            path = tmp_path / "in" / f"p{number}_{key}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(brain_volume(10 * number + channel), np.eye(4)), path)
    return find_studies(tmp_path / "in")


def test_scores_grow_with_what_the_network_does_not_know() -> None:
    net, slices = filled_net(), torch.rand(2, 8, 48, 48)
    slices[:, 4:] = 1
    # the bank knows the features of these very slices
    images = slices[:, :4]
    with torch.no_grad():
        second = net.run_branches(images, torch.ones(2, 4) > 0, *bank_of(net)).second
        for table, part in zip((net.bank_mean, net.bank_std), scale_statistics(list(second)), strict=True):
            table.copy_(part[torch.arange(6) % 2])
        strange_slices = torch.cat([(images > 0.5) * 2.0 - 1, slices[:, 4:]], dim=1)
        sound, strange = (study_scores(image, ALL, net)[0] for image in (slices, strange_slices))
    assert set(sound) == set(CONTRAST_KEYS) and set(sound["t1"]) == {"distance", "features", "consistency"}
    assert strange["t1"]["features"] > sound["t1"]["features"]
    own = {int(p): study_scores(slices, ALL, net, patient=int(p))[0] for p in net.bank_patient.tolist()}
    assert any(scores["t1"]["distance"] > sound["t1"]["distance"] for scores in own.values())


def test_distance_and_features_are_those_of_entries_of_other_patients() -> None:
    net, slices = filled_net(), torch.rand(2, 8, 48, 48)
    slices[:, 4:] = 1
    found, _ = study_scores(slices, ALL, net, patient=3)
    bank, others = net.stored_bank(), net.bank_patient != 3
    with torch.no_grad():
        second = net.run_branches(slices[:, :4], torch.ones(2, 4) > 0, bank, others.expand(2, -1)).second
    keys = net.retrieval_key(second)
    statistics = scale_statistics(list(second))
    for i, name in enumerate(CONTRAST_KEYS):
        nearest = torch.cdist(keys[:, i], bank.key[others, i]).amin(dim=1) / keys[:, i].norm(dim=1)
        assert found[name]["distance"] == pytest.approx(float(nearest.log().mean()), rel=1e-3)
        deviations = []
        for own, table in zip(statistics, (bank.mean[others, i], bank.std[others, i]), strict=True):
            deviations.append((own[:, i] - table.mean(dim=0)).abs() / table.std(dim=0, correction=0))
        expected = torch.stack(deviations).clamp(max=20).mean()
        assert found[name]["features"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("mask_input", [True, False])
def test_consistency_is_the_error_of_the_contrast_synthesized_from_the_others(mask_input: bool) -> None:
    net, slices = filled_net(mask_input=mask_input), torch.rand(2, 8, 48, 48)
    slices[:, 4:] = 1
    slices[:, :4, :20] = -1
    found, _ = study_scores(slices, ALL, net)
    brain = (slices[:, :4] > -1).any(dim=1)
    for i, key in enumerate(CONTRAST_KEYS):
        without = torch.arange(NUM_CONTRASTS) != i
        with torch.no_grad():
            pred = net(network_input(slices[:, :4], without.expand(2, -1)))[:, i]
        assert found[key]["consistency"] == pytest.approx(
            float((pred - slices[:, i]).abs()[brain].mean() / 2), rel=1e-4
        )


def test_verdict_follows_the_calibration_in_the_weights(items: list[dict], tmp_path: Path) -> None:
    net, transform = filled_net(), inference_transforms(**PREPROCESSING)
    path, calibrated = tmp_path / "model.pt", tmp_path / "calibrated.pt"
    save_weights(path, net, {"preprocessing": PREPROCESSING})
    # one study that cannot be read, and one that is not complete
    (tmp_path / "in" / "bad_t1.nii.gz").write_bytes(b"damaged")
    write_study(tmp_path / "in", ["t1", "t2"], "few")
    paths = {"source_path": path, "calibrated_path": calibrated, "output_dir": tmp_path / "out"}
    paths |= {"statistics_path": tmp_path / "statistics.json", "dataset_dir": tmp_path / "in"}
    for run_id in ("calibrating", "fitting"):
        workflow = bundle_workflow("train", "calibrate", run_id=run_id, bundle_root=BUNDLE_ROOT, **paths)
        with pytest.raises(StudyError, match="2 of 5 studies could not be used"):
            workflow.run()
        failures = json.loads((tmp_path / "out" / "failures.json").read_text())
        assert {failure["study"] for failure in failures} == {"bad", "few"}
        assert any("Study few lacks FLAIR, T1ce" in failure["reason"] for failure in failures)
    reference = read_reference(calibrated)
    assert read_reference(path) is None and reference is not None
    assert reference["patients"] == 3 and len(json.dumps(reference)) < 2500
    assert json.loads((tmp_path / "statistics.json").read_text())["studies"] == 3
    net = network_from_weights(calibrated)
    case = transform({k: v for k, v in items[0].items() if k != "t1ce"})
    assert TrustAssessor(**SLICES, reject=2.0)(case, net, "cpu")["verdict"] == "not calibrated"
    judged = TrustAssessor(**SLICES, reject=2.0, reference=reference)(case, net, "cpu")
    assert judged["verdict"] == "pass" and judged["reasons"] == [] and "T1ce is synthetic" in judged["warnings"][0]
    ratios = [judged["scores"][name] / reference["limits"][name] for name in OVERALL]
    assert judged["scores"]["doubt"] == max(ratios) <= 1
    case["doubts"] = {"noisy": 1.5, "uneven": 0.1}
    assert TrustAssessor(**SLICES, reject=2.0, reference=reference)(case, net, "cpu")["scores"]["doubt"] == 1.5
    case["checks"] = [{"code": "normalized", "finding": "FLAIR is normalized."}]
    assert TrustAssessor(**SLICES, reject=2.0, reference=reference)(case, net, "cpu")["verdict"] == "review"
    narrow = {**reference, "limits": {"out_of_distribution": -1e3, "consistency": 1e-9}}
    judged = TrustAssessor(**SLICES, reject=1.0, reference=narrow)(case, net, "cpu")
    assert judged["verdict"] == "reject" and len(judged["reasons"]) >= 2


def calibrated(
    folder: Path, name: str, patients: Sequence[str], training: Sequence[str] = (), **settings: object
) -> dict[str, Any]:
    """What a calibration of ``model.pt`` in a folder puts into other weights there, limits without a least one."""
    split = folder / "split.json"
    split.write_text(json.dumps({"training": list(training), "validation": list(patients), "test": []}))
    paths = {"source_path": folder / "model.pt", "calibrated_path": folder / name, "output_dir": folder / "out"}
    paths |= {"dataset_dir": folder / "in", "split_file": split}
    settings |= {"run_id": "calibrating", "bundle_root": BUNDLE_ROOT, "trust_least_limit": "$-1e6"}
    bundle_workflow("train", "calibrate", **paths, **settings).run()
    reference = read_reference(folder / name)
    assert reference is not None
    return reference


def test_limits_come_from_the_patients_of_the_folds(items: list[dict], tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pt", filled_net(), {"preprocessing": PREPROCESSING})
    every = calibrated(tmp_path, "every.pt", ["p0", "p1", "p2"])
    folds = []
    for name, patients in (("one", ["p0"]), ("two", ["p1", "p2"])):
        calibrated(tmp_path, f"{name}.pt", patients)
        folds.append(str((tmp_path / "out" / "judged.json").rename(tmp_path / f"{name}.json")))
        found = json.loads(Path(folds[-1]).read_text())["patients"]
        assert len(found) == len(patients) and len(found[0]) == 11
    pooled = calibrated(tmp_path, "pooled.pt", [], trust_folds=folds)
    assert pooled == every and every["patients"] == 3
    # p0 and p1 are visits of one patient, who is left out and counted as one
    assert calibrated(tmp_path, "visits.pt", ["p0", "p1", "p2"], patient_pattern="(p(?=[01])|p2)")["patients"] == 2
    found = json.loads((tmp_path / "out" / "judged.json").read_text())["patients"]
    assert sorted(map(len, found)) == [11, 22]
    # 3 patients are too few for 90%, and give the greatest with a margin of 1.25
    half = calibrated(tmp_path, "half.pt", [], trust_folds=folds, trust_coverage=0.75)
    for name, limit in half["limits"].items():
        assert pooled["limits"][name] == pytest.approx(1.25 * limit, rel=1e-3)
    with pytest.raises(StudyError, match=r"split\.json holds no scores of patients: give the judged.json"):
        calibrated(tmp_path, "three.pt", [], trust_folds=[str(tmp_path / "split.json")])


def test_what_depends_on_features_is_held_against_the_training_patients_of_the_network(
    items: list[dict], tmp_path: Path
) -> None:
    save_weights(tmp_path / "model.pt", filled_net(), {"preprocessing": PREPROCESSING})
    own = calibrated(tmp_path, "own.pt", ["p0"])
    left_out = calibrated(tmp_path, "left_out.pt", ["p1", "p2"])
    both = calibrated(tmp_path, "both.pt", ["p1", "p2"], ["p0"])
    assert both["distance"] == own["distance"] != left_out["distance"]
    assert both["features"] == own["features"] != left_out["features"]
    assert both["consistency"] == left_out["consistency"] != own["consistency"]
    assert both["limits"]["consistency"] == left_out["limits"]["consistency"] and both["patients"] == 2

    fold = (tmp_path / "out" / "judged.json").rename(tmp_path / "fold.json")
    found = json.loads(fold.read_text())["patients"]
    worst = max(
        (value - own[name][contrast][0]) / own[name][contrast][1]
        for patient in found
        for scores in patient
        for contrast, of_contrast in scores.items()
        for name, value in of_contrast.items()
        if name in ("distance", "features")
    )
    assert both["limits"]["out_of_distribution"] == pytest.approx(1.25 * worst, rel=2e-3)
    assert calibrated(tmp_path, "pooled.pt", [], ["p0"], trust_folds=[str(fold)]) == both
    with pytest.raises(StudyError, match="differ in whether their training patients were judged"):
        calibrated(tmp_path, "other.pt", [], trust_folds=[str(fold)])


@pytest.mark.parametrize("network", [PlainUNet(2, TINY_CHANNELS), tiny_net(prediction="mean")], ids=["unet", "mean"])
def test_network_without_scores_is_not_judged_and_not_calibrated(network: nn.Module, items: list[dict]) -> None:
    transform = inference_transforms(**PREPROCESSING)
    judged = TrustAssessor(**SLICES, reject=2.0)(transform(items[0]), network, "cpu")
    assert judged["verdict"] == "not calibrated" and judged["reasons"] == [
        "Only an SSCFNet with ccp has scores to judge a study by."
    ]
    with pytest.raises(StudyError, match="Only an SSCFNet with ccp has scores to calibrate"):
        calibrate(None, transform, network, None, 1.25, 3.0, 0.05, 0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize(("patients", "coverage"), [(9, 0.9), (15, 0.9), (19, 0.9), (30, 0.8)])
def test_conformal_limit_covers_what_it_promises(patients: int, coverage: float) -> None:
    values = np.random.default_rng(0).normal(size=patients + 1).tolist()
    # each in turn is the new patient
    covered = [values[k] <= conformal_limit(values[:k] + values[k + 1 :], coverage) for k in range(len(values))]
    assert coverage <= np.mean(covered) < coverage + 1 / len(values)


def test_expected_scores_are_medians_and_worst_of_patients(tmp_path: Path) -> None:
    def scores(name: str, patients: dict[str, float], **others: str) -> Path:
        row = {"scenario": "FLAIR+T1+T2", "of": "T1ce", "method": "network", "protocol": "volume", "region": "whole"}
        rows = [{"patient": p, **row, "score": "psnr", "value": v, **others} for p, v in patients.items()]
        rows += [{**row, "score": "ssim", "value": row["value"] / 100} for row in rows]
        rows += [{**row, "region": "tumor", "value": 0} for row in rows]
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
        return tmp_path / name

    first = scores("first.csv", {f"p{k}": 20.0 + k for k in range(5)})
    second = scores("second.csv", {f"p{k}": 20.0 + k for k in range(5, 9)})
    found = expected_scores([first, second])
    assert found == {"patients": 9, "scenarios": {"FLAIR+T1+T2": {"t1ce": [24.0, 20.0, 0.24, 0.2]}}}
    assessor = TrustAssessor(**SLICES, reject=2.0, reference={"expected": found, "limits": {}})
    case = {"has_contrast": torch.tensor([1, 1, 0, 1]), "study": "a"}
    expected = assessor(case, torch.nn.Identity(), "cpu")["expected"]
    of_t1ce = {"psnr": {"median": 24.0, "worst": 20.0}, "ssim": {"median": 0.24, "worst": 0.2}}
    assert expected["contrasts"] == {"t1ce": of_t1ce}
    assert assessor({**case, "has_contrast": torch.tensor(ALL)}, torch.nn.Identity(), "cpu")["expected"] == {}
    with pytest.raises(StudyError, match="patient p0, who is in another file too"):
        expected_scores([first, first])
    with pytest.raises(StudyError, match="no score of the protocol volume"):
        expected_scores([scores("other.csv", {"p9": 1.0}, protocol="brasyn")])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for file in ("bad.csv", "none.csv"):
        with pytest.raises(StudyError, match=f"{file} is no scores.csv"):
            expected_scores([tmp_path / file])


def test_every_corruption_changes_the_study_and_keeps_what_is_missing_missing() -> None:
    image = head(0)
    image[2] = 0
    for name, change in corruptions().items():
        changed = change(image.clone(), 0.5, 0)
        assert not torch.equal(changed, image), name
        assert torch.isfinite(changed).all() and not changed[2].any(), name


def test_brain_at_the_far_edge_is_checked(statistics: dict) -> None:
    image = torch.zeros(4, 41, 41, 43)
    image[:, 5:30, 5:30, 41:] = torch.rand(25, 25, 2) * 900 + 1
    assert measure(image, (1.0, 1.0, 1.0), 0, ALL)["shape"][0]["ml"] > 0


def test_prototypes_are_those_that_the_network_retrieves(monkeypatch: pytest.MonkeyPatch) -> None:
    net, slices = filled_net(), torch.rand(2, 8, 48, 48)
    available = [True, True, False, False]
    slices[:, 4:] = torch.tensor(available).float()[None, :, None, None]
    targets, indices, of_network, nearest = [], [], net.retrieve, sscf.retrieve

    def watch(*given: Any) -> Any:
        targets.append(given[5])
        return of_network(*given)

    def watch_nearest(*given: Any) -> torch.Tensor:
        indices.append(nearest(*given))
        return indices[-1]

    monkeypatch.setattr(net, "retrieve", watch)
    monkeypatch.setattr(sscf, "retrieve", watch_nearest)
    with torch.no_grad():
        net.for_scenario(available)(slices)
    (target,), (index,) = targets, indices
    _, named = study_scores(slices, available, net, num_prototypes=6)
    for i, key in ((2, "t1ce"), (3, "t2")):
        slots, counts = index[target == i].unique(return_counts=True)
        shares = dict(zip(slots.tolist(), (counts / counts.sum()).tolist(), strict=True))
        assert {one["entry"]: one["share"] for one in named[key]} == pytest.approx(shares, abs=1e-3)
        assert all(one["distance"] > 0 for one in named[key])


def test_unknown_scenario_of_the_evidence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="scenarios has no FLAIR\\+T3: choose from FLAIR, "):
        reliability([], None, None, None, "FLAIR+T3", [1.0], tmp_path)  # type: ignore[arg-type]
