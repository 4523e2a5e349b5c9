# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Slices and studies under scenarios, the check for known patients, the evaluation engines and a whole evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from builders import config_files, random_batch, tiny_net, tiny_run
from ignite.engine import Engine, Events
from ignite.metrics import MetricsLambda
from monai.bundle import ConfigWorkflow
from torch import nn
from torch.utils.data import DataLoader, Dataset

from scripts.contrasts import CONTRASTS, REGIONS, SCENARIOS, StudyError, scenario_name, scenario_table
from scripts.evaluation.bootstrap import COLUMNS, read_scores
from scripts.evaluation.evaluator import (
    ScenarioEvaluator,
    ScenarioSlices,
    SliceEvaluator,
    StudyScenarios,
    StudyScores,
    StudyVolumes,
    UnseenPatients,
)
from scripts.evaluation.metrics import ScenarioScores, fill_background, mean_of_available, zero_filling
from scripts.evaluation.protocols import StudyTruth, VolumeProtocol, region_dice
from scripts.networks.sscf import SSCFNet, network_input, read_availability

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
    with pytest.raises(StudyError, match="2 of the evaluated patients are in the memory bank"):
        engine.run([0])
    # empty slots have the patient 0
    unseen = Engine(lambda *_: None)
    UnseenPatients(net, torch.tensor([0, 5, 14])).attach(unseen)
    assert unseen.run([0]).iteration == 1


def test_network_without_a_bank_may_see_every_patient() -> None:
    engine = Engine(lambda *_: None)
    UnseenPatients(nn.Conv2d(8, 7, 1), torch.tensor([5])).attach(engine)
    assert engine.run([0]).iteration == 1


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


# -------------------------------------------------------------------------------------------------- whole studies
class Cached(Dataset):
    """Slices of three studies in no order: b has no T1, c no mask; of a, slice 6 has no brain and is not there."""

    studies = ("a", "b", "c")
    index = torch.tensor([[0, 7], [1, 3], [0, 5], [2, 1], [0, 4], [1, 2], [2, 0]])

    def __init__(self) -> None:
        rows = len(self.index)
        self.batch = random_batch(scenario_table()[:rows], SIZE)
        self.slice_ids = self.batch["slice_id"]
        self.batch["target"][..., :4, :] = -1.0
        of = self.index[:, 0]
        self.batch["has_contrast"][of == 1, 1] = False
        self.batch["target"][of == 1, 1] = -1.0
        self.batch["has_mask"][of == 2] = False
        self.batch["label"][of == 2] = 0
        del self.batch["image"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


class Chosen:
    """The slices of the choice ``largest_tumor``."""

    def __init__(self, data: Cached) -> None:
        self.slice_ids = data.slice_ids[[0, 1, 3]]


ITEMS = [{"study": name, "patient": f"patient {name}"} for name in "cbaz"]


def volumes(dense: bool = True) -> StudyVolumes:
    data = Cached()
    return StudyVolumes(data, ITEMS, Chosen(data), dense)


def test_study_is_its_slices_in_order() -> None:
    data, studies = Cached(), volumes(dense=False)
    assert len(studies) == 3
    item = studies[0]
    assert (item["study"], item["patient"], item["first"]) == ("a", "patient a", 4)
    for key in ("target", "label"):
        assert torch.equal(item[key], torch.stack([data[i][key] for i in (4, 2, 0)]))
    assert item["largest_tumor"].tolist() == [False, False, True]
    assert studies[1]["has_contrast"].tolist() == [True, False, True, True]
    assert bool(studies[1]["has_mask"]) and not bool(studies[2]["has_mask"])


def test_slice_without_brain_between_others_is_background_in_a_whole_study() -> None:
    data, item = Cached(), volumes()[0]
    assert item["target"].shape == (4, 4, *SIZE) and item["largest_tumor"].tolist() == [False, False, False, True]
    for z, row in ((0, 4), (1, 2), (3, 0)):
        assert torch.equal(item["target"][z], data[row]["target"])
        assert torch.equal(item["label"][z], data[row]["label"])
    assert bool((item["target"][2] == -1).all()) and not item["label"][2].any()
    assert volumes()[1]["target"].shape[0] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_study_is_shown_under_the_scenarios_whose_contrasts_it_has(workers: int) -> None:
    loader = StudyScenarios(volumes(), num_workers=workers)
    shown = [(item["study"], item["scenario"]) for item in loader]
    with_t1 = [i for i, row in enumerate(SCENARIOS) if row[1]]
    assert shown == [
        (study, i) for study in "abc" for i in range(14) if study != "b" or i not in with_t1
    ]  # fmt: skip
    assert len(loader) == len(shown) == 14 + 7 + 14


def test_processes_share_the_studies() -> None:
    shown = [
        [item["study"] for item in StudyScenarios(volumes(), ["T2", "FLAIR"], rank=rank, world_size=2)]
        for rank in (0, 1)
    ]
    assert shown == [["a", "a", "c", "c"], ["b", "b"]]


def test_more_processes_than_studies_are_refused() -> None:
    with pytest.raises(StudyError, match="3 studies cannot be shared by 4 processes"):
        StudyScenarios(volumes(), rank=1, world_size=4)


def test_scenarios_that_no_study_has_are_refused() -> None:
    data = volumes()
    data.has_contrast[:, 3] = False
    with pytest.raises(StudyError, match="No evaluated study has the contrasts"):
        StudyScenarios(data, ["T2"])
    with pytest.raises(ValueError, match="unknown scenario"):
        StudyScenarios(data, ["T3"])


@pytest.mark.parametrize("specialized", [True, False])
def test_evaluator_fills_in_a_study_in_batches(specialized: bool) -> None:
    network: nn.Module = tiny_net() if specialized else Watched()
    outputs: list[dict[str, Any]] = []
    evaluator = ScenarioEvaluator("cpu", StudyScenarios(volumes(), ["FLAIR+T2", "T1"]), network.train(), batch_size=3)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    evaluator.run()
    assert network.training and set(evaluator.seconds) == {"a", "b", "c"}
    assert [o["study"] for o in outputs] == ["a", "a", "b", "c", "c"]
    if isinstance(network, Watched):
        assert [n for *_, n in network.calls] == [3, 1, 3, 1, 2, 2, 2]
        assert not any(training or grad for training, grad, _ in network.calls)
    net = network if isinstance(network, SSCFNet) else network.net
    for output in outputs:
        available = torch.tensor(SCENARIOS[output["scenario"]], dtype=torch.bool).expand(len(output["target"]), -1)
        assert torch.equal(output["available"], available)
        with torch.no_grad():
            expected = net.eval()(network_input(output["target"], available))
        missing = [*(~available[0]).nonzero().flatten().tolist(), 4, 5, 6]
        torch.testing.assert_close(output["pred"][:, missing], expected[:, missing], rtol=1e-4, atol=1e-5)


def filled_in(scenario: str, index: int = 0) -> dict[str, Any]:
    item = volumes()[index]
    row = [scenario_name(s) for s in SCENARIOS].index(scenario)
    available = torch.tensor(SCENARIOS[row], dtype=torch.bool).expand(len(item["target"]), -1)
    pred = torch.rand((len(item["target"]), 7, *SIZE), generator=torch.Generator().manual_seed(row))
    return {**item, "scenario": row, "available": available, "pred": pred}


def test_rows_are_the_scores_of_the_network_and_the_floors_on_one_background() -> None:
    scores = StudyScores([VolumeProtocol()], {"mean_of_available": mean_of_available, "zero_filling": zero_filling})
    outputs = [filled_in("FLAIR+T2"), filled_in("T1"), filled_in("FLAIR+T2", index=1)]
    for output in outputs:
        scores.update(output)
    frame = pd.DataFrame(scores.rows)
    assert set(frame) == set(COLUMNS) and not frame.duplicated([c for c in COLUMNS if c != "value"]).any()
    assert scores.studies == ["a", "b"] and scores.regions == {"WT": 2, "TC": 2, "ET": 2}
    images = frame[frame["score"] == "psnr"]
    targets = images[(images["method"] == "network") & (images["region"] == "whole")]
    assert [tuple(row) for row in targets[["study", "patient", "scenario", "available", "of"]].to_numpy()] == [
        ("a", "patient a", "FLAIR+T2", 2, "T1"),
        ("a", "patient a", "FLAIR+T2", 2, "T1ce"),
        *(("a", "patient a", "T1", 1, name) for name in ("FLAIR", "T1ce", "T2")),
        ("b", "patient b", "FLAIR+T2", 2, "T1ce"),  # b has no T1
    ]
    output, t1ce = outputs[0], CONTRASTS.index("T1ce")
    target, available = output["target"], output["available"]
    truth = StudyTruth((target + 1) / 2, (target > -1).any(1), output["label"][:, 0] > 0, output["largest_tumor"])
    protocol = VolumeProtocol()
    protocol.start(truth)
    predictions = {
        "network": output["pred"][:, :4],
        "mean_of_available": ((target[:, 0] + target[:, 3]) / 2).unsqueeze(1).expand_as(target),
        "zero_filling": torch.full_like(target, -1.0),
    }
    for method, prediction in predictions.items():
        filled = (fill_background(prediction, target, available)[:, t1ce] + 1) / 2
        part = frame[(frame["study"] == "a") & (frame["scenario"] == "FLAIR+T2") & (frame["of"] == "T1ce")]
        part = part[part["method"] == method].set_index(["region", "score"])["value"]
        for key, value in protocol.score(t1ce, filled)["volume"].items():
            assert part[key] == pytest.approx(float(value)), (method, key)
    dice = frame[frame["protocol"] == "segmentation"]
    assert set(dice["method"]) == {"network"} and len(dice) == 3 * 3
    expected = region_dice(output["pred"][:, 4:], output["label"]).tolist()
    assert dice["value"].tolist()[:3] == pytest.approx(expected) and dice["of"].tolist()[:3] == list(REGIONS)


def test_missing_contrasts_reach_no_floor_and_no_mask_gives_no_region() -> None:
    seen = []

    def reference_method(target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        seen.append(target.clone())
        return zero_filling(target, available)

    scores = StudyScores([VolumeProtocol()], {"reference_method": reference_method})
    output = filled_in("T1ce+T2", index=2)
    scores.update(output)
    assert bool((seen[0][:, :2] == -1).all()) and torch.equal(seen[0][:, 2:], output["target"][:, 2:])
    assert {row["region"] for row in scores.rows} == {"whole"} and {row["score"] for row in scores.rows} == {
        "psnr",
        "nmse",
        "ssim",
    }
    assert not scores.regions


def test_network_without_segmentation_has_no_dice() -> None:
    scores = StudyScores([], {})
    output = filled_in("T1")
    output["pred"][:, 4:] = 0
    scores.update(output)
    assert scores.rows == []


def test_scores_start_anew_with_every_run() -> None:
    scores = StudyScores([], {})
    engine = Engine(lambda _, batch: batch)
    scores.attach(engine)
    engine.run([filled_in("T1"), filled_in("FLAIR")])
    assert len(scores.rows) == 6
    engine.run([filled_in("T1")])
    assert len(scores.rows) == 3 and scores.studies == ["a"]


# ------------------------------------------------------------------------------------------------ the whole evaluation
def evaluate_bundle(cohort: Path, output_dir: Path, **changes: object) -> ConfigWorkflow:
    """``evaluating`` of an untrained network on the tiny cohort."""
    overrides = {**tiny_run(cohort, output_dir), "lpips": False, "bootstrap_draws": 20, **changes}
    if not (output_dir / "model.pt").is_file():
        torch.manual_seed(0)
        output_dir.mkdir(parents=True, exist_ok=True)
        net = SSCFNet(channels=overrides["channels"], bank_size=overrides["bank_size"])  # type: ignore[arg-type]
        torch.save(net.state_dict(), output_dir / "model.pt")
    workflow = ConfigWorkflow(
        config_file=config_files("train", "evaluate"), workflow_type="train", logging_file=False, **overrides
    )
    workflow.initialize()
    workflow.run()
    return workflow


def test_evaluation_of_a_bundle_writes_all_conventions_and_floors(
    phantom_cohort: Path,
    tmp_path: Path,
) -> None:
    evaluate_bundle(phantom_cohort, tmp_path, scenarios=["FLAIR+T1+T2", "T1ce"])
    frame = read_scores(tmp_path / "evaluation" / "scores.csv")
    assert set(frame["protocol"]) == {"per_slice", "volume", "brasyn", "brasyn_reference", "segmentation"}
    assert set(frame["method"]) == {"network", "mean_of_available", "nearest_contrast", "zero_filling"}
    assert set(frame.loc[frame["protocol"] == "brasyn", "scenario"]) == {"FLAIR+T1+T2"}
    assert set(frame.loc[frame["protocol"] == "volume", "scenario"]) == {"FLAIR+T1+T2", "T1ce"}
    assert np.isfinite(frame["value"]).all() and "lpips" not in set(frame["score"])
    report = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    facts = report["facts"]
    assert facts["cohort"] == "phantom_cohort" and len(facts["sha256"]) == 64 and facts["scaling"] == "brain"
    split = json.loads((tmp_path / "split.json").read_text())
    assert facts["studies"] == split["test"]
    names = json.dumps({part: sorted(split[part]) for part in ("test", "training", "validation")})
    assert facts["split"] == hashlib.sha256(names.encode()).hexdigest() and facts["amp"] is False
    psnr = frame[(frame["method"] == "network") & (frame["protocol"] == "volume") & (frame["region"] == "whole")]
    psnr = psnr[psnr["score"] == "psnr"].groupby("scenario")["value"].mean().mean()
    (entry,) = [
        e
        for e in report["summary"]
        if (e["method"], e["protocol"], e["region"], e["score"], e["group"])
        == ("network", "volume", "whole", "psnr", "all")
    ]
    assert entry["mean"] == pytest.approx(psnr)


def test_conventions_of_whole_volumes_are_left_out_where_there_are_none(
    phantom_cohort: Path,
    tmp_path: Path,
) -> None:
    changes = {"scenarios": ["T1"], "reference_methods": ["zero_filling"]}
    evaluate_bundle(phantom_cohort, tmp_path, evaluated_slices="largest_tumor", slice_count=3, **changes)
    robust = {"protocols": ["volume"], "report_dir": str(tmp_path / "volume")}
    evaluate_bundle(phantom_cohort, tmp_path, **changes, **robust)
    frame = read_scores(tmp_path / "evaluation" / "scores.csv")
    assert set(frame["protocol"]) == {"per_slice", "segmentation"}
    assert set(frame["method"]) == {"network", "zero_filling"}
    assert set(read_scores(tmp_path / "volume" / "scores.csv")["protocol"]) == {"volume", "segmentation"}
    # a network that makes no images
    evaluate_bundle(phantom_cohort, tmp_path, **changes, protocols=[], report_dir=str(tmp_path / "mask"))
    assert set(read_scores(tmp_path / "mask" / "scores.csv")["protocol"]) == {"segmentation"}
