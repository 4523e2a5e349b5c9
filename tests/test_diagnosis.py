# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Every part of SSCF acts after a short training, and the diagnosis shows it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from builders import TINY_CHANNELS, config_files, tiny_net, tiny_run, train_in_process
from monai.bundle import ConfigWorkflow

from scripts.research.diagnosis import GROUPS, interventions

#: Least change of missing contrasts (of a range of 2) or of probabilities in the tumor after a training of seconds.
FLOORS = {
    "CITIM zero": ("mask_change", 1e-5),
    "CITIM constant over space": ("mask_change", 1e-5),
    "CITIM, classes of the bank exchanged": ("mask_change", 1e-5),
    "mask of the second pass zero": ("image_change", 1e-4),
    "mask of the second pass true": ("image_change", 1e-4),
    "CCP zero": ("image_change", 1e-3),
    "retrieval random": ("image_change", 1e-4),
    "retrieval mean of the bank": ("image_change", 1e-4),
    "AdaIN with its own statistics": ("image_change", 1e-3),
    "CBAM, channel attention constant": ("image_change", 1e-4),
    "CBAM, spatial attention constant": ("image_change", 1e-4),
}


@pytest.fixture(scope="module")
def diagnosis(phantom_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    # with twice the learning rate the mask is lost, and what CITIM does depends on rounding
    overrides = tiny_run(phantom_cohort, folder, learning_rate=0.005, seed=1, epoch_samples=32, shared_scenarios=True)
    train_in_process(config_files("train"), overrides)
    workflow = ConfigWorkflow(
        config_file=config_files("train", "diagnosis"),
        workflow_type="train",
        run_id="diagnosis",
        logging_file=False,
        **{**overrides, "diagnosis_batches": 2, "val_scenarios": ["FLAIR", "T1+T1ce"]},
    )
    workflow.initialize()
    workflow.run()
    return folder


@pytest.mark.slow
def test_every_part_acts_after_a_short_training(diagnosis: Path) -> None:
    table = pd.read_csv(diagnosis / "diagnosis" / "effects.csv", index_col=0)
    assert set(table.index) == {"nothing", *FLOORS}
    assert table.loc["nothing", "image_change"] == 0 and table.loc["nothing", "mask_change"] == 0
    for name, (column, floor) in FLOORS.items():
        assert table.loc[name, column] > floor, name
    assert {"psnr", "ssim", "dice_WT"} <= set(table.columns)


@pytest.mark.slow
def test_gradient_shares_add_up(diagnosis: Path) -> None:
    table = pd.read_csv(diagnosis / "diagnosis" / "gradient_shares.csv", index_col=0)
    assert {"synthesis", "adversarial", "feature", "ctdl", "head", "bce", "dice", "tumor", "reconstruction"} == set(
        table.index
    )
    for column in ("value", *GROUPS):
        assert table[column].sum() == pytest.approx(1, abs=1e-4)
    assert "effects" in (diagnosis / "diagnosis" / "diagnosis.md").read_text()


def test_interventions_leave_the_network_as_it_was() -> None:
    net = tiny_net(companion=TINY_CHANNELS).eval()
    image = torch.rand(2, 8, 32, 32)
    before, state = net(image), {name: value.clone() for name, value in net.state_dict().items()}
    for name, context in interventions(net, lambda: torch.ones(2, 1, 32, 32)).items():
        with context:
            changed = not torch.equal(net(image), before)
        assert changed or name != "companion"
    assert torch.equal(net(image), before)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
