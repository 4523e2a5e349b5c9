# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Slice cache, choice of slices, dataset and sampler."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from builders import write_study
from monai.data import DataLoader
from monai.engines import Workflow

from scripts.contrasts import StudyError
from scripts.data.randomness import stable_hash
from scripts.data.slices import EpochSampler, SliceDataset, prepare_slices, select_slices
from scripts.data.transforms import study_transforms

TRANSFORM = study_transforms(32)


@pytest.fixture
def items(tmp_path):
    """A complete study, one without T1ce and mask, and a second examination of the first patient."""
    return [
        write_study(tmp_path, "P1a"),
        write_study(tmp_path, "P2a", 1, keys=("flair", "t1", "t2"), mask=False),
        write_study(tmp_path, "P1b", 2),
    ]


def prepare(items, tmp_path, transform=TRANSFORM, **kwargs):
    return prepare_slices(items, transform, tmp_path / "cache", **kwargs)


def test_cache_holds_the_slices_with_brain(items, tmp_path):
    prepared = prepare(items, tmp_path)
    assert [study.study for study in prepared.studies] == ["P1a", "P2a", "P1b"] and not prepared.failures
    study = prepared.studies[0]
    assert study.info["z"] == [1, 2, 3, 4, 5, 6] and study.info["tumor_area"] == [0, 0, 8, 16, 0, 0]
    assert study.info["brain_fraction"][1:] == [pytest.approx(16 * 12 / 32**2, abs=1e-5)] * 5
    assert study.info["has_contrast"] == [True] * 4 and study.info["has_mask"] is True
    image = np.load(study.directory / "image.npy", mmap_mode="r")
    label = np.load(study.directory / "label.npy", mmap_mode="r")
    expected = TRANSFORM(items[0])
    assert image.dtype == np.float16 and label.dtype == np.uint8
    np.testing.assert_array_equal(image, expected["image"].numpy()[..., 1:7].transpose(3, 0, 1, 2).astype(np.float16))
    np.testing.assert_array_equal(label, expected["label"].numpy()[0, ..., 1:7].transpose(2, 0, 1))
    assert json.loads((study.directory / "info.json").read_text())["files"]["t1"][0] == items[0]["t1"]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def test_cache_is_used_again_until_a_file_or_a_parameter_changes(items, tmp_path):
    calls = []

    class Counting(type(TRANSFORM)):
        def __call__(self, data):
            calls.append(data["study"])
            return super().__call__(data)

    def run(**kwargs):
        calls.clear()
        return [
            s.directory for s in prepare(items, tmp_path, Counting(study_transforms(32, **kwargs).transforms)).studies
        ]

    first = run()
    assert calls == ["P1a", "P2a", "P1b"]
    assert run() == first and not calls
    os.utime(items[1]["t1"], ns=(1, 1))
    touched = run()
    assert calls == ["P2a"] and touched[1] != first[1] and touched[::2] == first[::2]
    for changed in ({"percentile": 99.0}, {"scaling": "per_slice"}, {"mask_values": {"ED": 2, "ET": 4}}):
        assert not set(run(**changed)) & {*first, *touched}
        assert len(calls) == 3


def test_threads_make_the_same_cache(items, tmp_path):
    one, two = prepare(items, tmp_path), prepare(items, tmp_path / "other", num_workers=2)
    assert [s.directory.name for s in one.studies] == [s.directory.name for s in two.studies]
    for a, b in zip(one.studies, two.studies, strict=True):
        np.testing.assert_array_equal(np.load(a.directory / "image.npy"), np.load(b.directory / "image.npy"))


def test_what_a_killed_process_left_is_cleared_once_it_is_old(items, tmp_path):
    for name, age in (("old", 4000), ("young", 0)):
        left = tmp_path / "cache" / f".incomplete-{name}"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    prepare(items[:1], tmp_path)
    assert [p.name for p in (tmp_path / "cache").glob(".*")] == [".incomplete-young"]


def test_two_at_once_make_one_entry(items, tmp_path):
    prepared = prepare([items[0]] * 4, tmp_path, num_workers=4)
    assert len({study.directory for study in prepared.studies}) == 1 == len(list((tmp_path / "cache").iterdir()))


@pytest.mark.parametrize("damage", ["truncated", "gone", "pickle", "no JSON"])
def test_damaged_entry_is_made_anew(items, tmp_path, damage):
    entry = prepare(items[:1], tmp_path).studies[0].directory
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    file = entry / ("info.json" if damage == "no JSON" else "image.npy")
    if damage == "gone":
        file.unlink()
    elif damage == "pickle":
        np.save(file, np.full(len(before["image.npy"]) // 8, None), allow_pickle=True)
    else:
        file.write_bytes(before[file.name][:-100])
    assert prepare(items[:1], tmp_path).studies[0].directory == entry
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == before


def test_bad_studies_are_collected_and_do_not_stop_the_others(items, tmp_path, caplog):
    mask_only = {"study": "P3a", "patient": "P3", "seg": items[0]["seg"]}
    vanished = {"study": "P4a", "patient": "P4", "t1": str(tmp_path / "gone.nii.gz")}
    prepared = prepare([mask_only, *items, vanished], tmp_path, num_workers=2)
    assert [s.study for s in prepared.studies] == ["P1a", "P2a", "P1b"]
    assert [f["study"] for f in prepared.failures] == ["P3a", "P4a"]
    assert "no contrast" in prepared.failures[0]["reason"] and "gone.nii.gz" in prepared.failures[1]["reason"]
    assert all(failure["reason"] in caplog.text for failure in prepared.failures)
    assert SliceDataset(prepared).failures == prepared.failures
    with pytest.raises(StudyError, match=r"None of 1 studies .*P3a has no contrast"):
        prepare([mask_only], tmp_path)


def test_other_errors_are_not_hidden(items, tmp_path):
    def broken(item):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        prepare(items, tmp_path, broken)


def test_choice_of_slices():
    info = {"tumor_area": [0, 0, 5, 9, 2, 0], "brain_fraction": [0.01, 0.45, 0.4, 0.5, 0.3, 0.1], "z": range(3, 9)}
    assert select_slices(info, "largest_tumor", count=2) == [2, 3]
    assert select_slices(info, "largest_tumor", count=4) == [1, 2, 3, 4]
    assert select_slices({**info, "tumor_area": [0] * 6}, "largest_tumor", count=3) == [1, 2, 3]
    assert select_slices(info, "largest_tumor", count=50) == [0, 1, 2, 3, 4, 5]
    assert select_slices(info, "tumor") == [2, 3, 4]
    assert select_slices(info, "brain") == [1, 2, 3, 4, 5]
    assert select_slices(info, "brain", min_brain=0.25) == [1, 2, 3, 4]
    assert select_slices(info, [4, 8, 9]) == [1, 5]
    with pytest.raises(ValueError, match="choice"):
        select_slices(info, "all")


def test_dataset_items(items, tmp_path):
    data = SliceDataset(prepare(items, tmp_path))
    assert data.studies == ["P1a", "P2a", "P1b"] and len(data) == 15  # slice 1 has too little brain
    assert data.index.tolist() == [[s, z] for s in range(3) for z in range(2, 7)]
    assert data.weights.dtype == torch.float64
    assert data.weights.tolist() == [1, 3, 3, 1, 1] + [1] * 5 + [1, 3, 3, 1, 1]
    item = data[1]
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in item.items()}
    assert shapes == {
        "target": ((4, 32, 32), torch.float32),
        "label": ((1, 32, 32), torch.uint8),
        "has_contrast": ((4,), torch.bool),
        "has_mask": ((), torch.bool),
        **dict.fromkeys(("patient", "slice_id", "study_index", "z"), ((), torch.int64)),
    }
    volume = TRANSFORM(items[0])
    assert torch.equal(item["target"], volume["image"].as_tensor()[..., 3].half().float())
    assert torch.equal(item["label"], volume["label"].as_tensor()[..., 3])
    assert int(item["slice_id"]) == stable_hash("P1a/3") and int(item["z"]) == 3
    assert int(item["patient"]) == stable_hash("P1") == int(data[10]["patient"]) != int(data[5]["patient"])
    incomplete = data[5]
    assert int(incomplete["study_index"]) == 1 and not incomplete["has_mask"]
    assert incomplete["has_contrast"].tolist() == [True, True, False, True]
    assert (incomplete["target"][2] == -1).all() and not incomplete["label"].any()


def test_what_is_brighter_than_the_scale_is_cut_for_the_network_and_kept_for_scores(items, tmp_path):
    data = SliceDataset(prepare(items[:1], tmp_path, study_transforms(32, clip=False)), unclipped=True)
    item = data[1]
    assert float(item["unclipped"].max()) > 1
    assert torch.equal(item["target"], item["unclipped"].clamp(max=1))


def test_choices_of_the_dataset(items, tmp_path):
    prepared = prepare(items, tmp_path)
    paper = SliceDataset(prepared, "largest_tumor", count=2)
    assert len(paper) == 6 and paper.index[:2].tolist() == [[0, 3], [0, 4]] and paper.weights.unique().tolist() == [1]
    tumor = SliceDataset(prepared, "tumor")
    assert tumor.studies == ["P1a", "P1b"] and [f["study"] for f in tumor.failures] == ["P2a"]
    with pytest.raises(StudyError, match="No slice is left"):
        SliceDataset(prepared, "brain", min_brain=0.9)
    with pytest.raises(ValueError, match="choice"):
        SliceDataset(prepared, "all")


def test_a_wider_brain_is_a_failure_that_says_what_to_do(items, tmp_path):
    wide = write_study(tmp_path, "P9a", shape=(50, 20, 8))
    prepared = prepare([wide, *items], tmp_path)
    assert SliceDataset(prepared, size=(32, 32)).studies == ["P1a", "P2a", "P1b"]
    assert SliceDataset(prepared, size=(48, 32)).studies == ["P9a"]
    with pytest.raises(StudyError, match=r"No slice is left .* Study P9a .* raise image_size to 48"):
        SliceDataset(prepared, size=(16, 16))
    data = SliceDataset(prepared)
    assert data.studies == ["P1a", "P2a", "P1b"]
    (failure,) = data.failures
    assert (
        failure["study"] == "P9a" and "48 x 32" in failure["reason"] and "raise image_size to 48" in failure["reason"]
    )


def order(epoch=0, **kwargs):
    sampler = EpochSampler(range(10), **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_sampler_without_weights():
    assert sorted(order()) == list(range(10))
    assert order(seed=1, epoch=4) == order(seed=1, epoch=4) != order(seed=1, epoch=5)
    assert order(seed=1) != order(seed=2)
    assert len(set(order(num_samples=4))) == 4
    assert sorted(order(num_samples=20)) == sorted([*range(10)] * 2)
    assert order(weights=torch.ones(10)) == order()


def test_sampler_with_weights():
    weights = [0, 0, 1, 1, 1, 1, 1, 1, 1, 9]
    drawn = order(weights=weights, num_samples=4000)
    counts = np.bincount(drawn, minlength=10)
    assert not counts[:2].any() and 8 < counts[9] / counts[2:9].mean() < 10
    assert drawn == order(weights=weights, num_samples=4000) != order(weights=weights, num_samples=4000, epoch=1)
    assert len(order(weights=weights)) == 10
    for bad in ({"weights": [1, 2]}, {"num_samples": 0}):
        with pytest.raises(ValueError):
            order(**bad)


@pytest.mark.parametrize("kwargs", [{}, {"weights": range(1, 11)}, {"num_samples": 7}])
def test_two_ranks_partition_the_draws(kwargs):
    ranks = [order(3, num_replicas=2, rank=rank, **kwargs) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    together = [index for pair in zip(*ranks, strict=True) for index in pair]
    alone = order(3, **kwargs)
    assert together[: len(alone)] == alone and len(together) - len(alone) == len(alone) % 2


def test_engines_set_the_epoch(items, tmp_path):
    data = SliceDataset(prepare(items[:1], tmp_path))
    loader = DataLoader(data, batch_size=5, sampler=EpochSampler(data))
    seen = []
    engine = Workflow(
        "cpu",
        max_epochs=3,
        data_loader=loader,
        iteration_update=lambda engine, batch: seen.append(batch["z"].tolist()),
        decollate=False,
    )
    engine.run()
    expected = []
    for epoch in (1, 2, 3):
        sampler = EpochSampler(data)
        sampler.set_epoch(epoch)
        expected.append([data.index[i, 1].item() for i in sampler])
    assert seen == expected
