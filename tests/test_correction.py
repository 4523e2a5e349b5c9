# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The correction of a site: against literal least squares, and from the run to the written file."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import TINY_CHANNELS, bundle_workflow, generator, tiny_net

from scripts.contrasts import CONTRAST_KEYS, SCENARIOS, StudyError, scenario_name
from scripts.data.datalist import find_studies
from scripts.data.randomness import stable_hash
from scripts.inference.calibration import fit_correction
from scripts.inference.postprocessing import CorrectPredictiond
from scripts.inference.preprocessing import inference_transforms
from scripts.inference.synthesize import synthesize_study
from scripts.inference.trust import central_slices
from scripts.networks.availability import network_input
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.weights import read_state, save_weights

PREPROCESSING = {"image_size": 64, "spacing": 4.0, "scaling": "brain"}


def run_correcting(tmp_path: Path, data: Path) -> dict:
    paths = {"dataset_dir": data, "output_dir": tmp_path / "out"}
    paths |= {"source_path": tmp_path / "model.pt", "site_path": tmp_path / "site.pt"}
    bundle_workflow("train", "build_bank", run_id="correcting", correction_slices=3, **paths).run()
    return read_state(tmp_path / "site.pt")[1]


def test_correction_is_the_line_of_least_squares_where_it_helps_patients_left_out(
    tmp_path: Path, phantom_cohort: Path
) -> None:
    net, transform = tiny_net().eval(), inference_transforms(**PREPROCESSING)
    save_weights(tmp_path / "model.pt", net, {"preprocessing": PREPROCESSING, "intensities": {"studies": 1}})
    settings = run_correcting(tmp_path, phantom_cohort)
    assert settings["preprocessing"] == PREPROCESSING and settings["intensities"] == {"studies": 1}
    assert settings["correction"]["patients"] == 5
    found, kept = settings["correction"]["scenarios"], 0
    slices = [central_slices(transform(item)["image"].as_tensor(), 3, 1) for item in find_studies(phantom_cohort)]
    for scenario in SCENARIOS[3::4]:
        available = torch.tensor(scenario).bool()
        with torch.no_grad():
            preds = [net(network_input(x[:, :4], available.expand(len(x), -1))) for x in slices]
        brains = [(x[:, :4][:, available] > -1).any(dim=1) for x in slices]
        for i in (~available).nonzero().flatten().tolist():
            pairs = [
                [((y[:, i].clamp(-1, 1)[b] + 1) / 2).double().numpy() for y in (p, x)]
                for p, x, b in zip(preds, slices, brains, strict=True)
            ]

            def line(chosen: list) -> np.ndarray:
                root = np.concatenate([np.full(len(p), len(p) ** -0.5) for p, _ in chosen])
                p, t = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
                return np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1) * root[:, None], t * root, rcond=None)[0]

            gains = []
            for k, (p, t) in enumerate(pairs):
                slope, offset = line(pairs[:k] + pairs[k + 1 :])
                gains.append(10 * np.log10(((p - t) ** 2).mean() / ((slope * p + offset - t) ** 2).mean()))
            corrected = found.get(scenario_name(scenario), {}).get(CONTRAST_KEYS[i])
            assert (corrected is not None) == (np.mean(gains) > 0)
            if corrected is not None:
                kept += 1
                assert corrected == pytest.approx([*line(pairs), np.mean(gains)], rel=2e-3, abs=2e-3)
    assert kept


def test_only_a_line_that_helps_patients_left_out_is_kept_and_it_is_that_of_the_shown_brain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T1 is a line of what is synthesized in the brain of FLAIR; T2 is it plus an offset of each patient's own."""
    pred = torch.linspace(-0.6, 0.6, 7 * 36).reshape(7, 6, 6)
    network = torch.nn.Conv2d(1, 1, 1)
    network.forward = lambda image: pred.expand(len(image), -1, -1, -1)  # type: ignore[method-assign]
    items = []
    for number, offset in enumerate((0.2, -0.2, 0.2, -0.2)):
        image = torch.rand((8, 6, 6, 3), generator=generator(number)) * 2 - 1
        image[1], image[3] = 0.5 * pred[1, ..., None] - 0.3, pred[3, ..., None] + offset
        image[0, 3:] = -1  # no brain to FLAIR
        image[1, 3:] = 0.9
        items.append({"study": str(number), "image": image})
    monkeypatch.setattr("scripts.inference.calibration.complete_studies", lambda *_: items)
    found = fit_correction(None, None, network, 1)["scenarios"]["FLAIR"]  # type: ignore[arg-type]
    # -0.3 in [-1, 1]
    assert found["t1"][:2] == pytest.approx([0.5, 0.1], abs=1e-4) and "t2" not in found


def test_inference_applies_the_correction_of_the_weights(tmp_path: Path, phantom_cohort: Path) -> None:
    scenarios = {"FLAIR+T2": {"t1": [0.5, 0.2, 1.0]}, "T2": {"t1": [9.0, 9.0, 9.0]}}
    settings = {"preprocessing": PREPROCESSING, "correction": {"patients": 3, "scenarios": scenarios}}
    save_weights(tmp_path / "model.pt", tiny_net(), settings)
    item = find_studies(phantom_cohort)[0]
    written, records = [], []
    for correct in (False, True):
        paths = synthesize_study(
            flair=item["flair"], t2=item["t2"], output_dir=tmp_path / str(correct), correct=correct, device="cpu",
            ckpt_path=str(tmp_path / "model.pt"), trust=False, checks=False,
        )  # fmt: skip
        written.append({key: nib.load(path).get_fdata() for key, path in paths.items()})
        records.append(json.loads(next(paths["t1"].parent.glob("*_synthesis.json")).read_text()))
    plain, corrected = written
    brain = plain["t1ce"] > 0
    np.testing.assert_allclose(corrected["t1"][brain], (0.5 * plain["t1"] + 0.2)[brain], atol=1e-5)
    np.testing.assert_array_equal(corrected["t1ce"], plain["t1ce"])
    assert [record["correction"] for record in records] == [{}, {"t1": [0.5, 0.2, 1.0]}]


def test_slices_are_corrected_as_volumes_are() -> None:
    pred = torch.rand(7, 4, 4, 3) * 2 - 1
    planes = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None, None, None].expand(-1, 4, 4, 3)
    item = {"image": torch.cat([torch.zeros(4, 4, 4, 3), planes]), "pred": pred.clone()}
    found = CorrectPredictiond("pred", {"FLAIR+T1+T2": {"t1ce": [2.0, -0.1, 0.0]}})(item)["pred"]
    torch.testing.assert_close((found[2] + 1) / 2, 2 * (pred[2] + 1) / 2 - 0.1)
    assert torch.equal(found[[0, 1, 3, 4, 5, 6]], pred[[0, 1, 3, 4, 5, 6]])


def test_patients_of_the_bank_are_left_out_and_too_few_are_refused(tmp_path: Path, phantom_cohort: Path) -> None:
    net, patients = tiny_net(), [str(item["patient"]) for item in find_studies(phantom_cohort)]
    for known, expected in ((2, 3), (3, None)):
        net.bank_patient[:known] = torch.tensor([stable_hash(patient) for patient in patients[:known]])
        net.bank_present[:known] = True
        save_weights(tmp_path / "model.pt", net, {"preprocessing": PREPROCESSING})
        if expected is None:
            with pytest.raises(StudyError, match="needs 3 patients or more that are not in the bank, got 2"):
                run_correcting(tmp_path, phantom_cohort)
        else:
            assert run_correcting(tmp_path, phantom_cohort)["correction"]["patients"] == expected
    # a network without a bank and without scenarios of its own
    save_weights(tmp_path / "model.pt", PlainUNet(2, TINY_CHANNELS), {"preprocessing": PREPROCESSING})
    assert run_correcting(tmp_path, phantom_cohort)["correction"]["patients"] == 5
