# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tables of evaluations: their numbers against literal means, their texts, and what cannot be compared."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import BUNDLE_ROOT, literal_mean, make_scores, write_scores

from scripts.contrasts import CONTRASTS, REGIONS, SCENARIOS, StudyError, scenario_name
from scripts.research.tables import (
    Runs,
    Table,
    build_table,
    protocol_differences,
    read_runs,
    standard_tables,
    write_tables,
)


def cell(table: Table, row: str, block: str, score: str, key: str = "mean") -> float:
    (found,) = [c for c in table.cells.to_dict("records") if (c["row"], c["block"], c["score"]) == (row, block, score)]
    return found[key]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Two runs; the second is better by 3 dB."""
    folders = {name: write_scores(tmp_path / name, make_scores(i, 3.0 * i)) for i, name in enumerate(("unet", "sscf"))}
    monkeypatch.setattr("scripts.research.tables.MIN_PATIENTS", 3)
    return read_runs(folders, 200)


# ------------------------------------------------------------------------------------------------------------ numbers
def test_numbers_are_the_literal_means(runs: Runs) -> None:
    for number, run in enumerate(("unet", "sscf")):
        frame = make_scores(number, 3.0 * number)
        table = build_table(runs, "t", "title", "contrasts")
        for name in CONTRASTS:
            for score in ("psnr", "lpips"):
                assert cell(table, run, name, score) == pytest.approx(literal_mean(frame, score, name))
        assert cell(build_table(runs, "t", "title", "scores"), run, "all", "psnr") == pytest.approx(
            literal_mean(frame, "psnr")
        )
        for n in (1, 2, 3):
            table = build_table(runs, "t", "title", "available")
            assert cell(table, run, f"{n} available", "psnr") == pytest.approx(literal_mean(frame, "psnr", available=n))
        table = build_table(runs, "t", "title", "dice")
        for region in REGIONS:
            assert cell(table, run, region, "dice") == pytest.approx(literal_mean(frame, "dice", region))
        table = build_table(runs, "t", "title", "scenarios")
        # a row for each scenario, the runs side by side
        assert list(dict.fromkeys(table.cells["row"])) == [scenario_name(row) for row in SCENARIOS]
        assert cell(table, "FLAIR+T2", run, "psnr") == pytest.approx(literal_mean(frame, "psnr", scenario="FLAIR+T2"))


def test_spread_is_that_of_the_seeds_and_the_mean_is_over_them(tmp_path: Path) -> None:
    frames = [make_scores(seed) for seed in range(3)]
    folders = {seed: write_scores(tmp_path / str(seed), frame, seed=seed) for seed, frame in enumerate(frames)}
    table = build_table(read_runs({"sscf": folders}, 50), "t", "title", "scores")
    means = [literal_mean(frame, "psnr") for frame in frames]
    assert cell(table, "sscf", "all", "psnr") == pytest.approx(np.mean(means))
    assert cell(table, "sscf", "all", "psnr", "spread") == pytest.approx(np.std(means, ddof=1))
    assert f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}" in table.markdown()
    assert "seed 0, 1, 2 (3 seeds" in table.caption


def test_folds_of_a_seed_are_one_evaluation(tmp_path: Path) -> None:
    frame = make_scores(0)
    whole = write_scores(tmp_path / "whole", frame)
    first = frame["study"].isin(["Case_1a", "Case_1b"])
    parts = [write_scores(tmp_path / str(i), frame[first == bool(i)]) for i in (0, 1)]
    tables = [build_table(read_runs({"sscf": folders}, 100), "t", "title", "contrasts") for folders in (whole, parts)]
    pd.testing.assert_frame_equal(tables[0].cells, tables[1].cells)
    assert tables[1].cells["patients"].unique().tolist() == [3] and "3 patients (4 studies)" in tables[1].caption


def test_caption_of_dice_says_how_many_studies_have_the_region(tmp_path: Path) -> None:
    frame = make_scores(0)
    first = frame["study"].isin(["Case_1a", "Case_1b"])
    recorded = ({"studies": ["Case_2"], "studies_with_region": {"WT": 2, "ET": 1}}, {"studies": ["Case_1a"]})
    recorded[1]["studies_with_region"] = {"WT": 2, "TC": 1}
    seeds = {
        seed: [write_scores(tmp_path / f"{seed}{i}", frame[first == bool(i)], **recorded[i]) for i in (0, 1)]
        for seed in (0, 1)
    }
    runs = read_runs({"sscf": seeds}, 20)
    caption = build_table(runs, "t", "title", "dice").caption
    assert "studies with WT: 4; studies with TC: 1; studies with ET: 1; seed" in caption
    assert "studies with" not in build_table(runs, "t", "title", "scores").caption


def test_difference_of_two_runs_says_what_is_noise(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in ("unet", "sscf")}
    table = build_table(runs, "t", "title", "scores", reference="unet")
    expected = literal_mean(make_scores(1, 3.0), "psnr") - literal_mean(make_scores(0), "psnr")
    found = runs.difference("sscf", "unet", "per_slice", "whole", "psnr")
    assert found["mean"] == pytest.approx(expected) and found["low"] < expected < found["high"]
    psnr, _ = table.remarks["sscf"].split("; ")
    assert psnr.startswith(f"PSNR {expected:+.2f} [") and "noise" not in psnr
    # some patients better, others worse
    frame = make_scores(0)
    frame["value"] += frame["patient"].map({"Case_1": -0.1, "Case_2": 0.0, "Case_3": 0.11})
    mixed = {"a": write_scores(tmp_path / "a", make_scores(0)), "b": write_scores(tmp_path / "b", frame)}
    remark = build_table(read_runs(mixed, 200), "t", "title", "scores", reference="a").remarks["b"]
    assert re.search(r"LPIPS -0\.0225 \[-0\.\d+, \+0\.\d+\], within noise \(interval covers 0\)$", remark)
    assert "difference from unet" in table.markdown() and "unet" not in table.remarks
    # a run whose seeds lie as far apart as the two runs
    seeds = {s: write_scores(tmp_path / f"seed{s}", make_scores(0, 8.0 * s)) for s in (0, 1)}
    reference = {s: write_scores(tmp_path / f"reference{s}", make_scores(0)) for s in (0, 1)}
    noisy = read_runs({"reference": reference, "sscf": seeds}, 100)
    found = noisy.difference("sscf", "reference", "per_slice", "whole", "psnr")
    assert found["low"] > 0 and found["mean"] == pytest.approx(4.0) and found["noise"] == "inside the seeds' range"
    monkeypatch.setattr("scripts.research.tables.MIN_PATIENTS", 4)
    assert read_runs(folders, 50).difference("sscf", "unet", "per_slice", "whole", "psnr")["noise"] == "3 patients"


def test_best_of_a_scenario_is_marked_in_its_row(runs: Runs) -> None:
    table = build_table(runs, "t", "title", "scenarios")
    rows = {line.split("|")[1].strip(): line.split("|") for line in table.markdown().splitlines() if "|" in line}
    methods = ("Zero filling", "unet", "sscf")
    for scenario in map(scenario_name, SCENARIOS):
        for score, digits, choose in (("psnr", 2, max), ("lpips", 4, min)):
            best = choose(cell(table, scenario, method, score) for method in methods)
            assert f" **{best:.{digits}f}** " in rows[scenario]
        assert sum("**" in text for text in rows[scenario]) == 2


def test_difference_is_of_the_seeds_that_both_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.research.tables.MIN_PATIENTS", 3)
    reference = {s: write_scores(tmp_path / f"r{s}", make_scores(0, 8.0 * s)) for s in (0, 1)}
    once = {1: write_scores(tmp_path / "once", make_scores(1, 11.0), seed=1)}
    runs = read_runs({"sscf": reference, "once": once}, 50)
    found = runs.difference("once", "sscf", "per_slice", "whole", "psnr")
    expected = literal_mean(make_scores(1, 11.0), "psnr") - literal_mean(make_scores(0, 8.0), "psnr")
    assert found["mean"] == pytest.approx(expected)
    # the seeds of the reference lie 8 apart
    assert found["noise"] == "inside the seeds' range"
    caption = build_table(runs, "t", "title", "scores", reference="sscf").caption
    assert "once 1 alone, their differences being of the seeds that both have" in caption
    apart = read_runs({"sscf": {0: reference[0]}, "once": once}, 50)
    assert apart.difference("once", "sscf", "per_slice", "whole", "psnr") is None


# -------------------------------------------------------------------------------------------------------------- texts
def test_texts_have_the_numbers_the_best_and_the_caption(runs: Runs) -> None:
    table = build_table(runs, "comparison", "By contrast", "contrasts", {"unet": "U-Net", "sscf": "SSCF_1 & Co"})
    markdown, latex = table.markdown(), table.latex()
    ours, theirs = (cell(table, row, "FLAIR", "psnr") for row in ("SSCF_1 & Co", "U-Net"))
    assert ours > theirs
    assert f"**{ours:.2f}**" in markdown and f"| {theirs:.2f} |" in markdown
    assert f"\\textbf{{{ours:.2f}}}" in latex and "SSCF\\_1 \\& Co" in latex
    smallest = min(cell(table, row, "T1", "lpips") for row in ("SSCF_1 & Co", "U-Net", "Zero filling"))
    assert f"**{smallest:.4f}**" in markdown
    assert [line.count("|") for line in markdown.splitlines() if line.startswith("|")] == [10] * 5
    assert "|  | FLAIR PSNR↑ | FLAIR LPIPS↓ | T1 PSNR↑ " in markdown
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "PSNR$\\uparrow$", "\\label{tab:comparison}"):
        assert rule in latex
    for text in (markdown, latex):
        assert "Cohort Phantom" in text and "test part of the split fedcba98, 3 patients (4 studies)" in text
        assert "; protocol per_slice (2-D); seed 3" in text.replace("\\_", "_")
        assert "01234567" in text
    # nothing that LaTeX would read as a command or comment is left
    body = re.sub(r"\\[A-Za-z]+\{|\\[&%$#_{}]", "", latex)
    assert "_" not in body.replace("tab:comparison", "") and "%" not in body
    csv = pd.read_csv(io.StringIO(table.csv()))
    assert csv.loc[csv["row"] == "U-Net", "mean"].iloc[0] == pytest.approx(theirs, abs=1e-12)


def test_real_contrasts_bound_the_downstream_task_and_are_never_the_best(tmp_path: Path) -> None:
    frame = make_scores(0)
    frame = frame[frame["score"] == "dice"].assign(protocol="downstream")
    real = frame[frame["scenario"] == "FLAIR"].assign(scenario="+".join(CONTRASTS), method="real", value=0.99)
    folder = write_scores(tmp_path / "a", pd.concat([frame, real]))
    table = build_table(read_runs({"SSCF": folder}, 20), "t", "title", "downstream")
    row = {line.split("|")[1].strip(): line for line in table.markdown().splitlines() if line.startswith("|")}
    assert row["Full contrasts (real)"].count("0.9900") == 3 and "**" not in row["Full contrasts (real)"]
    for region in REGIONS:
        mean = literal_mean(frame, "dice", region)
        assert cell(table, "SSCF", region, "dice") == pytest.approx(mean) and f"**{mean:.4f}**" in row["SSCF"]


def test_row_that_was_not_run_says_why(runs: Runs) -> None:
    rows = {"unet": "U-Net", "bank_1000": "L = 1000"}
    table = build_table(runs, "t", "title", "scores", rows, notes={"bank_1000": "n/a: too few slices", "other": "x"})
    (line,) = [line for line in table.markdown().splitlines() if line.startswith("| L = 1000")]
    assert "n/a: too few slices" in line and "n/a: too few slices" in table.csv() and "other" not in table.csv()


def test_tables_are_written_in_three_forms(runs: Runs, tmp_path: Path) -> None:
    definitions = {
        "mean": {"title": "Mean", "kind": "scores"},
        "nothing": {"title": "No such score", "kind": "downstream"},
        "single": {"title": "One of two", "kind": "dice", "rows": {"unet": "U-Net", "other": "Other"}},
    }
    write_tables(standard_tables(runs, definitions), tmp_path / "tables")
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"mean.csv", "mean.md", "mean.tex", "tables.md"}


# ------------------------------------------------------------------------------------------------- values of the paper
PAPER = {
    "source": "a paper",
    "protocol": {"cohort": "BraTS2020", "studies": 369, "fractions": [0.7, 0.1, 0.2], "metadata": {"image_size": 192}},
    "tables": {"ablation": {"title": "Table 4", "blocks": ["all"], "scores": ["psnr"], "rows": {"Baseline": [24.19]}}},
}


def test_paper_stands_apart_and_says_what_differs(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "paper.json").write_text(json.dumps(PAPER))
    definitions = {"mean": {"title": "Mean", "kind": "scores", "paper": "ablation"}}
    ours, paper = standard_tables(runs, definitions, tmp_path / "paper.json")
    assert paper.name == "mean_paper" and "24.19" in paper.markdown() and "24.19" not in ours.markdown()
    assert "Not to be compared" in paper.caption and "the cohort is not BraTS2020" in paper.caption
    assert "3 instead of about 74 test patients" in paper.caption and "(BraTS2020, 369 studies)" in paper.title


def test_scaling_and_slices_are_told_and_named_where_they_are_not_the_paper_s(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "a", make_scores(0), scaling="brain", scored_slices=[70, 71])
    caption = build_table(read_runs({"a": folder}, 20), "t", "title", "scores").caption
    assert "; scaling brain; scored slices [70, 71]; " in caption
    protocol = json.loads((BUNDLE_ROOT / "configs" / "paper_values.json").read_text())["protocol"]
    as_published = {"cohort": "MICCAI_BraTS2020_TrainingData", **protocol["metadata"]}
    assert protocol_differences([as_published], 74, protocol) == []
    changed = as_published | {"scaling": "brain", "scored_slices": [70, 71]}
    assert protocol_differences([changed], 74, protocol) == [
        "scored slices [70, 71] instead of largest_tumor",
        'scaling "brain" instead of per_slice',
    ]
    assert len(protocol_differences([], 74, PAPER["protocol"])) == 2


# ------------------------------------------------------------------------------------------------------------ reading
def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    frame = make_scores(0)
    whole = write_scores(tmp_path / "whole", frame)
    part = write_scores(tmp_path / "part", frame[frame["study"] != "Case_3"])
    with pytest.raises(StudyError, match=r"b \(seed 0\) and a were evaluated on different studies \(Case_3 is in one"):
        read_runs({"a": whole, "b": part})
    other = write_scores(tmp_path / "defined", frame, protocols={"per_slice": "2-D, clipped"})
    with pytest.raises(
        StudyError, match="whole and defined were scored by different definitions of the protocol per_s"
    ):
        read_runs({"whole": whole, "defined": other})
    fewer = write_scores(tmp_path / "fewer", frame[frame["scenario"] != "T1"])
    with pytest.raises(StudyError, match=r"fewer \(seed 0\) and whole were .* different scenarios \(T1 is in one"):
        read_runs({"whole": whole, "fewer": fewer})
    for key, values in {
        "image_size": (192, 128),
        "scaling": ("brain", "per_slice"),
        "scored_slices": ([70], [71]),
    }.items():
        folders = {f"{key}{v}": write_scores(tmp_path / f"{key}{v}", frame, **{key: v}) for v in values}
        with pytest.raises(StudyError, match=f"were scored with the {key} .* on which the protocol per_slice depends"):
            read_runs(folders)
        for one in folders.values():  # the grid on file is the same for both
            facts = json.loads((one / "metrics.json").read_text())
            facts["metadata"]["protocols"] = {"volume": "3-D study on the grid on file"}
            (one / "metrics.json").write_text(json.dumps(facts))
        read_runs(folders)
    with pytest.raises(StudyError, match="Case_1a twice for seed 0: give every fold once"):
        read_runs({"a": [whole, part]})
    with pytest.raises(StudyError, match=r"no scores\.csv in .*nowhere"):
        read_runs({"a": tmp_path / "nowhere"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scores.csv").write_text("study,value\nx,1\n")
    with pytest.raises(StudyError, match="no column patient"):
        read_runs({"a": tmp_path / "other"})
    with pytest.raises(StudyError, match="There are no runs"):
        read_runs({})
    with pytest.raises(StudyError, match="kind has no nonsense: choose from contrasts"):
        build_table(read_runs({"a": whole}), "t", "title", "nonsense")


def test_single_patient_has_no_interval(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "a", make_scores(0, studies={"Case_1": "Case_1"}))
    other = write_scores(tmp_path / "b", make_scores(1, 9.0, studies={"Case_1": "Case_1"}))
    table = build_table(read_runs({"a": folder, "b": other}), "t", "title", "scores", reference="a")
    low = cell(table, "a", "all", "psnr", "low")
    assert low is None or math.isnan(low)
    assert "within noise (a single patient)" in table.remarks["b"] and "[" not in table.remarks["b"]
