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
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import literal_mean, make_scores
from ignite.engine import Engine
from torch import nn

from scripts.contrasts import CONTRASTS, REGIONS, StudyError
from scripts.evaluation.bootstrap import paired_differences, read_scores, sign_flip_p_value, summarize
from scripts.evaluation.protocols import VolumeProtocol
from scripts.evaluation.scores import EvaluationTables, StudyScores, overview
from scripts.networks.sscf import SSCFNet

#: For some groups of a summary, which rows belong to them.
GROUPS = {
    ("all", "all"): {},
    ("contrast", "T2"): {"of": "T2"},
    ("available:2", "all"): {"available": 2},
    ("available:1", "T1"): {"available": 1, "of": "T1"},
    ("scenario:FLAIR+T2", "all"): {"scenario": "FLAIR+T2"},
    ("scenario:FLAIR+T2", "T1ce"): {"scenario": "FLAIR+T2", "of": "T1ce"},
}


def network_psnr(seed: int = 0, patients: int = 3, keep: float = 0.8, shift: float = 0.0) -> pd.DataFrame:
    """PSNR of one network; the first patient has three studies."""
    studies = {f"s{i}_{k}": f"p{i}" for i in range(patients) for k in range(3 if i == 0 else 1)}
    frame = make_scores(seed, shift, studies, keep)
    return frame[(frame["method"] == "network") & (frame["score"] == "psnr")].reset_index(drop=True)


def by_group(entries: list[dict]) -> dict[tuple[str, str], dict]:
    found = {(entry["group"], entry["of"]): entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_means_are_over_studies_then_targets_then_scenarios(keep: float) -> None:
    frame = network_psnr(keep=keep)
    summary = by_group(summarize(frame, 10))
    for group, chosen in GROUPS.items():
        assert summary[group]["mean"] == pytest.approx(literal_mean(frame, "psnr", **chosen)), group
    pairs = frame.groupby(["scenario", "of"])["value"].mean()
    assert summary["pairs", "all"]["mean"] == pytest.approx(pairs.mean())
    assert abs(pairs.mean() - summary["all", "all"]["mean"]) > 0.1
    numbers = [summary["all", "all"][key] for key in ("patients", "studies", "values")]
    assert numbers == [3, 5, len(frame)]


def test_interval_is_that_of_a_literal_resampling_of_patients() -> None:
    frame, number = network_psnr(keep=0.5), 60
    summary = by_group(summarize(frame, number, seed=3))
    samples = defaultdict(list)
    for drawn in np.random.default_rng(3).integers(3, size=(number, 3)):
        sample = pd.concat([frame[frame["patient"] == f"p{i}"] for i in drawn])
        for group, chosen in GROUPS.items():
            if (sample[list(chosen)] == pd.Series(chosen, dtype=object)).all(axis=1).any():
                samples[group].append(literal_mean(sample, "psnr", **chosen))
    for group, values in samples.items():
        interval = summary[group]["low"], summary[group]["high"]
        assert interval == pytest.approx(tuple(np.percentile(values, (2.5, 97.5)))), group


def test_one_patient_has_no_interval() -> None:
    entry = summarize(network_psnr(patients=1), 10)[0]
    assert entry["low"] is None and entry["high"] is None and (entry["patients"], entry["studies"]) == (1, 3)


def test_dice_has_a_mean_for_each_region() -> None:
    frame = make_scores(0)
    summary = by_group(summarize(frame[frame["score"] == "dice"], 10))
    assert {of for group, of in summary if group == "all"} == {"all", *REGIONS}
    assert not [of for group, of in summary if group == "contrast"]


# -------------------------------------------------------------------------------------------------------- differences
def test_difference_is_of_what_both_have_scored() -> None:
    ours, theirs = network_psnr(0, patients=7, shift=5.0), network_psnr(1, patients=7)
    entry = by_group(paired_differences(ours, theirs.assign(method="mean_of_available"), 200))["all", "all"]
    both = ours.merge(theirs, on=["study", "scenario", "of"])
    both = both.assign(value=both["value_x"] - both["value_y"], score="psnr", method="network")
    assert entry["values"] == len(both) < len(ours)
    assert entry["mean"] == pytest.approx(literal_mean(both, "psnr"))
    assert entry["low"] <= entry["mean"] <= entry["high"] and 4 < entry["mean"] < 6
    assert entry["p_value"] == pytest.approx(2 / 2**7)  # every patient gains: the smallest possible


def test_p_value_is_that_of_all_sign_flips() -> None:
    values = np.array([0.5, -0.2, 0.9, 0.4, 0.1, -0.3, 0.8])
    flipped = [np.mean(values * signs) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.abs(flipped) >= abs(values.mean()) - 1e-12)
    assert sign_flip_p_value(values) == pytest.approx(expected) and 0.01 < expected < 0.5
    # five patients cannot be told from chance
    assert sign_flip_p_value(np.ones(5)) is None and sign_flip_p_value(np.ones(6)) == pytest.approx(2 / 64)


def test_difference_needs_one_method_each_and_common_scores() -> None:
    frame = network_psnr(patients=2)
    with pytest.raises(ValueError, match="select one method"):
        paired_differences(pd.concat([frame, frame.assign(method="zero_filling")]), frame)
    with pytest.raises(ValueError, match="no score of the same study"):
        paired_differences(frame, frame.assign(study="other_" + frame["study"]))


# -------------------------------------------------------------------------------------------------------------- files
def write(directory: Path, frame: pd.DataFrame, network: nn.Module | None = None) -> dict:
    """Content of ``metrics.json`` of an evaluation with these scores."""
    weights = directory.parent / "model.pt"
    weights.write_bytes(b"weights")
    scores = StudyScores([VolumeProtocol()], {"zero_filling": lambda target, available: target})
    scores.rows = frame.to_dict("records")
    scores.regions.update({"WT": 3, "ET": 2})
    scores.seconds.update(dict.fromkeys(frame["study"], 2.0))
    engine = Engine(lambda *_: None)
    engine.seconds = dict.fromkeys(frame["study"], 0.5)  # type: ignore[attr-defined]
    engine.network = network or nn.Identity()  # type: ignore[attr-defined]
    EvaluationTables(scores, directory, {"part": "test", "weights": str(weights)}, bootstrap_samples=20).attach(engine)
    engine.run([0])
    return json.loads((directory / "metrics.json").read_text())


def test_files_have_all_rows_the_summary_and_the_metadata(tmp_path: Path) -> None:
    frame = make_scores(0)
    report = write(tmp_path / "out", frame)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "scores.csv"]
    pd.testing.assert_frame_equal(read_scores(tmp_path / "out" / "scores.csv"), frame, check_dtype=False)
    assert report["summary"] == summarize(frame, 20)
    names = {"method", "protocol", "region", "score", "group", "of", "mean", "low", "high"}
    assert set(report["summary"][0]) == names | {"patients", "studies", "values"}
    metadata = report["metadata"]
    assert metadata["sha256"] == hashlib.sha256(b"weights").hexdigest() and metadata["part"] == "test"
    assert metadata["patients"] == ["Case_1", "Case_2", "Case_3"] and len(metadata["studies"]) == 4
    assert metadata["studies_with_region"] == {"WT": 3, "ET": 2}
    assert metadata["seconds_per_study"] == {"network": 0.5, "scoring": 2.0}
    assert metadata["methods"] == ["network", "zero_filling"] and metadata["lpips_sha256"] is None
    assert list(metadata["protocols"]) == ["volume", "segmentation"] and metadata["versions"]["monai"]
    assert "bank_entries" not in metadata


def test_metadata_say_how_much_the_entries_of_the_bank_differ(tmp_path: Path) -> None:
    net, draw = SSCFNet(channels=(4,) * 5, bank_size=6), torch.Generator().manual_seed(0)
    net.bank_mean.normal_(generator=draw)
    net.bank_std.uniform_(0.5, 1.5, generator=draw)
    net.bank_present[:5] = True
    net.bank_present[2, 1] = False
    metadata = write(tmp_path / "bank", network_psnr(), net)["metadata"]
    assert metadata["bank_entries"] == 5
    for name, values in (("mean", net.bank_mean.numpy()), ("std", net.bank_std.numpy())):
        relative = []
        for contrast, channel in itertools.product(range(len(CONTRASTS)), range(20)):
            rows = [row for row in range(6) if net.bank_present[row, contrast]]
            level = np.mean([net.bank_std[row, contrast, channel].item() for row in rows])
            relative.append(np.std([values[row, contrast, channel] for row in rows]) / level)
        assert metadata[f"bank_{name}_spread"] == pytest.approx(np.mean(relative), abs=1e-4)


def test_nothing_scored_ends_with_a_sentence_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="Nothing could be scored"):
        write(tmp_path / "out", make_scores(0).head(0))
    assert not (tmp_path / "out").exists()


def test_scores_that_are_none_are_refused_by_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    for text, message in (
        (None, "evaluate this run first"),
        ("study,value\na,1\n", "has no column patient, scenario"),
        ("", "cannot be read as a table"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(StudyError, match=message):
            read_scores(path)


def test_overview_has_a_line_for_each_method_protocol_and_region() -> None:
    frame = make_scores(0)
    lines = overview(summarize(frame[frame["score"] != "dice"], 20))
    assert [line.partition(":")[0] for line in lines] == [f"per_slice, whole, {m}" for m in ("network", "zero_filling")]
    assert "psnr " in lines[0] and ", lpips " in lines[0]
