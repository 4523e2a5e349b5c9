# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Means, intervals and differences against literal loops, and the files that are written."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from scripts.contrasts import CONTRASTS, REGIONS, SCENARIOS, StudyError, scenario_name
from scripts.evaluation.bootstrap import (
    COLUMNS,
    EvaluationTables,
    overview,
    paired_differences,
    patient_draws,
    patient_means,
    read_scores,
    sign_flip_p_value,
    summarize,
)
from scripts.evaluation.protocols import VolumeProtocol
from scripts.evaluation.scores import StudyScores
from scripts.networks.sscf import SSCFNet


def make_frame(
    patients: int = 5, seed: int = 0, keep: float = 0.85, scores: tuple[str, ...] = ("psnr",)
) -> pd.DataFrame:
    """Random scores of one method; the first patient has three studies, some cells are missing."""
    rng, rows = np.random.default_rng(seed), []
    for score in scores:
        for patient in range(patients):
            for study in range(3 if patient == 0 else 1):
                for scenario in SCENARIOS:
                    missing = [name for name, given in zip(CONTRASTS, scenario, strict=True) if not given]
                    for of in REGIONS if score == "dice" else missing:
                        value = patient + 3 * sum(scenario) + CONTRASTS.index(of if of in CONTRASTS else "T1")
                        row = (f"s{patient}_{study}", f"p{patient}", scenario_name(scenario), sum(scenario), of)
                        if rng.random() < keep:
                            kind = ("segmentation", "whole") if score == "dice" else ("volume", "whole")
                            rows.append((*row, "network", *kind, score, value + rng.normal()))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def literal_means(rows: list[tuple], weights: dict[str, int]) -> dict[tuple[str, str], float]:
    """Every group's mean by loops; a patient counts as often as its weight says."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _, patient, scenario, _, of, *_, value in rows:
        cells[scenario, of] += [value] * weights[patient]
    means = {key: float(np.mean(values)) for key, values in cells.items() if values}

    def by_scenario(wanted) -> float:
        scenarios = defaultdict(list)
        for key, value in means.items():
            if wanted(*key):
                scenarios[key[0]].append(value)
        return float(np.mean([np.mean(values) for values in scenarios.values()])) if scenarios else math.nan

    out = {("all", "all"): by_scenario(lambda s, o: True), ("pairs", "all"): float(np.mean(list(means.values())))}
    for name in CONTRASTS:
        out["contrast", name] = by_scenario(lambda s, o, name=name: o == name)
    for n in (1, 2, 3):
        out[f"available:{n}", "all"] = by_scenario(lambda s, o, n=n: s.count("+") + 1 == n)
        out[f"available:{n}", "T1"] = by_scenario(lambda s, o, n=n: s.count("+") + 1 == n and o == "T1")
    out["scenario:FLAIR+T2", "all"] = by_scenario(lambda s, o: s == "FLAIR+T2")
    out["scenario:FLAIR+T2", "T1ce"] = by_scenario(lambda s, o: s == "FLAIR+T2" and o == "T1ce")
    return out


def by_group(entries: list[dict]) -> dict[tuple[str, str], dict]:
    found = {(entry["group"], entry["of"]): entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_means_are_over_studies_then_targets_then_scenarios(keep: float) -> None:
    frame = make_frame(keep=keep)
    summary = by_group(summarize(frame, draws=10))
    rows = list(frame.itertuples(index=False, name=None))
    for key, value in literal_means(rows, Counter({f"p{i}": 1 for i in range(5)})).items():
        assert summary[key]["mean"] == pytest.approx(value), key
    everything = summary["all", "all"]
    assert (everything["patients"], everything["studies"], everything["values"]) == (5, 7, len(frame))
    assert summary["contrast", "T2"]["values"] == int((frame["of"] == "T2").sum())


def test_mean_of_scenarios_is_not_the_mean_of_pairs() -> None:
    summary = by_group(summarize(make_frame(keep=1.0), draws=10))
    assert abs(summary["all", "all"]["mean"] - summary["pairs", "all"]["mean"]) > 0.3
    contrasts = np.mean([summary["contrast", name]["mean"] for name in CONTRASTS])
    assert summary["pairs", "all"]["mean"] == pytest.approx(contrasts)  # each contrast is missing in 7 scenarios


def test_interval_is_that_of_a_literal_resampling_of_patients() -> None:
    frame, draws = make_frame(patients=4, keep=0.6), 60
    summary = by_group(summarize(frame, draws=draws, seed=3))
    rows = list(frame.itertuples(index=False, name=None))
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    drawn = np.random.default_rng(3).integers(4, size=(draws, 4))
    for sample in drawn:
        weights = Counter(f"p{i}" for i in sample)
        for key, value in literal_means(rows, weights).items():
            samples[key].append(value)
    for key, values in samples.items():
        low, high = np.nanpercentile(values, (2.5, 97.5))
        assert summary[key]["low"] == pytest.approx(low) and summary[key]["high"] == pytest.approx(high), key
        assert summary[key]["low"] <= summary[key]["mean"] <= summary[key]["high"]


def test_draws_count_patients() -> None:
    counts = patient_draws(5, 100, seed=1)
    assert counts.shape == (100, 5) and (counts.sum(axis=1) == 5).all()
    assert (counts == patient_draws(5, 100, seed=1)).all() and (counts != patient_draws(5, 100, seed=2)).any()


def test_one_patient_has_no_interval() -> None:
    entry = summarize(make_frame(patients=1), draws=10)[0]
    assert entry["low"] is None and entry["high"] is None and (entry["patients"], entry["studies"]) == (1, 3)


def test_dice_has_a_mean_for_each_region() -> None:
    summary = by_group(summarize(make_frame(scores=("dice",), keep=1.0), draws=10))
    assert {of for group, of in summary if group == "all"} == {"all", *REGIONS}
    assert not [of for group, of in summary if group == "contrast"]


def test_patient_means_are_those_of_each_patient_alone() -> None:
    frame = make_frame(keep=0.8)
    means = patient_means(frame).set_index("patient")["value"]
    rows = list(frame.itertuples(index=False, name=None))
    for i in range(5):
        expected = literal_means(rows, Counter({f"p{i}": 1}))["all", "all"]
        assert means[f"p{i}"] == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------- differences
def test_difference_is_of_what_both_have_scored() -> None:
    ours, theirs = make_frame(patients=7, keep=0.9), make_frame(patients=7, seed=1, keep=0.9)
    theirs["method"] = "mean_of_available"
    theirs["value"] -= 2
    entry = by_group(paired_differences(ours, theirs, draws=200))["all", "all"]
    keys = ["study", "scenario", "of"]
    both = pd.merge(ours, theirs, on=keys)
    assert entry["values"] == len(both) < len(ours)
    rows = [(r.study, r.patient_x, r.scenario, 0, r.of, r.value_x - r.value_y) for r in both.itertuples()]
    assert entry["mean"] == pytest.approx(literal_means(rows, Counter({f"p{i}": 1 for i in range(7)}))["all", "all"])
    assert entry["low"] <= entry["mean"] <= entry["high"] and 1 < entry["mean"] < 3
    assert entry["p_value"] == pytest.approx(2 / 2**7)  # every patient gains: the smallest possible


def test_p_value_is_that_of_all_sign_flips() -> None:
    values = np.array([0.5, -0.2, 0.9, 0.4, 0.1, -0.3, 0.8])
    flipped = [np.mean(values * signs) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.abs(flipped) >= abs(values.mean()) - 1e-12)
    assert sign_flip_p_value(values) == pytest.approx(expected) and 0.01 < expected < 0.5


def test_few_patients_have_no_p_value() -> None:
    assert sign_flip_p_value(np.ones(5)) is None
    assert sign_flip_p_value(np.ones(6)) == pytest.approx(2 / 64)


def test_difference_needs_one_method_each_and_common_scores() -> None:
    frame = make_frame(patients=2)
    with pytest.raises(ValueError, match="select one method"):
        paired_differences(pd.concat([frame, frame.assign(method="zero_filling")]), frame)
    with pytest.raises(ValueError, match="no score of the same study"):
        paired_differences(frame, frame.assign(study="other_" + frame["study"]))


# -------------------------------------------------------------------------------------------------------------- files
def write(directory: Path, frame: pd.DataFrame, weights: Path, network: nn.Module | None = None) -> None:
    scores = StudyScores([VolumeProtocol()], {"zero_filling": lambda target, available: target})
    scores.rows = frame.to_dict("records")
    scores.regions.update({"WT": 3, "ET": 2})
    scores.seconds.update({name: 2.0 for name in set(frame["study"])})
    engine = Engine(lambda *_: None)
    engine.seconds = dict.fromkeys(set(frame["study"]), 0.5)  # type: ignore[attr-defined]
    engine.network = network or nn.Identity()  # type: ignore[attr-defined]
    EvaluationTables(scores, directory, {"part": "test", "weights": str(weights)}, draws=20).attach(engine)
    engine.run([0])


def test_files_have_all_rows_the_summary_and_the_facts(tmp_path: Path) -> None:
    weights, frame = tmp_path / "model.pt", make_frame(scores=("psnr", "dice"))
    weights.write_bytes(b"weights")
    write(tmp_path / "out", frame, weights)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "scores.csv"]
    pd.testing.assert_frame_equal(read_scores(tmp_path / "out" / "scores.csv"), frame, check_dtype=False)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["summary"] == summarize(frame, draws=20)
    names = {"method", "protocol", "region", "score", "group", "of", "mean", "low", "high"}
    assert set(report["summary"][0]) == names | {"patients", "studies", "values"}
    facts = report["facts"]
    assert facts["sha256"] == hashlib.sha256(b"weights").hexdigest() and facts["part"] == "test"
    assert facts["patients"] == [f"p{i}" for i in range(5)] and len(facts["studies"]) == 7
    assert facts["studies_with_region"] == {"WT": 3, "ET": 2}
    assert facts["seconds_per_study"] == {"network": 0.5, "scoring": 2.0}
    assert facts["methods"] == ["network", "zero_filling"] and facts["lpips_sha256"] is None
    assert list(facts["protocols"]) == ["volume", "segmentation"] and facts["versions"]["monai"]


def test_facts_tell_how_much_the_entries_of_the_bank_differ(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    write(tmp_path / "none", make_frame(), weights, SSCFNet(channels=(4,) * 5, segmentation="none", prediction="mean"))
    assert not any(
        name.startswith("bank_") for name in json.loads((tmp_path / "none/metrics.json").read_text())["facts"]
    )
    net, draw = SSCFNet(channels=(4,) * 5, bank_size=6), torch.Generator().manual_seed(0)
    net.bank_mean.normal_(generator=draw)
    net.bank_std.uniform_(0.5, 1.5, generator=draw)
    net.bank_present[:5] = True
    net.bank_present[2, 1] = False
    dice = make_frame().assign(protocol="segmentation", score="dice")
    write(tmp_path / "bank", dice, weights, net)
    facts = json.loads((tmp_path / "bank" / "metrics.json").read_text())["facts"]
    assert facts["bank_entries"] == 5 and "both empty 1" in facts["protocols"]["segmentation"]
    for name, values in (("mean", net.bank_mean.numpy()), ("std", net.bank_std.numpy())):
        relative = []
        for contrast, channel in itertools.product(range(4), range(20)):
            rows = [row for row in range(6) if net.bank_present[row, contrast]]
            level = np.mean([net.bank_std[row, contrast, channel].item() for row in rows])
            relative.append(np.std([values[row, contrast, channel] for row in rows]) / level)
        assert facts[f"bank_{name}_spread"] == pytest.approx(np.mean(relative), abs=1e-4)


def test_nothing_scored_ends_with_a_sentence_and_no_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    with pytest.raises(SystemExit, match="Nothing could be scored"):
        write(tmp_path / "out", make_frame().head(0), weights)
    assert not (tmp_path / "out").exists()


def test_scores_that_are_none_are_refused_by_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="run the evaluation first"):
        read_scores(tmp_path / "scores.csv")
    (tmp_path / "scores.csv").write_text("study,value\na,1\n")
    with pytest.raises(StudyError, match="has no column patient, scenario"):
        read_scores(tmp_path / "scores.csv")


def test_overview_has_a_line_for_each_method_convention_and_region() -> None:
    lines = overview(summarize(make_frame(scores=("psnr", "ssim")), draws=20))
    assert len(lines) == 1 and lines[0].startswith("volume, whole, network: psnr ") and ", ssim " in lines[0]
