# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Slices under scenarios, the check for known patients, and the evaluation engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import random_batch, tiny_net
from ignite.engine import Engine, Events
from ignite.metrics import MetricsLambda
from torch import nn
from torch.utils.data import DataLoader, Dataset

from scripts.contrasts import SCENARIOS, scenario_name, scenario_table
from scripts.evaluator import ScenarioSlices, SliceEvaluator, UnseenPatients
from scripts.metrics import ScenarioScores
from scripts.network import read_availability

SIZE = (32, 32)


class Slices(Dataset):
    """Three slices of two studies, the second of which has no T1."""

    def __init__(self) -> None:
        self.batch = random_batch(scenario_table()[:3], SIZE)
        del self.batch["image"]
        self.batch["study_index"] = torch.tensor([0, 0, 1])
        self.batch["has_contrast"][2, 1] = False
        self.batch["target"][2, 1] = -1.0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


# ------------------------------------------------------------------------------------------------------ dataset
def test_every_slice_is_shown_under_all_scenarios_one_after_the_other() -> None:
    data = Slices()
    shown = ScenarioSlices(data)
    assert len(shown) == 3 * len(SCENARIOS)
    for i in range(len(shown)):
        item, scenario = shown[i], i % len(SCENARIOS)
        expected = torch.tensor(SCENARIOS[scenario], dtype=torch.bool) & data[i // len(SCENARIOS)]["has_contrast"]
        assert int(item["scenario"]) == scenario
        assert torch.equal(item["target"], data[i // len(SCENARIOS)]["target"])
        assert torch.equal(item["available"], expected)
        assert torch.equal(read_availability(item["image"].unsqueeze(0))[0], expected)
        for k in range(4):
            assert torch.equal(item["image"][k], item["target"][k] if expected[k] else torch.full(SIZE, -1.0))


def test_named_scenarios_are_taken_in_the_given_order() -> None:
    shown = ScenarioSlices(Slices(), ["T1ce+T2", "FLAIR"])
    assert len(shown) == 6
    named = [scenario_name(SCENARIOS[int(shown[i]["scenario"])]) for i in range(6)]
    assert named == ["T1ce+T2", "FLAIR"] * 3


def test_unknown_scenario_is_refused_by_a_sentence_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown scenario T2\+FLAIR: write one of FLAIR, T1, .*FLAIR\+T2") as refused:
        ScenarioSlices(Slices(), ["FLAIR", "T2+FLAIR"])
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------ known patients
def test_patients_of_the_bank_are_not_evaluated() -> None:
    net = tiny_net()
    net.bank_patient.copy_(torch.tensor([11, 12, 13, 14, 0, 0]))
    net.bank_present[:4] = True
    net.bank_present[3] = False  # a rejected entry holds nothing of patient 14
    engine = Engine(lambda *_: None)
    UnseenPatients(net, torch.tensor([5, 12, 12, 13])).attach(engine)
    with pytest.raises(SystemExit, match="2 of the evaluated patients are in the memory bank"):
        engine.run([0])
    # empty slots have the patient 0
    unseen = Engine(lambda *_: None)
    UnseenPatients(net, torch.tensor([0, 5, 14])).attach(unseen)
    assert unseen.run([0]).iteration == 1


# --------------------------------------------------------------------------------------------------------- engine
class Watched(nn.Module):
    """A network that notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = tiny_net(), []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), image.shape[0]))
        return self.net(image)


def evaluate(network: nn.Module, **changes: Any) -> tuple[SliceEvaluator, list[dict[str, torch.Tensor]]]:
    loader = DataLoader(ScenarioSlices(Slices(), ["FLAIR+T2", "T1"]), 4)
    scores = ScenarioScores(["a", "b"])
    key = {"key_psnr": MetricsLambda(lambda means: means["psnr"], scores)}
    evaluator = SliceEvaluator(
        "cpu", loader, network, key_val_metric=key, additional_metrics={"scores": scores}, **changes
    )
    outputs: list[dict[str, torch.Tensor]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    evaluator.run(3)
    return evaluator, outputs


def test_evaluator_adds_the_prediction_to_the_batch_and_leaves_the_mode_as_it_was() -> None:
    network = Watched().train()
    evaluator, outputs = evaluate(network)
    assert network.calls == [(False, False, 4), (False, False, 2)] and network.training
    shown = ScenarioSlices(Slices(), ["FLAIR+T2", "T1"])
    with torch.no_grad():
        expected = network.net.eval()(torch.stack([shown[i]["image"] for i in range(6)]))
    torch.testing.assert_close(torch.cat([o["pred"] for o in outputs]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([o["study_index"] for o in outputs]), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert evaluator.state.epoch == 3
    metrics = evaluator.state.metrics
    assert 0 < metrics["psnr"] == metrics["scores"]["psnr"] == metrics["key_psnr"] < 100


def test_evaluator_calls_the_given_inferer_and_gives_float32_under_autocast() -> None:
    network = Watched()
    seen = []

    def inferer(image: torch.Tensor, called: nn.Module) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return called(image)

    _, outputs = evaluate(network, inferer=inferer, amp=True)
    assert seen == [True, True]
    assert all(o["pred"].dtype == torch.float32 for o in outputs)
