# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Inference piece by piece: slice inference, geometry on file, writing, failures, the one Python call."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import BUNDLE_ROOT, random_entries, tiny_net
from monai.data import DataLoader, ITKWriter, MetaTensor
from monai.data.utils import no_collation
from torch import nn

from scripts.contrasts import CONTRAST_KEYS, SCENARIOS, StudyError, exit_on_user_error, scenario_name
from scripts.data.randomness import stable_hash
from scripts.inference import writer as module
from scripts.inference.evaluator import StudyEvaluator
from scripts.inference.inferer import BrainSliceInferer
from scripts.inference.postprocessing import FinishPredictiond, prediction_transforms
from scripts.inference.preprocessing import FindStudyd, StudyDataset, inference_transforms, list_studies
from scripts.inference.synthesize import synthesize_study
from scripts.inference.writer import StudyWriter
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import load_weights, save_weights

SHAPE = (40, 36, 6)
TINY = {"channels": [4, 8, 8, 8, 8], "bank_size": 5}
PREPROCESSING = {"image_size": 48, "spacing": 1.0, "scaling": "brain"}
ANGLE = np.deg2rad(7)
GRIDS = {
    "LPS": [[-1, 0, 0, 90], [0, -1, 0, 126], [0, 0, 1, -72]],
    "RAS, thick slices": [[1, 0, 0, -20], [0, 1, 0, -18], [0, 0, 5, 3]],
    "oblique": [[np.cos(ANGLE), -np.sin(ANGLE), 0, 3], [np.sin(ANGLE), np.cos(ANGLE), 0, 4], [0, 0, 3, 5]],
    "sagittal, flipped": [[0, 0, -1, 30], [1, 0, 0, -5], [0, -1, 0, 8]],
    "left-handed": [[-1, 0, 0, 9], [0, 1, 0, 8], [0, 0, 2, 7]],
}


def affine_of(rows) -> np.ndarray:
    return np.vstack([np.asarray(rows, float), [0, 0, 0, 1]])


LPS = affine_of(GRIDS["LPS"])


def brain_volume(seed: int, shape=SHAPE) -> np.ndarray:
    """Random intensities in an ellipsoid that moves with the seed, 0 around it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, n) for n in shape], indexing="ij"), -1)
    inside = np.linalg.norm((grid - [0.08, -0.05 + 0.02 * seed, 0]) / [1, 1, 1.1], axis=-1) < 0.35
    return np.where(inside, rng.integers(1, 3000, shape), 0).astype(np.int16)


def write_study(folder, keys, name="S1", affine=LPS, shape=SHAPE) -> dict[str, str]:
    """Write some contrasts of a study; returns the paths by key."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key in keys:
        paths[key] = str(folder / f"{name}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(brain_volume(CONTRAST_KEYS.index(key), shape), affine), paths[key])
    return paths


def load(path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def scaled(path) -> np.ndarray:
    values = load(path).astype(np.float64)
    return np.clip(values / np.percentile(values[values > 0], 99.5), 0, 1)


class CopyNet(nn.Module):
    """Gives one input contrast as every contrast; ED where it is bright, ET where it is very bright."""

    def __init__(self, source: int = 0) -> None:
        super().__init__()
        self.source, self.slices, self.sizes = source, 0, set()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.slices += len(image)
        self.sizes.add(tuple(image.shape[1:]))
        value = image[:, self.source : self.source + 1]
        classes = [(value > 0).float() * 0.7, (value > 0.6).float() * 0.9, torch.full_like(value, 0.4)]
        return torch.cat([value.expand(-1, 4, -1, -1), *classes], dim=1)


def fill_with(network, paths, output_dir, **options):
    options = {"preprocessing": inference_transforms(image_size=48), **options}
    return synthesize_study(**paths, output_dir=output_dir, network=network, device="cpu", **options)


def evaluate(items, output_dir, network=None, writer=None, num_workers=0, **options) -> StudyEvaluator:
    preprocessing = inference_transforms(image_size=48)
    dataset = StudyDataset(items, preprocessing)
    loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=no_collation)
    return StudyEvaluator(
        "cpu",
        loader,
        network or CopyNet(),
        BrainSliceInferer(),
        prediction_transforms(preprocessing),
        writer or StudyWriter(output_dir),
        **options,
    )


def hidden(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


# ----------------------------------------------------------------------------------------------------- slice inference
def network_volume(batch=2, size=(32, 48, 7)) -> torch.Tensor:
    """B x 8 x X x Y x Z input; slice 0 of all and slice 3 of sample 1 are empty; T1ce is missing in sample 0."""
    torch.manual_seed(0)
    images = torch.rand(batch, 4, *size) * 1.8 - 0.8
    images[..., 0] = -1
    planes = torch.ones_like(images)
    images[0, 2], planes[0, 2] = -1, 0
    if batch > 1:
        images[1, ..., 3] = -1
    return torch.cat([images, planes], dim=1)


@pytest.mark.parametrize("sw_batch_size", [1, 4])
def test_slices_without_brain_are_not_run(sw_batch_size):
    volume, network = network_volume(), CopyNet(source=1)
    pred = BrainSliceInferer(sw_batch_size=sw_batch_size)(volume, network)
    assert network.slices == 6 + 5
    assert pred.shape == (2, 7, 32, 48, 7) and type(pred) is torch.Tensor
    for channel in range(4):
        torch.testing.assert_close(pred[:, channel], volume[:, 1])
    empty = [pred[..., 0], pred[1:, ..., 3]]
    for out in empty:
        assert (out[:, :4] == -1).all() and (out[:, 4:] == 0).all()


def test_a_volume_without_brain_never_reaches_the_network():
    volume, network = network_volume(1), CopyNet()
    volume[:, :4] = -1
    pred = BrainSliceInferer()(volume, network)
    assert network.slices == 0 and (pred[:, :4] == -1).all() and (pred[:, 4:] == 0).all()


@pytest.mark.parametrize("size, seen", [((33, 48, 3), (48, 48)), ((17, 50, 3), (32, 64)), ((32, 16, 3), (32, 16))])
def test_odd_sizes_are_padded_with_background(size, seen):
    volume = network_volume(1, size)
    network = CopyNet(source=3)
    pred = BrainSliceInferer()(volume, network)
    assert network.sizes == {(8, *seen)}
    torch.testing.assert_close(pred[:, 0], volume[:, 3])


def test_padding_is_background_and_availability_survives_it():
    seen = []

    def network(image):
        seen.append(image)
        return image[:, :7]

    volume = network_volume(1, (16, 16, 2))
    BrainSliceInferer(roi_size=(32, 32))(volume, network)
    assert seen[0].shape == (1, 8, 32, 32)
    assert (seen[0][:, :4, :8] == -1).all() and (seen[0][:, :4, :, 24:] == -1).all()
    assert seen[0][0, 4:].amax(dim=(1, 2)).tolist() == [1, 1, 0, 1]


def scenario_volume(available, size=(32, 48, 5)) -> torch.Tensor:
    """1 x 8 x X x Y x Z input of one scenario; slice 0 is empty."""
    torch.manual_seed(1)
    kept = torch.tensor(available, dtype=torch.bool).view(1, 4, 1, 1, 1)
    images = torch.rand(1, 4, *size) * 1.8 - 0.8
    images[..., 0] = -1
    return torch.cat([torch.where(kept, images, -1.0), kept.expand(images.shape).float()], dim=1)


@pytest.mark.parametrize("roi_size", [(-1, -1), (32, 32)], ids=["slices", "windows"])
@pytest.mark.parametrize("available", SCENARIOS, ids=scenario_name)
def test_every_scenario_gives_what_the_plain_network_gives(available, roi_size):
    network = tiny_net().eval()
    network.load_bank(network.compile_bank(random_entries(network.new_bank((32, 48)), range(6))))
    volume, kept = MetaTensor(scenario_volume(available), affine=torch.diag(torch.tensor([2.0, 2, 3, 1]))), available
    with torch.no_grad():
        inferer = BrainSliceInferer(roi_size, sw_batch_size=3)
        pred = inferer(volume, network)
        plain = inferer(volume.as_tensor(), lambda image: network(image))
        one = network(volume.as_tensor()[..., 4])
    assert isinstance(pred, MetaTensor) and torch.equal(pred.affine, volume.affine)
    made = [*[i for i in range(4) if not kept[i]], 4, 5, 6]
    torch.testing.assert_close(pred.as_tensor()[:, made], plain[:, made], atol=1e-5, rtol=0)
    if roi_size == (-1, -1):
        torch.testing.assert_close(pred.as_tensor()[:, made, ..., 4], one[:, made], atol=1e-5, rtol=0)
    given = [i for i in range(4) if kept[i]]
    torch.testing.assert_close(pred.as_tensor()[:, given, ..., 1:], volume.as_tensor()[:, given, ..., 1:])


def test_a_scenario_is_asked_for_once_per_volume():
    class Asked(CopyNet):
        scenarios: list = []

        def for_scenario(self, available):
            self.scenarios.append(tuple(available))
            return CopyNet(source=1)

    network, volume = Asked(), network_volume()
    pred = BrainSliceInferer(sw_batch_size=2)(volume, network)
    assert network.scenarios == [(True, True, False, True), (True, True, True, True)] and network.slices == 0
    torch.testing.assert_close(pred[:, 0], volume[:, 1])


def test_compiled_modules_are_kept_and_see_one_shape(monkeypatch):
    compiled, sizes = [], []

    def compile_(module, **options):
        def call(image):
            sizes.append(len(image))
            return module(image)

        compiled.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compile_)
    network, inferer = tiny_net().eval(), BrainSliceInferer(sw_batch_size=3, compile=True)
    with torch.no_grad():
        for available in ((1, 0, 0, 1), (0, 1, 0, 0), (1, 0, 0, 1)):
            volume = scenario_volume(available)
            pred = inferer(volume, network)
            plain = BrainSliceInferer(sw_batch_size=3)(volume, network)
            torch.testing.assert_close(pred, plain, atol=1e-5, rtol=0)
    assert compiled == [{"dynamic": False}] * 2 and sizes == [3, 3] * 3


def test_wrong_window():
    with pytest.raises(ValueError, match="multiple of 16"):
        BrainSliceInferer(roi_size=(100, 96))


# ------------------------------------------------------------------------------------------------------------ geometry
@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_go_back_exactly(tmp_path, grid):
    affine = affine_of(GRIDS[grid])
    shape = (6, 40, 36) if grid.startswith("sagittal") else SHAPE
    paths = write_study(tmp_path / "in", ["flair", "t2"], affine=affine, shape=shape)
    written = fill_with(CopyNet(source=0), paths, tmp_path / "out", output_scale=2.0)
    assert sorted(written) == ["seg", "t1", "t1ce"]
    flair, union = scaled(paths["flair"]), (load(paths["flair"]) > 0) | (load(paths["t2"]) > 0)
    for key in ("t1", "t1ce"):
        image = nib.load(written[key])
        assert image.get_data_dtype() == np.float32 and image.shape == shape
        np.testing.assert_array_equal(image.affine, nib.load(paths["flair"]).affine)
        np.testing.assert_allclose(load(written[key]), 2 * flair, atol=1e-6)
        assert (load(written[key])[~union] == 0).all()
    mask = nib.load(written["seg"])
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, nib.load(paths["flair"]).affine)
    value = 2 * flair - 1
    clear = (np.abs(value) > 1e-4) & (np.abs(value - 0.6) > 1e-4)
    expected = np.select([value > 0.6, value > 0], [4, 2], 0)
    np.testing.assert_array_equal(load(written["seg"])[clear], expected[clear])


def test_union_of_brains_bounds_the_output(tmp_path):
    class Bright(CopyNet):
        def forward(self, image):
            return torch.ones_like(image[:, :7])

    paths = write_study(tmp_path / "in", ["t1", "t2"])
    written = fill_with(Bright(), paths, tmp_path / "out")
    union = (load(paths["t1"]) > 0) | (load(paths["t2"]) > 0)
    np.testing.assert_array_equal(load(written["flair"]), union.astype(np.float32))
    # of equal probabilities the first class wins
    np.testing.assert_array_equal(load(written["seg"]), 2 * union)


@pytest.mark.parametrize("spacing", [0.6, 1.7])
def test_resampled_study_goes_back_smoothly_and_stays_in_the_brain(tmp_path, spacing):
    shape = (70, 60, 4)
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    smooth = np.where(x**2 + y**2 < 0.6, 1000 + 400 * x + 300 * np.sin(2 * y), 0).astype(np.float32)
    path = tmp_path / "X_t1.nii.gz"
    nib.save(nib.Nifti1Image(smooth, np.diag([-spacing, -spacing, 2, 1])), path)
    written = fill_with(CopyNet(source=1), {"t1": path}, tmp_path / "out", preprocessing=inference_transforms(64))
    result, expected = load(written["t2"]), np.clip(smooth / np.percentile(smooth[smooth > 0], 99.5), 0, 1)
    assert result.shape == shape and (result[smooth == 0] == 0).all()
    inside = x**2 + y**2 < 0.4
    assert np.abs(result - expected)[inside].max() < 0.02


def test_codes_and_units_are_kept_but_nothing_that_names_a_patient(tmp_path):
    image = nib.Nifti1Image(brain_volume(0), LPS)
    image.set_qform(LPS, code=1)
    image.set_sform(LPS, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["db_name"] = b"JANE DOE", b"JANE DOE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"JANE DOE"))
    nib.save(image, tmp_path / "a_flair.nii.gz")
    written = fill_with(CopyNet(), {"flair": tmp_path / "a_flair.nii.gz"}, tmp_path / "out")
    header = nib.load(written["t1"]).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 4)
    assert header.get_xyzt_units() == ("mm", "sec")
    assert b"JANE" not in header.binaryblock and not header.extensions
    assert b"not for clinical use" in header["descrip"].item()


def test_other_formats_give_nifti_with_the_same_affine(tmp_path):
    writer = ITKWriter(output_dtype=np.float32)
    writer.set_data_array(brain_volume(0), channel_dim=None)
    writer.set_metadata({"affine": LPS}, resample=False)
    writer.write(tmp_path / "a.mha")
    written = fill_with(CopyNet(1), {"t1": tmp_path / "a.mha"}, tmp_path / "out")
    np.testing.assert_allclose(nib.load(written["t2"]).affine, LPS)
    nib.save(nib.Nifti1Image(brain_volume(0), LPS), tmp_path / "same.nii.gz")
    np.testing.assert_allclose(load(written["t2"]), scaled(tmp_path / "same.nii.gz"), atol=1e-6)


# ----------------------------------------------------------------------------------------------- scenarios and record
@pytest.mark.parametrize("keys", [["t1ce"], ["t1", "t2"], ["flair", "t1", "t1ce"], list(CONTRAST_KEYS)])
def test_scenarios(tmp_path, keys):
    paths = write_study(tmp_path / "in", keys)
    torch.manual_seed(0)
    network = SSCFNet(**TINY)
    written = fill_with(network, paths, tmp_path / "out")
    missing = [key for key in CONTRAST_KEYS if key not in keys]
    assert sorted(written) == sorted([*missing, "seg"])
    names = {f"S1_{key}_synthetic.nii.gz" for key in missing} | {"S1_seg.nii.gz", "S1_synthesis.json"}
    assert set(os.listdir(tmp_path / "out" / "S1")) == names
    for key in missing:
        values = load(written[key])
        assert values.min() >= 0 and values.max() <= 1 and values.max() > 0


def test_record(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t2"], "P1")
    network = SSCFNet(**TINY)
    network.bank_present[0] = True
    network.bank_patient[0] = stable_hash("P1")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    fill_with(None, paths, tmp_path / "out", ckpt_path=tmp_path / "model.pt")
    record = json.loads((tmp_path / "out/P1/P1_synthesis.json").read_text())
    assert record["available"] == ["FLAIR", "T2"] and record["synthesized"] == ["T1", "T1ce"]
    assert record["inputs"] == {"flair": "P1_flair.nii.gz", "t2": "P1_t2.nii.gz"}
    assert record["patient_in_bank"] is True and len(record["weights_sha256"]) == 64
    version = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["version"]
    assert "not for clinical use" in record["notice"] and record["bundle_version"] == version
    assert sorted(record["intensity_scale"]) == ["flair", "t2"]
    assert str(tmp_path) not in json.dumps(record)


def test_mask_labels(tmp_path):
    paths = write_study(tmp_path / "in", ["t1"])
    written = fill_with(CopyNet(1), paths, tmp_path / "out", mask_labels={"ED": 7, "ET": 9, "NET": 11})
    assert set(np.unique(load(written["seg"]))) == {0, 7, 9}
    for labels in ({"ED": 1, "ET": 2}, {"ED": 0, "ET": 1, "NET": 2}):
        with pytest.raises(ValueError, match="mask_labels"):
            FinishPredictiond(mask_labels=labels)


def test_one_volume_for_platforms(tmp_path):
    paths = write_study(tmp_path / "in", ["t1", "t2"])
    preprocessing = inference_transforms(48)
    item = preprocessing({"image": paths["t2"], "image_path": paths["t2"], "target": "t1ce"})
    assert item["has_contrast"].tolist() == [False, True, False, True] and item["study"] == "S1"
    item["pred"] = BrainSliceInferer()(item["image"][None], CopyNet(1))[0]
    out = prediction_transforms(preprocessing)(item)["pred"]
    assert isinstance(out, MetaTensor) and out.shape == (1, *SHAPE)
    np.testing.assert_allclose(out.affine, LPS)
    np.testing.assert_allclose(out[0], scaled(paths["t1"]), atol=1e-6)
    with pytest.raises(StudyError, match="target"):
        prediction_transforms(preprocessing)({**item, "target": "t3"})


def test_find_study_by_folder_or_file(tmp_path):
    first = write_study(tmp_path / "S1", ["t1", "flair"], "S1")
    write_study(tmp_path / "S2", ["t2"], "S2")
    for image in (tmp_path / "S1", first["flair"]):
        found = FindStudyd()({"image": str(image)})
        assert {key: found.get(key) for key in CONTRAST_KEYS} == {"t1ce": None, "t2": None, **first}
    with pytest.raises(StudyError, match="2 studies"):
        FindStudyd()({"image": str(tmp_path)})
    assert FindStudyd()({"t1": "x", "image": "y"}) == {"t1": "x", "image": "y"}


# ------------------------------------------------------------------------------------------------------------- writing
def test_overwriting_replaces_our_files_only(tmp_path):
    folder = tmp_path / "out" / "S1"
    written = fill_with(CopyNet(), write_study(tmp_path / "in", ["flair"]), tmp_path / "out")
    assert sorted(written) == ["seg", "t1", "t1ce", "t2"]
    (folder / "notes.txt").write_text("mine")
    written = fill_with(CopyNet(), write_study(tmp_path / "in", ["flair", "t1ce"]), tmp_path / "out")
    assert set(os.listdir(folder)) == {
        "notes.txt",
        "S1_t1_synthetic.nii.gz",
        "S1_t2_synthetic.nii.gz",
        "S1_seg.nii.gz",
        "S1_synthesis.json",
    }
    assert not hidden(tmp_path / "out")
    # other users may read what the umask lets them
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("finished_before", [False, True])
def test_nothing_half_written_stays(tmp_path, monkeypatch, finished_before):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    before = set()
    if finished_before:
        fill_with(CopyNet(), paths, tmp_path / "out")
        before = {(p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")}
    save, calls = nib.save, []

    def fail_later(image, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(module.nib, "save", fail_later)
    with pytest.raises(StudyError, match=r"S1 cannot be written: No space left on device\.$"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    assert {(p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")} == before and len(calls) == 2


@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_results_are_replaced_hides_nothing(tmp_path, monkeypatch, step):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    folder = tmp_path / "out" / "S1"
    fill_with(CopyNet(), paths, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    expected, replace, calls = results(folder), os.replace, []

    def kill(source, target):
        calls.append(target)
        if len(calls) > step:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    # a killed process clears nothing
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    with pytest.raises(KeyboardInterrupt):
        fill_with(CopyNet(), paths, tmp_path / "out")
    monkeypatch.undo()
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "S1_synthesis.json").exists()
    (left,) = hidden(tmp_path / "out")
    StudyWriter(tmp_path / "out").prepare()
    assert hidden(tmp_path / "out") == [left]  # another run may be writing it
    os.utime(tmp_path / "out" / left, (0, 0))
    StudyWriter(tmp_path / "out").prepare()
    assert not hidden(tmp_path / "out")
    fill_with(CopyNet(), paths, tmp_path / "out")
    assert results(folder) == expected


def test_two_writers_of_one_study_leave_a_whole_one(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    fill_with(CopyNet(), paths, tmp_path / "alone")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fill_with(CopyNet(), paths, tmp_path / "out"), range(8)))
    assert results(tmp_path / "out" / "S1") == results(tmp_path / "alone" / "S1") and not hidden(tmp_path / "out")


def test_what_stands_in_the_way_is_left_alone(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "S1").write_text("mine")
    with pytest.raises(StudyError, match="S1 is a file: remove it"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    assert (tmp_path / "out" / "S1").read_text() == "mine"
    with pytest.raises(StudyError, match="cannot be written: File name too long"):
        fill_with(CopyNet(), paths, tmp_path / "out", study="x" * 300)
    with pytest.raises(StudyError, match="cannot name a folder"):
        fill_with(CopyNet(), paths, tmp_path / "out", study="line\nbreak")


def test_inputs_are_never_overwritten(tmp_path):
    paths = write_study(tmp_path / "S1", ["t1"])
    with pytest.raises(StudyError, match="holds the input"):
        fill_with(CopyNet(), paths, tmp_path)
    assert os.listdir(tmp_path / "S1") == ["S1_t1.nii.gz"]
    with pytest.raises(StudyError, match="lies in dataset_dir"):
        list_studies(tmp_path, output_dir=tmp_path / "out")
    with pytest.raises(StudyError, match="cannot name a folder"):
        fill_with(CopyNet(), paths, tmp_path / "out", study="../elsewhere")


# ------------------------------------------------------------------------------------------------------------ failures
def truncated(folder):
    path = folder / "BAD_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def other_shape(folder):
    nib.save(nib.Nifti1Image(brain_volume(2, (40, 34, 6)), LPS), folder / "BAD_t2.nii.gz")


def other_place(folder):
    moved = LPS.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(brain_volume(2), moved), folder / "BAD_t2.nii.gz")


def with_values(change):
    def spoil(folder):
        values = brain_volume(1).astype(np.float32)
        nib.save(nib.Nifti1Image(change(values), LPS), folder / "BAD_t1.nii.gz")

    return spoil


def mask_only(folder):
    (folder / "BAD_t1.nii.gz").rename(folder / "BAD_seg.nii.gz")


BAD = {
    "truncated": (truncated, "cannot be read"),
    "other shape": (other_shape, "40 x 34 x 6"),
    "other place": (other_place, "different affines"),
    "NaN": (with_values(lambda v: np.where(v > 2900, np.nan, v)), "NaN or infinite"),
    "z-scored": (with_values(lambda v: np.where(v > 0, v - 1500, 0)), "negative values"),
    "empty": (with_values(np.zeros_like), "0 everywhere"),
    "4-D": (with_values(lambda v: np.stack([v, v], -1)), "4-D"),
    "no contrast": (mask_only, "no contrast"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_study_never_stops_the_others(tmp_path, kind, caplog):
    spoil, words = BAD[kind]
    for name in ("BAD", "GOOD"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    spoil(tmp_path / "in" / "BAD")
    evaluator = evaluate(list_studies(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(StudyError, match=r"^1 of 2 studies failed: BAD; .*failures.json gives the reasons\.$"):
        evaluator.run()
    assert list(evaluator.written) == ["GOOD"] and evaluator.written["GOOD"]["t2"].is_file()
    assert sorted(os.listdir(tmp_path / "out")) == ["GOOD", "failures.json"]
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert failure["study"] == "BAD" and words in failure["reason"] and "\n" not in failure["reason"]
    (logged,) = [r for r in caplog.records if r.levelname == "ERROR" and r.name == "scripts.inference.evaluator"]
    assert failure["reason"] in logged.getMessage() and not logged.exc_info


def test_a_mask_on_file_is_not_needed(tmp_path):
    write_study(tmp_path / "in", ["t1"])
    (tmp_path / "in" / "S1_seg.nii.gz").write_bytes(b"damaged")
    evaluator = evaluate(list_studies(tmp_path / "in"), tmp_path / "out")
    evaluator.run()
    assert list(evaluator.written) == ["S1"]


def test_unexpected_errors_are_collected_with_traceback(tmp_path, caplog):
    class Moody(CopyNet):
        def forward(self, image):
            pred = super().forward(image)
            if self.slices == len(image):
                raise torch.OutOfMemoryError("out of memory\nTried to allocate much")
            return pred * float("nan") if self.slices == 2 * len(image) else pred

    for name in ("A1", "B2", "C3"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    evaluator = evaluate(list_studies(tmp_path / "in"), tmp_path / "out", Moody())
    with pytest.raises(StudyError, match="2 of 3 studies failed: A1, B2"):
        evaluator.run()
    reasons = {failure["study"]: failure["reason"] for failure in evaluator.failures}
    assert reasons["A1"] == "Unexpected OutOfMemoryError: out of memory; the log has the traceback."
    assert "NaN" in reasons["B2"]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    # the next run without failures takes the list away
    evaluate(list_studies(tmp_path / "in"), tmp_path / "out").run()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "B2", "C3"]


def test_failing_writer_is_collected(tmp_path):
    class FullDisk(StudyWriter):
        def __call__(self, data):
            if data["study"] == "A1":
                raise OSError(28, "No space left on device")
            return super().__call__(data)

    for name in ("A1", "B2"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    evaluator = evaluate(list_studies(tmp_path / "in"), None, writer=FullDisk(tmp_path / "out"))
    with pytest.raises(StudyError, match="1 of 2"):
        evaluator.run()
    assert "No space left" in evaluator.failures[0]["reason"] and list(evaluator.written) == ["B2"]


class WatchedWriter(StudyWriter):
    """Waits before it writes, so that the network could run ahead; fails for one study."""

    def __init__(self, output_dir, fails: str = "", pause: float = 0.05) -> None:
        super().__init__(output_dir)
        self.fails, self.pause, self.finished = fails, pause, 0

    def __call__(self, data):
        time.sleep(self.pause)
        try:
            if data["study"] == self.fails:
                raise OSError(28, "No space left on device")
            return super().__call__(data)
        finally:
            self.finished += 1


def run_ignoring_failures(evaluator) -> None:
    try:
        evaluator.run()
    except StudyError:
        assert evaluator.failures


def results(folder) -> dict[str, bytes]:
    """What lies below a folder; of a compressed file, which holds the time of writing, the content."""
    return {
        str(path.relative_to(folder)): (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("num_workers, num_writers", [(0, 1), (0, 3), (2, 0), (2, 2)])
def test_workers_and_writers_change_no_result(tmp_path, num_workers, num_writers):
    for name, keys in {"A1": ["t1"], "B2": ["t1"], "C3": ["flair", "t2"], "D4": ["t1ce"], "E5": ["t2"]}.items():
        write_study(tmp_path / "in" / name, keys, name)
    (tmp_path / "in" / "B2" / "B2_t1.nii.gz").write_bytes(b"damaged")
    items, found = list_studies(tmp_path / "in"), []
    for out, options in (("one by one", (0, 0)), ("at once", (num_workers, num_writers))):
        writer = WatchedWriter(tmp_path / out, fails="D4")
        evaluator = evaluate(items, None, tiny_net(), writer, num_workers=options[0], num_writers=options[1])
        run_ignoring_failures(evaluator)
        assert [failure["study"] for failure in evaluator.failures] == ["B2", "D4"]
        assert list(evaluator.written) == ["A1", "C3", "E5"] and not hidden(tmp_path / out)
        found.append(results(tmp_path / out))
    assert found[0] == found[1] and len(found[0]) == 5 + 4 + 5 + 1


@pytest.mark.parametrize("num_writers", [0, 1, 2])
def test_few_studies_wait_for_the_disk(tmp_path, num_writers):
    names, waiting = ["A1", "B2", "C3", "D4", "E5"], []

    class Ahead(CopyNet):
        seen = 0

        def for_scenario(self, available):
            waiting.append(self.seen - writer.finished)
            self.seen += 1
            return self

    class Slow(WatchedWriter):
        def __call__(self, data):
            # the network may be that far ahead, and gets the time to run further
            wanted, end = min(names.index(data["study"]) + num_writers + 1, len(names)), time.monotonic() + 20
            while network.seen < wanted and time.monotonic() < end:
                time.sleep(0.005)
            return super().__call__(data)

    writer, network = Slow(tmp_path / "out", pause=0.25), Ahead()
    for name in names:
        write_study(tmp_path / "in" / name, ["t1"], name)
    evaluate(list_studies(tmp_path / "in"), None, network, writer, num_writers=num_writers).run()
    assert max(waiting) == num_writers and writer.finished == 5


@pytest.mark.parametrize("num_writers", [0, 2])
def test_an_interruption_leaves_whole_studies_only(tmp_path, num_writers):
    class Interrupted(CopyNet):
        seen = 0

        def for_scenario(self, available):
            self.seen += 1
            if self.seen == 3:
                raise KeyboardInterrupt
            return self

    for name in ("A1", "B2", "C3", "D4"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    writer = WatchedWriter(tmp_path / "out", pause=0.4)
    evaluator = evaluate(list_studies(tmp_path / "in"), None, Interrupted(), writer, num_writers=num_writers)
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "B2"]
    assert all(len(os.listdir(tmp_path / "out" / name)) == 5 for name in ("A1", "B2"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writer")]


def test_wrong_number_of_writers(tmp_path):
    with pytest.raises(ValueError, match="num_writers"):
        evaluate([], tmp_path, num_writers=-1)


def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "out").write_text("a file")
    write_study(tmp_path / "in", ["t1"])
    network = CopyNet()
    with pytest.raises(StudyError, match="cannot be written to"):
        evaluate(list_studies(tmp_path / "in"), tmp_path / "out", network).run()
    assert network.slices == 0


def test_weights(tmp_path, caplog):
    network = SSCFNet(**TINY)
    path = tmp_path / "model.pt"
    with pytest.raises(StudyError, match="train first"):
        load_weights(network, path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(StudyError, match="cannot be read"):
        load_weights(network, path)
    torch.save({"model": network.state_dict(), "epoch": 3}, path)
    with pytest.raises(StudyError, match="no plain state_dict"):
        load_weights(network, path)
    for changes in ({"channels": [8, 8, 8, 8, 8]}, {"bank_size": 6}, {"key_size": 2}):
        torch.save(SSCFNet(**{**TINY, **changes}).state_dict(), path)
        with pytest.raises(StudyError, match=f"does not fit .{next(iter(changes))} is") as caught:
            load_weights(network, path)
        assert str(caught.value).count("\n") == 0
    other = SSCFNet(**TINY)
    torch.save(other.state_dict(), path)
    assert len(load_weights(network, path)) == 64 and "bank" in caplog.text
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_what_to_fill_in(tmp_path):
    for arguments, words in (
        ({}, "No input is given"),
        ({"dataset_dir": tmp_path / "nowhere"}, "does not exist"),
        ({"dataset_dir": tmp_path}, "No study was found"),
        ({"t1": tmp_path / "no.nii.gz"}, "does not exist"),
    ):
        with pytest.raises(StudyError, match=words):
            list_studies(**arguments)
        with pytest.raises(SystemExit, match=words):
            exit_on_user_error(lambda arguments=arguments: list_studies(**arguments))
    paths = write_study(tmp_path / "in", ["t1"])
    (item,) = list_studies(tmp_path / "nowhere", **paths, study=12)
    assert item["study"] == "12" and item["t1"] == paths["t1"]


def test_fill_in_raises_one_sentence(tmp_path):
    paths = write_study(tmp_path, ["t1"], "BAD")
    truncated(tmp_path)
    with pytest.raises(StudyError, match="cannot be read"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    with pytest.raises(StudyError, match="train first"):
        synthesize_study(**paths, output_dir=tmp_path / "out", ckpt_path=tmp_path / "none.pt")
    assert not (tmp_path / "out").exists()


def test_study_is_synthesized_with_the_settings_in_the_weights(tmp_path):
    paths = write_study(tmp_path / "in", ["t1", "t2"], "GOOD")
    torch.manual_seed(0)
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    written = synthesize_study(**paths, output_dir=tmp_path / "out", ckpt_path=tmp_path / "model.pt", device="cpu")
    assert sorted(written) == ["flair", "seg", "t1ce"]
