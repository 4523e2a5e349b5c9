# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Tiny networks, banks and batches that several test files share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow, create_workflow

from scripts.contrasts import (
    CONTRAST_KEYS,
    CONTRASTS,
    NUM_CONTRASTS,
    NUM_TUMOR_CLASSES,
    REGIONS,
    SCENARIOS,
    scenario_name,
    scenario_table,
)
from scripts.networks.availability import network_input
from scripts.networks.memory_bank import BankEntries, MemoryBank
from scripts.networks.sscf import SSCFNet
from scripts.training.step import SSCFTrainingStep

BUNDLE_ROOT = Path(__file__).resolve().parents[1] / "sscf_bundle"

TINY_CHANNELS = (4, 8, 8, 8, 16)


def compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every ``.float()`` of the code under test a ``.double()``.

    The code casts to float32 on purpose; with the cast widened, the same lines can be held against a literal formula to
    float64 precision, where a wrong term cannot hide below a float32 tolerance.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_net(seed: int = 0, **changes: object) -> SSCFNet:
    """A network of a few thousand weights, with every bias and affine weight moved away from its trivial value."""
    settings: dict[str, object] = {"spatial_dims": 2, "channels": TINY_CHANNELS, "bank_size": 6, "key_size": 2}
    torch.manual_seed(seed)
    net = SSCFNet(**{**settings, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


def random_labels(batch: int, size: Sequence[int], seed: int) -> torch.Tensor:
    """B x 1 x spatial classes 0..3, more than half of it background."""
    drawn = torch.randint(0, 8, (batch, 1, *size), generator=generator(seed))
    return torch.where(drawn > NUM_TUMOR_CLASSES, torch.zeros_like(drawn), drawn)


def random_batch(
    available: torch.Tensor, size: Sequence[int] = (32, 32), seed: int = 0, first_patient: int = 1000
) -> dict[str, torch.Tensor]:
    """Keyword arguments of the training step for complete studies under the given scenarios (B x 4 boolean)."""
    batch = available.shape[0]
    target = torch.rand((batch, NUM_CONTRASTS, *size), generator=generator(seed)) * 2 - 1
    identity = torch.arange(batch, dtype=torch.int64) + first_patient
    return {
        "image": network_input(target, available),
        "target": target,
        "label": random_labels(batch, size, seed + 1),
        "has_contrast": torch.ones(batch, NUM_CONTRASTS, dtype=torch.bool),
        "has_mask": torch.ones(batch, dtype=torch.bool),
        "patient": identity.clone(),
        "slice_id": identity + 10**6,
    }


def all_availabilities() -> torch.Tensor:
    """All 16 x 4 availability vectors, those with 0 and with 4 contrasts included."""
    rows = torch.arange(16).unsqueeze(1)
    return (rows >> torch.arange(NUM_CONTRASTS)) & 1 > 0


def random_entries(
    bank: MemoryBank, slice_ids: Sequence[int], seed: int = 0, patients: Sequence[int] | None = None
) -> BankEntries:
    """Finite random entries that fit a bank; the patient is the slice id unless given."""
    num, draw = len(slice_ids), generator(seed)

    def normal(name: str) -> torch.Tensor:
        return torch.randn((num, *getattr(bank, name).shape[1:]), generator=draw)

    return BankEntries(
        key=normal("key"),
        mean=normal("mean"),
        std=normal("std").abs() + 0.1,
        prototype=normal("prototype"),
        class_map=normal("class_map").softmax(dim=2),
        label=torch.randint(0, NUM_TUMOR_CLASSES + 1, (num, *bank.label.shape[1:]), generator=draw).to(torch.uint8),
        present=torch.ones(num, NUM_CONTRASTS, dtype=torch.bool),
        has_mask=torch.ones(num, dtype=torch.bool),
        patient=torch.tensor(slice_ids if patients is None else patients, dtype=torch.int64),
        slice_id=torch.tensor(slice_ids, dtype=torch.int64),
    )


def tiny_step(seed: int = 0, size: Sequence[int] = (32, 32), filled: int = 4, **changes: object) -> SSCFTrainingStep:
    """A training step whose bank holds entries that its own network made of other patients' slices."""
    net = tiny_net(seed, **changes)
    step = SSCFTrainingStep(net, size)
    if filled and net.uses_bank:
        past = random_batch(scenario_table()[:filled], size, seed=seed + 77, first_patient=10)
        step.bank.enqueue(step(**past)["entries"])
    return step


# ------------------------------------------------------------------------------------------------- studies and scores
STUDY_SHAPE = (24, 20, 8)


def write_study(
    folder: Path,
    name: str,
    seed: int = 0,
    keys: Sequence[str] = CONTRAST_KEYS,
    mask: bool = True,
    shape: tuple[int, int, int] = STUDY_SHAPE,
) -> dict[str, str]:
    """Brain in slices 1 to 6, tumor in slices 3 and 4."""
    rng = np.random.default_rng(seed)
    item = {"study": name, "patient": name[:-1]}
    for key in keys:
        volume = np.zeros(shape, np.int16)
        volume[4:-4, 4:-4, 1:7] = rng.integers(1, 2000, (shape[0] - 8, shape[1] - 8, 6))
        volume[5:-4, 4:-4, 1] = 0
        item[key] = str(folder / f"{name}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(volume, np.eye(4)), item[key])
    if mask:
        labels = np.zeros(shape, np.uint8)
        labels[8:12, 8:10, 3], labels[8:12, 8:12, 4] = 2, 4
        item["seg"] = str(folder / f"{name}_seg.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.eye(4)), item["seg"])
    return item


def make_scores(
    seed: int, shift: float = 0.0, studies: Mapping[str, str] | None = None, keep: float = 1.0
) -> pd.DataFrame:
    """Random rows of ``scores.csv`` of a network and a reference method.

    Args:
        seed: of the numbers.
        shift: makes the network's PSNR larger.
        studies: patients by study; None has two studies of the first patient and one of two others.
        keep: share of the rows.
    """
    draw = np.random.default_rng(seed)
    rows = []
    given = {"Case_1a": "Case_1", "Case_1b": "Case_1", "Case_2": "Case_2", "Case_3": "Case_3"}
    for study, patient in (given if studies is None else studies).items():
        for scenario in SCENARIOS:
            place = (study, patient, scenario_name(scenario), sum(scenario))
            for k in np.flatnonzero(np.array(scenario) == 0):
                for method, better in (("network", shift), ("zero_filling", -1.0)):
                    # scenarios, contrasts and patients differ, so that the order of averaging shows
                    level = 20 + better + k + 2 * sum(scenario) + 0.2 * sum(map(ord, patient))
                    measures = (("psnr", level + draw.normal()), ("lpips", 0.2 + 0.01 * draw.normal()))
                    rows += [(*place, CONTRASTS[k], method, "per_slice", "whole", *measure) for measure in measures]
            for region in REGIONS:
                rows.append((*place, region, "network", "segmentation", "whole", "dice", draw.uniform()))
    columns = ["study", "patient", "scenario", "available", "of", "method", "protocol", "region", "score", "value"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame[draw.random(len(frame)) < keep]


def write_scores(folder: Path, frame: pd.DataFrame, **metadata: object) -> Path:
    """An evaluation's folder."""
    folder.mkdir(parents=True)
    frame.to_csv(folder / "scores.csv", index=False)
    usual = {
        "cohort": "Phantom_8",
        "part": "test",
        "split": "fedcba9876543210",
        "seed": 3,
        "sha256": "0123456789abcdef",
    }
    usual["protocols"] = {"per_slice": "2-D"}
    (folder / "metrics.json").write_text(json.dumps({"metadata": usual | metadata, "summary": []}))
    return folder


def literal_mean(frame: pd.DataFrame, score: str, of: str | None = None, **chosen: object) -> float:
    """Mean over scenarios of the mean over targets of the mean over studies of the network, in loops."""
    rows = [row for row in frame.to_dict("records") if row["score"] == score and row["method"] == "network"]
    rows = [row for row in rows if all(row[key] == value for key, value in chosen.items()) and of in (None, row["of"])]
    scenario_means = []
    for scenario in {row["scenario"] for row in rows}:
        means = []
        for target in {row["of"] for row in rows if row["scenario"] == scenario}:
            values = [row["value"] for row in rows if (row["scenario"], row["of"]) == (scenario, target)]
            means.append(sum(values) / len(values))
        scenario_means.append(sum(means) / len(means))
    return sum(scenario_means) / len(scenario_means)


# ------------------------------------------------------------------------------------------------- runs of the bundle
#: A run of the training config that takes a second or two.
TINY_RUN: dict[str, object] = {
    "spacing": 4.0,
    "image_size": 64,
    "channels": [4, 8, 8, 8, 8],
    "discriminator_channels": 4,
    "bank_size": 8,
    "split_fractions": [0.6, 0.2, 0.2],
    "batch_size": 2,
    "epoch_samples": 8,
    "max_epochs": 4,
    "decay_start": 2,
    "val_interval": 2,
    "val_scenarios": ["FLAIR+T2"],
    "val_slice_count": 2,
    "num_workers": 0,
    "prepare_workers": 0,
    "amp": False,
}


def tiny_run(cohort: Path, output_dir: Path, **changes: object) -> dict[str, object]:
    """Overrides of ``train.json`` for a tiny run that writes below ``output_dir`` alone."""
    paths = {
        "dataset_dir": str(cohort),
        "output_dir": str(output_dir),
        "ckpt_path": str(output_dir / "model.pt"),
        "last_ckpt_path": str(output_dir / "model_last.pt"),
    }
    return {**TINY_RUN, **paths, **changes}


def config_files(*names: str, root: Path = BUNDLE_ROOT) -> list[str]:
    """Paths of configs of the bundle by their names without the suffix."""
    return [str(root / "configs" / f"{name}.json") for name in names]


def bundle_command(run_id: str, configs: Sequence[str], overrides: Mapping[str, object]) -> list[str]:
    """Arguments of ``python -m monai.bundle`` for a run."""
    options = [f"--{name}={value}" for name, value in overrides.items()]
    return ["run", run_id, f"--config_file={list(configs)}", *options]


def run_python(arguments: Sequence[str], log: Path, cwd: Path = BUNDLE_ROOT, timeout: float = 300.0) -> tuple[int, str]:
    """Runs Python in a process of its own, on one thread; returns its exit status and all that it printed.

    What it prints goes to a file: through a pipe, the data loader workers of a killed process would be waited for.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": ""}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, stdout=file, stderr=file, timeout=timeout
        )
    return done.returncode, log.read_text()


def run_bundle(
    run_id: str, configs: Sequence[str], overrides: Mapping[str, object], log: Path, cwd: Path = BUNDLE_ROOT
) -> tuple[int, str]:
    """``python -m monai.bundle run`` as a user types it; see ``run_python``."""
    return run_python(["-m", "monai.bundle", *bundle_command(run_id, configs, overrides)], log, cwd)


def bundle_workflow(*configs: str, **settings: object) -> ConfigWorkflow:
    """A workflow of configs by their names, on the CPU, that is still to be run."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    kind = "train" if "train" in configs else "inference"
    return create_workflow(
        config_file=config_files(*configs), workflow_type=kind, logging_file=False, **{"device": "cpu", **settings}
    )


def train_in_process(configs: Sequence[str], overrides: Mapping[str, object]) -> ConfigWorkflow:
    """The same run within this process."""
    workflow = create_workflow(config_file=list(configs), workflow_type="train", logging_file=False, **overrides)
    workflow.run()
    return workflow


def assert_same(ours: object, theirs: object, where: str = "state") -> None:
    """Holds two nested states equal: every tensor bit by bit, everything else by ``==``."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert ours == theirs, where


# --------------------------------------------------------------------------------------------------------- DICOM series
def write_dicom_series(folder: Path, volume: np.ndarray, affine: np.ndarray, description: str = "scan") -> Path:
    """Writes an X x Y x Z volume of whole numbers as an MR series, with an affine from voxels to mm in RAS.

    The files are named and written against the order of the slices.
    """
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.diag([-1, -1, 1, 1]) @ affine  # DICOM is LPS
    spacing = np.linalg.norm(axes[:3, :3], axis=0)
    study, series, frame = (pydicom.uid.generate_uid() for _ in range(3))
    for z in reversed(range(volume.shape[2])):
        image = pydicom.Dataset()
        image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.MRImageStorage, pydicom.uid.generate_uid()
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "Doe^Jane", "4711", "", "F"
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20260101", "120000", "1", "A1"
        image.ReferringPhysicianName, image.PositionReferenceIndicator, image.PatientPosition = "", "", "HFS"
        image.Modality, image.ImageType, image.Manufacturer = "MR", ["ORIGINAL", "PRIMARY", "M"], "Scanner"
        image.SeriesNumber, image.InstanceNumber, image.SeriesDescription = 3, z + 1, description
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions, image.MRAcquisitionType = (
            "SE",
            "NONE",
            "",
            "2D",
        )
        image.EchoTime, image.RepetitionTime, image.EchoTrainLength = 90, 4000, 1
        image.ImagePositionPatient = [float(v) for v in (axes @ [0, 0, z, 1])[:3]]
        image.ImageOrientationPatient = [float(v) for v in (axes[:3, :2] / spacing[:2]).T.ravel()]
        image.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        image.SliceThickness = float(spacing[2])
        image.Rows, image.Columns = volume.shape[1], volume.shape[0]
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelData = np.ascontiguousarray(volume[..., z].T).astype("<u2").tobytes()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.save_as(folder / f"IM{volume.shape[2] - z:03d}", enforce_file_format=True)
    return folder
