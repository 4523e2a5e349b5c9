# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Two sites train one network by MonaiAlgo; what they exchange holds nothing of their banks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import BUNDLE_ROOT, tiny_run
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

from scripts.networks.weights import network_from_weights


def client(data: Path, folder: Path) -> MonaiAlgo:
    """One site."""
    configs = ["configs/train.json", "configs/federated.json"]
    run = tiny_run(data, folder, split_fractions=[0.5, 0.5, 0.0], max_epochs=8, epoch_samples=4, bank_size=4)
    made = MonaiAlgo(
        bundle_root=str(BUNDLE_ROOT),
        config_train_filename=configs,
        train_kwargs=dict(run),
        config_evaluate_filename=configs,
        eval_kwargs={**run, "output_dir": str(folder / "evaluation"), "ckpt_path": str(folder / "evaluated.pt")},
        config_filters_filename="configs/federated_filters.json",
        best_model_filepath=str(folder / "model.pt"),
        send_weight_diff=folder.name == "b",
    )
    made.initialize(extra={ExtraItems.CLIENT_NAME: folder.name})
    return made


def test_two_sites_train_one_network_and_keep_their_banks(tmp_path: Path, phantom_cohort: Path) -> None:
    studies = sorted(path for path in phantom_cohort.iterdir() if path.is_dir())
    sites = []
    for name, part in (("a", studies[:2]), ("b", studies[2:4])):
        for study in part:
            shutil.copytree(study, tmp_path / f"data_{name}" / study.name)
        sites.append(client(tmp_path / f"data_{name}", tmp_path / name))
    weights = sites[0].trainer.network.state_dict()  # type: ignore[union-attr]
    initial = {k: v.clone() for k, v in weights.items()}
    for _ in range(2):
        sent = []
        for site in sites:
            site.train(ExchangeObject(weights=weights))
            received = site.get_weights().weights
            assert received.keys() == initial.keys() and not any(name.startswith("bank_") for name in received)
            # b sends differences
            sent.append({k: v + weights[k] if site is sites[1] else v for k, v in received.items()})
        assert any(not torch.equal(sent[0][k], sent[1][k]) for k in initial)
        weights = {k: (sent[0][k] + sent[1][k]) / 2 for k in initial}
    assert max(float((weights[k] - initial[k]).abs().max()) for k in initial) > 0
    patients = []
    for site, name in zip(sites, "ab", strict=True):
        assert site.trainer.state.epoch == 2  # type: ignore[union-attr]
        metrics = site.evaluate(ExchangeObject(weights=weights)).metrics
        assert metrics["psnr"] > 0
        evaluated = site.evaluator.network.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(evaluated[k], weights[k]) for k in weights)
        # the weights of the site hold its bank, and the platform does not get it
        stored = network_from_weights(tmp_path / name / "model_last.pt")
        assert bool(stored.bank_present.any())
        patients.append(set(stored.bank_patient.tolist()))
        best = site.get_weights(extra={ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
        assert best.keys() == initial.keys()
        site.finalize()
    assert patients[0].isdisjoint(patients[1])


def test_weights_that_lack_a_parameter_are_refused(tmp_path: Path, phantom_cohort: Path) -> None:
    site = client(phantom_cohort, tmp_path / "a")
    state = site.trainer.network.state_dict()  # type: ignore[union-attr]
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="the weights lack 1 parameters"):
        site.trainer.network.load_state_dict(state)  # type: ignore[union-attr]
