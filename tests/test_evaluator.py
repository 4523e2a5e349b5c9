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
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from builders import bundle_workflow, random_batch, tiny_net, tiny_run
from ignite.engine import Engine, Events
from ignite.metrics import MetricsLambda
from monai.bundle import ConfigWorkflow
from torch import nn
from torch.utils.data import DataLoader, Dataset

from scripts.contrasts import (
    CONTRAST_KEYS,
    CONTRASTS,
    REGIONS,
    SCENARIOS,
    StudyError,
    label_map,
    scenario_name,
    scenario_table,
)
from scripts.data.datalist import find_studies
from scripts.data.transforms import LoadStudyd
from scripts.evaluation.bootstrap import COLUMNS, read_scores, summarize
from scripts.evaluation.evaluator import (
    ScenarioSlices,
    SliceEvaluator,
    SliceScenarios,
    UnseenPatients,
    list_scenarios,
    scenario_indices,
)
from scripts.evaluation.metrics import ScenarioScores, fill_background, mean_of_available, zero_filling
from scripts.evaluation.protocols import BraSynProtocol, PerSliceProtocol, StudyTarget, VolumeProtocol, region_dice
from scripts.evaluation.scores import StudyScores
from scripts.networks.availability import network_input, read_availability
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

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


def test_named_scenarios_are_taken_in_the_given_order_and_unknown_ones_refused() -> None:
    shown = ScenarioSlices(Slices(), ["T1ce+T2", "FLAIR"])
    named = [scenario_name(SCENARIOS[int(shown[i]["scenario"])]) for i in range(len(shown))]
    assert named == ["T1ce+T2", "FLAIR"] * 3
    with pytest.raises(StudyError, match=r"scenarios has no T2\+FLAIR: choose from FLAIR, T1, .*FLAIR\+T2"):
        list_scenarios(ITEMS, ["FLAIR", "T2+FLAIR"])


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
    # empty slots have the patient 0, and some networks no bank
    for network in (net, nn.Conv2d(8, 7, 1)):
        unseen = Engine(lambda *_: None)
        UnseenPatients(network, torch.tensor([0, 5, 14])).attach(unseen)
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
        network,
        device="cpu",
        val_data_loader=loader,
        key_val_metric=key,
        additional_metrics={"scores": scores},
        **changes,
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


# -------------------------------------------------------------------------------------------------------- studies
ITEMS = [
    {"study": name, "patient": f"patient {name}", **{key: f"{name}_{key}" for key in keys}}
    for name, keys in {
        "a": [*CONTRAST_KEYS, "seg"],
        "b": ["flair", "t1ce", "t2", "seg"],
        "c": list(CONTRAST_KEYS),
    }.items()
]


def test_study_is_listed_under_the_scenarios_whose_contrasts_it_has_with_these_files_alone() -> None:
    listed = list_scenarios(ITEMS)
    with_t1 = [i for i, row in enumerate(SCENARIOS) if row[1]]
    assert [(item["study"], item["scenario"]) for item in listed] == [
        (study, i) for study in "abc" for i in range(14) if study != "b" or i not in with_t1
    ]
    for item in listed:
        given = [key for key, kept in zip(CONTRAST_KEYS, SCENARIOS[item["scenario"]], strict=True) if kept]
        assert [key for key in item if key in (*CONTRAST_KEYS, "seg")] == given
        assert item["complete"] == ITEMS["abc".index(item["study"])]
    assert [item["study"] for item in list_scenarios(ITEMS, ["T2", "FLAIR"], ["c"])] == ["c", "c"]


def test_processes_share_the_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    for rank, names in enumerate((["a", "a", "c", "c"], ["b", "b"])):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        assert [item["study"] for item in list_scenarios(ITEMS, ["T2", "FLAIR"])] == names
    monkeypatch.setattr(idist, "get_world_size", lambda: 4)
    with pytest.raises(StudyError, match="3 studies cannot be shared by 4 processes"):
        list_scenarios(ITEMS)
    monkeypatch.undo()
    with pytest.raises(StudyError, match="No evaluated study has the contrasts"):
        list_scenarios(ITEMS, ["T1"], ["b"])


class Cached(Dataset):
    """Slices of three studies in no order: b has no T1, c no mask."""

    studies = ("a", "b", "c")
    index = torch.tensor([[0, 7], [1, 3], [0, 5], [2, 1], [0, 4], [1, 2], [2, 0]])

    def __init__(self, rows: Sequence[int] = range(7)) -> None:
        self.batch = random_batch(scenario_table()[: len(self.index)], SIZE)
        self.batch["target"][..., :4, :] = -1.0
        of = self.index[:, 0]
        self.batch["has_contrast"][of == 1, 1] = False
        self.batch["target"][of == 1, 1] = -1.0
        self.batch["has_mask"][of == 2] = False
        self.batch["label"][of == 2] = 0
        del self.batch["image"]
        self.slice_ids = self.batch["slice_id"][list(rows)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


def test_slices_of_a_study_are_shown_in_order() -> None:
    data, datalist = Cached(), list_scenarios(ITEMS, ["FLAIR+T2"])
    item = SliceScenarios(data, Cached([0, 4, 6]), datalist)[0]
    for key in ("target", "label"):
        assert torch.equal(item["slices"][key], torch.stack([data[i][key] for i in (4, 2, 0)]))
    assert item["slices"]["shown"].tolist() == [0, 2] and item["image"].shape == (8, *SIZE, 2)
    available = torch.tensor([[True, False, False, True]])
    for z, row in enumerate((4, 0)):
        assert torch.equal(item["image"][..., z], network_input(data[row]["target"][None], available)[0])
    assert [item["study"] for item in SliceScenarios(data, data, [*datalist[1:], {"study": "unknown"}])] == ["b", "c"]
    # a study is read once for all of its scenarios
    dataset = SliceScenarios(data, data, list_scenarios(ITEMS, ["FLAIR", "T2"], ["a", "c"]))
    items = [dataset[k] for k in range(4)]
    same = [one["slices"]["target"] is other["slices"]["target"] for one, other in itertools.pairwise(items)]
    assert same == [True, False, True]


def filled_in(scenario: str, index: int = 0, shown: Sequence[int] = range(7)) -> dict[str, Any]:
    """Slices of a study with a random prediction."""
    data = Cached()
    item = SliceScenarios(data, Cached(shown), list_scenarios(ITEMS, [scenario], ["abc"[index]]))[0]
    pred = torch.rand((7, *item["image"].shape[1:]), generator=torch.Generator().manual_seed(item["scenario"]))
    return {**item, "pred": pred}


def test_rows_are_the_scores_of_the_network_and_the_reference_methods_on_one_background() -> None:
    methods = {"mean_of_available": mean_of_available, "zero_filling": zero_filling}
    scores = StudyScores([PerSliceProtocol()], methods, whole=False)
    outputs = [filled_in("FLAIR+T2"), filled_in("T1"), filled_in("FLAIR+T2", index=1)]
    for output in outputs:
        scores(output)
    frame = pd.DataFrame(scores.rows)
    assert set(frame) == set(COLUMNS) and not frame.duplicated([c for c in COLUMNS if c != "value"]).any()
    assert scores.regions == {"WT": 2, "TC": 2, "ET": 2} and set(scores.seconds) == {"a", "b"}
    images = frame[frame["score"] == "psnr"]
    targets = images[(images["method"] == "network") & (images["region"] == "whole")]
    assert [tuple(row) for row in targets[["study", "patient", "scenario", "available", "of"]].to_numpy()] == [
        ("a", "patient a", "FLAIR+T2", 2, "T1"),
        ("a", "patient a", "FLAIR+T2", 2, "T1ce"),
        *(("a", "patient a", "T1", 1, name) for name in ("FLAIR", "T1ce", "T2")),
        ("b", "patient b", "FLAIR+T2", 2, "T1ce"),  # b has no T1
    ]
    slices, t1ce = outputs[0]["slices"], CONTRASTS.index("T1ce")
    pred, target, label = outputs[0]["pred"].permute(3, 0, 1, 2), slices["target"], slices["label"]
    available = torch.tensor([[True, False, False, True]]).expand(len(target), -1)
    protocol = PerSliceProtocol()
    protocol.start(StudyTarget((target + 1) / 2, (target > -1).any(1), label[:, 0] > 0))
    predictions = {
        "network": pred[:, :4],
        "mean_of_available": ((target[:, 0] + target[:, 3]) / 2).unsqueeze(1).expand_as(target),
        "zero_filling": torch.full_like(target, -1.0),
    }
    for method, prediction in predictions.items():
        filled = (fill_background(prediction, target, available)[:, t1ce] + 1) / 2
        part = frame[(frame["study"] == "a") & (frame["scenario"] == "FLAIR+T2") & (frame["of"] == "T1ce")]
        part = part[part["method"] == method].set_index(["region", "score"])["value"]
        for key, value in protocol.score(t1ce, filled)["per_slice"].items():
            assert part[key] == pytest.approx(float(value)), (method, key)
    dice = frame[frame["protocol"] == "segmentation"]
    assert set(dice["method"]) == {"network"} and len(dice) == 3 * 3
    expected = region_dice(label_map(pred[:, 4:]), label).tolist()
    assert dice["value"].tolist()[:3] == pytest.approx(expected) and dice["of"].tolist()[:3] == list(REGIONS)


def test_reference_methods_see_all_slices_but_no_missing_contrast_and_no_mask_gives_no_region() -> None:
    seen = []

    def reference_method(target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        seen.append(target.clone())
        return zero_filling(target, available)

    scores = StudyScores([PerSliceProtocol()], {"reference_method": reference_method}, whole=False)
    output = filled_in("T1ce+T2", index=2, shown=[3])
    scores(output)
    target = output["slices"]["target"]
    assert len(target) == 2 and output["image"].shape[-1] == 1
    assert bool((seen[0][:, :2] == -1).all()) and torch.equal(seen[0][:, 2:], target[:, 2:])
    assert {row["region"] for row in scores.rows} == {"whole"} and not scores.regions
    assert {row["score"] for row in scores.rows} == {"psnr", "nmse", "ssim"}


def test_truth_that_is_synthesized_itself_is_told_apart() -> None:
    scores = StudyScores([PerSliceProtocol()], whole=False)
    output = filled_in("FLAIR")
    output["complete"]["synthesized"] = ["t2"]
    scores(output)
    frame = pd.DataFrame(scores.rows)
    assert set(frame.loc[frame["score"] == "psnr", "of"]) == {"T1", "T1ce", "T2 (synthesized)"}
    groups = {(entry["group"], entry["of"]) for entry in summarize(frame, 0)}
    assert ("contrast", "T2 (synthesized)") in groups and ("contrast", "T2") not in groups


def test_scores_start_anew_with_every_run_and_name_a_failed_study_once() -> None:
    scores = StudyScores([], {}, whole=False)
    for names in (["T1", "FLAIR"], ["T1"]):
        scores.prepare()
        for name in names:
            scores(filled_in(name))
        assert len(scores.rows) == 2 * 3 * len(names)
        # a network without segmentation has no Dice
        output = filled_in("T2")
        output["pred"][4:] = 0
        scores(output)
        assert len(scores.rows) == 2 * 3 * len(names)
    failures = [{"study": "a", "reason": reason} for reason in ("x", "x", "y")]
    scores.finish(failures, 3)
    assert scores.failures == [failures[0], failures[2]]


# ------------------------------------------------------------------------------------------------ the whole evaluation
def evaluate_bundle(cohort: Path, output_dir: Path, **changes: object) -> ConfigWorkflow:
    """``evaluating`` of an untrained network on the tiny cohort."""
    overrides = {**tiny_run(cohort, output_dir), "lpips": False, "bootstrap_samples": 20, **changes}
    if not (output_dir / "model.pt").is_file():
        torch.manual_seed(0)
        output_dir.mkdir(parents=True, exist_ok=True)
        net = SSCFNet(channels=overrides["channels"], bank_size=overrides["bank_size"])  # type: ignore[arg-type]
        torch.nn.init.zeros_(net.segmentation_decoder.head.bias)  # some tumor
        names = ("image_size", "spacing", "scaling")
        preprocessing = {name: overrides.get(name, "brain") for name in names}
        save_weights(output_dir / "model.pt", net, {"preprocessing": preprocessing})
    workflow = bundle_workflow("train", "evaluate", **overrides)
    workflow.run()
    return workflow


def test_evaluation_of_a_bundle_writes_all_protocols_and_reference_methods(
    phantom_cohort: Path, tmp_path: Path
) -> None:
    evaluate_bundle(phantom_cohort, tmp_path, scenarios=["FLAIR+T1+T2", "T1ce"])
    frame = read_scores(tmp_path / "evaluation" / "scores.csv")
    dice = {"segmentation", "segmentation_per_slice"}
    assert set(frame["protocol"]) == {"per_slice", "volume", "brasyn", "brasyn_reference", *dice}
    assert set(frame["method"]) == {"network", "mean_of_available", "nearest_contrast", "zero_filling"}
    assert set(frame.loc[frame["protocol"] == "brasyn", "scenario"]) == {"FLAIR+T1+T2"}
    assert set(frame.loc[frame["protocol"] == "volume", "scenario"]) == {"FLAIR+T1+T2", "T1ce"}
    assert np.isfinite(frame["value"]).all() and "lpips" not in set(frame["score"])
    report = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    metadata = report["metadata"]
    assert dice < set(metadata["protocols"]) and metadata["scored_slices"] == "largest_tumor"
    assert metadata["cohort"] == "phantom_cohort" and len(metadata["sha256"]) == 64 and metadata["scaling"] == "brain"
    split = json.loads((tmp_path / "split.json").read_text())
    assert metadata["studies"] == split["test"]
    names = json.dumps({part: sorted(split[part]) for part in ("test", "training", "validation")})
    assert metadata["split"] == hashlib.sha256(names.encode()).hexdigest() and metadata["amp"] is False
    psnr = frame[(frame["method"] == "network") & (frame["protocol"] == "volume") & (frame["region"] == "whole")]
    psnr = psnr[psnr["score"] == "psnr"].groupby("scenario")["value"].mean().mean()
    (entry,) = [
        e
        for e in report["summary"]
        if (e["method"], e["protocol"], e["region"], e["score"], e["group"])
        == ("network", "volume", "whole", "psnr", "all")
    ]
    assert entry["mean"] == pytest.approx(psnr)


def test_weights_can_say_which_network_and_preprocessing_they_are_of(phantom_cohort: Path, tmp_path: Path) -> None:
    changes = {"scenarios": ["T1"], "reference_methods": [], "evaluated_slices": "largest_tumor", "slice_count": 2}
    evaluate_bundle(phantom_cohort, tmp_path, **changes)
    stated = read_scores(tmp_path / "evaluation" / "scores.csv")
    of_network = {"channels", "bank_size", "image_size", "spacing", "scaling"}
    given = {name: value for name, value in tiny_run(phantom_cohort, tmp_path).items() if name not in of_network}
    given.update(changes, lpips=False, bootstrap_samples=20, report_dir=str(tmp_path / "again"))
    bundle_workflow("train", "evaluate", "from_weights", **given).run()
    pd.testing.assert_frame_equal(read_scores(tmp_path / "again" / "scores.csv"), stated)


def test_protocols_of_whole_studies_are_left_out_where_there_are_none(phantom_cohort: Path, tmp_path: Path) -> None:
    changes = {"scenarios": ["T1"], "reference_methods": ["zero_filling"]}
    evaluate_bundle(phantom_cohort, tmp_path, evaluated_slices="largest_tumor", slice_count=3, **changes)
    robust = {"protocols": ["volume"], "report_dir": str(tmp_path / "volume")}
    evaluate_bundle(phantom_cohort, tmp_path, **changes, **robust)
    frame = read_scores(tmp_path / "evaluation" / "scores.csv")
    assert set(frame["protocol"]) == {"per_slice", "segmentation", "segmentation_per_slice"}
    assert set(frame["method"]) == {"network", "zero_filling"}
    assert set(read_scores(tmp_path / "volume" / "scores.csv")["protocol"]) == {"volume", "segmentation"}
    # a network that makes no images
    for number, protocols in enumerate(([], ["segmentation_per_slice"])):
        report_dir = tmp_path / f"mask_{number}"
        evaluate_bundle(phantom_cohort, tmp_path, **changes, protocols=protocols, report_dir=str(report_dir))
        assert set(read_scores(report_dir / "scores.csv")["protocol"]) == {"segmentation", *protocols}


def test_scores_are_those_of_the_files_that_inference_writes(phantom_cohort: Path, tmp_path: Path) -> None:
    """Resampling back, rounding and writing included: equal to the last bit."""
    grid = {"spacing": 5.0, "image_size": 48}  # the files have 4 mm
    changes = {"scenarios": ["FLAIR+T2"], "reference_methods": [], "brasyn_available": [2]}
    workflow = evaluate_bundle(phantom_cohort, tmp_path, **grid, **changes)
    rows = workflow.parser.get_parsed_content("evaluation#scores").rows
    (study,) = json.loads((tmp_path / "split.json").read_text())["test"]
    (complete,) = [item for item in find_studies(phantom_cohort) if item["study"] == study]

    files = {"flair": complete["flair"], "t2": complete["t2"], "study": study, "output_dir": tmp_path / "filled"}
    inference = bundle_workflow("inference", ckpt_path=tmp_path / "model.pt", amp=False, handlers=[], **files)
    inference.run()
    written = inference.evaluator.written[study]
    assert list(written) == ["t1", "t1ce", "seg"]
    volumes = {key: np.asanyarray(nib.load(path).dataobj) for key, path in written.items()}
    assert [volume.dtype for volume in volumes.values()] == [np.float32, np.float32, np.uint8] and volumes["seg"].any()

    scores = StudyScores([VolumeProtocol(), BraSynProtocol(available=[2])])
    item = {"study": study, "patient": complete["patient"], "complete": complete, "output_keys": tuple(volumes)}
    item |= {"scenario": scenario_indices(["FLAIR+T2"])[0], "segmented": True}
    scores({**item, "pred": torch.stack([torch.from_numpy(volume.astype(np.float32)) for volume in volumes.values()])})
    assert scores.rows == [row for row in rows if "per_slice" not in row["protocol"]]
    assert {row["protocol"] for row in scores.rows} == {"volume", "brasyn", "brasyn_reference", "segmentation"}

    # with other axes on file the slices are still those of the network
    turn = np.array([[2, -1], [0, 1], [1, 1]])
    turned = {key: nib.load(complete[key]).as_reoriented(turn) for key in (*CONTRAST_KEYS, "seg")}
    for key, image in turned.items():
        nib.save(image, tmp_path / f"turned_{key}.nii.gz")
    item["complete"] = {**complete, **{key: str(tmp_path / f"turned_{key}.nii.gz") for key in turned}}
    moved = [nib.orientations.apply_orientation(volume, turn).astype(np.float32) for volume in volumes.values()]
    again = StudyScores([VolumeProtocol()])
    again({**item, "pred": torch.from_numpy(np.stack(moved))})
    expected = {(r["of"], r["region"], r["score"]): r["value"] for r in scores.rows if r["protocol"] == "volume"}
    found = {(r["of"], r["region"], r["score"]): r["value"] for r in again.rows if r["protocol"] == "volume"}
    assert found == pytest.approx(expected, rel=1e-4) and ("T1", "whole", "jump") in found

    # and one of them once more, without this bundle
    real = [nib.load(complete[key]).get_fdata() for key in CONTRAST_KEYS]
    truth = np.clip(real[1] / np.percentile(real[1][real[1] > 0], 99.5), 0, 1)
    brain = np.any([volume > 0 for volume in real], axis=0)
    psnr = -10 * np.log10(np.mean((volumes["t1"] - truth)[brain] ** 2))
    ours = pd.DataFrame(rows).set_index(["of", "protocol", "region", "score"])["value"]
    assert ours["T1", "volume", "whole", "psnr"] == pytest.approx(psnr, abs=1e-4)


def test_resampled_study_is_scored_on_the_grid_that_its_scenario_has(tmp_path: Path) -> None:
    """FLAIR is on a grid 8 mm aside: what is right on the grid of T1 is so where T1 alone is given."""
    place = np.random.default_rng(0).random((24, 24, 8)) + 0.2
    complete: dict[str, Any] = {"study": "s", "patient": "s"}
    for key, offset in (("flair", 8.0), ("t1", 0.0), ("t1ce", 0.0)):
        volume = np.zeros((32, 32, 8), np.float32)
        volume[4:28, 4:28] = place * (1 + len(key))
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[0, 3] = offset
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{key}.nii.gz")
        complete[key] = str(tmp_path / f"{key}.nii.gz")
    truth = torch.from_numpy(nib.load(complete["t1ce"]).get_fdata()).float()
    pred = (truth / torch.quantile(truth[truth > 0], 0.995)).clamp(max=1)[None]
    item = {"study": "s", "patient": "s", "complete": complete, "output_keys": ("t1ce",), "segmented": False}
    scores = StudyScores([VolumeProtocol()], load=LoadStudyd(resample=True))
    for scenario, grid in (("FLAIR+T1", "flair"), ("T1", "t1")):
        scores({**item, "scenario": scenario_indices([scenario])[0], "grid": grid, "pred": pred})
    rows = [row for row in scores.rows if (row["of"], row["region"], row["score"]) == ("T1ce", "whole", "psnr")]
    on_flair, on_t1 = (row["value"] for row in rows)
    assert on_t1 > 40 > 20 > on_flair


def test_study_whose_files_are_damaged_never_stops_the_others(phantom_cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom_cohort, tmp_path / "cohort")
    names = sorted(item["study"] for item in find_studies(tmp_path / "cohort"))
    split = {"training": names[:2], "validation": [], "test": names[2:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    changes = {"split_file": str(tmp_path / "split.json"), "scenarios": ["T1", "T2"], "protocols": ["volume"]}
    changes["reference_methods"] = []
    bad = next(item for item in find_studies(tmp_path / "cohort") if item["study"] == names[2])
    Path(bad["t1"]).write_bytes(b"damaged")
    with pytest.raises(StudyError, match=r"1 of 5 studies could not be used: .*failures\.json says why"):
        evaluate_bundle(tmp_path / "cohort", tmp_path / "run", **changes)
    (failure,) = json.loads((tmp_path / "run" / "failures.json").read_text())
    assert failure["study"] == names[2] and "cannot be read" in failure["reason"]
    assert set(read_scores(tmp_path / "run" / "evaluation" / "scores.csv")["study"]) == set(names[3:])
