# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The studies of a run: split that stays, failures that show, mistakes told in one sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from test_slices import TRANSFORM, write_study

from scripts.contrasts import StudyError
from scripts.data.cohort import Cohort, cohort_slices
from scripts.data.datalist import PARTS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six complete studies."""
    for i in range(6):
        study_in(tmp_path / "data", f"Case_{i:03}", i)
    return tmp_path / "data"


def study_in(data: Path, name: str, seed: int = 0) -> None:
    (data / name).mkdir(parents=True)
    write_study(data / name, name, seed)


def cohort(data: Path, **changes: object) -> Cohort:
    out = data.parent
    settings = {"cache_dir": str(out / "cache"), "output_dir": str(out / "out"), "fractions": (0.5, 0.25, 0.25)}
    return Cohort(str(data), TRANSFORM, **{**settings, **changes})  # type: ignore[arg-type]


def names(made: Cohort) -> dict[str, list[str]]:
    return {part: [item["study"] for item in items] for part, items in made.parts.items()}


def studies(split: dict[str, list[str]]) -> list[str]:
    return [study for part in split.values() for study in part]


def damage(data: Path, study: str) -> Path:
    """Cuts a volume short; returns its path."""
    path = data / study / f"{study}_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return path


# ------------------------------------------------------------------------------------------------------------- split
def test_split_is_written_and_used_again_when_a_study_comes_in(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = cohort(data)
    written = data.parent / "out" / "split.json"
    assert not written.exists()  # what is refused now leaves nothing
    made.finish()
    first = names(made)
    assert json.loads(written.read_text()) == first
    assert sorted(studies(first)) == [f"Case_{i:03}" for i in range(6)] and list(first) == list(PARTS)
    study_in(data, "Case_006")
    with caplog.at_level(logging.WARNING):
        again = cohort(data, seed=77, fractions=(0.2, 0.2, 0.6))
    assert names(again) == first == json.loads(written.read_text())
    assert "Case_006" in caplog.text and "which split_fractions and seed do not move" in caplog.text
    other = cohort(data, output_dir=str(data.parent / "other"))
    assert "Case_006" in studies(names(other))


def test_given_split_file_goes_before_the_split_of_an_earlier_start(data: Path) -> None:
    cohort(data).finish()
    given = data.parent / "given.json"
    wanted = {"training": ["Case_005"], "validation": ["Case_000"], "test": ["Case_003", "Case_004"]}
    given.write_text(json.dumps(wanted))
    made = cohort(data, split_file=str(given))
    assert names(made) == wanted
    # whoever evaluates with a split leaves that of the training there; a training writes its own once it has started
    first = names(cohort(data))
    assert first != wanted
    trainer = Engine(lambda engine, batch: None)
    made.attach(trainer)
    trainer.run([0])
    assert names(cohort(data)) == wanted


def test_processes_write_the_failures_of_all(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cohort(data)
    made.failures = [{"study": "b", "reason": "x"}]
    shares = [[{"study": "a", "reason": "x"}], made.failures, []]
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("ignite.distributed.all_gather", lambda own: shares)
    with pytest.raises(StudyError, match="2 of 6 studies"):
        made.finish()
    assert [failure["study"] for failure in json.loads((made.output_dir / "failures.json").read_text())] == ["a", "b"]
    # a process without failures of its own must not take the file away, and knows of the others'
    made.failures = []
    with pytest.raises(StudyError, match="2 of 6 studies"):
        made.finish()
    assert (made.output_dir / "failures.json").is_file()


# ------------------------------------------------------------------------------------------------------------ slices
def test_slices_of_a_part_are_those_of_its_studies(data: Path) -> None:
    made = cohort(data)
    dataset = made.slices("training", choice="largest_tumor", count=2)
    assert dataset.studies == names(made)["training"] and len(dataset) == 2 * len(dataset.studies)
    same = cohort_slices(made, "training", choice="largest_tumor", count=2)
    assert torch.equal(same.index, dataset.index)
    assert len(made.slices("training", choice="brain")) > len(dataset)


def test_broken_study_is_left_out_and_shows_at_the_end(data: Path) -> None:
    split = names(cohort(data))
    broken = split["training"][1]
    path = damage(data, broken)
    made = cohort(data)
    for _ in range(2):  # a part that is asked for twice reports its failures once
        dataset = made.slices("training", choice="brain")
    assert dataset.studies == [study for study in split["training"] if study != broken]
    assert made.slices("validation", choice="brain").studies == split["validation"]
    report = data.parent / "out" / "failures.json"
    with pytest.raises(StudyError, match=r"complete, but 1 of 6 studies could not be used: .*failures\.json") as end:
        made.finish()
    assert "\n" not in str(end.value)
    (failure,) = json.loads(report.read_text())
    assert failure["study"] == broken and str(path) in failure["reason"]

    # the next start is clean once the study is mended
    path.unlink()
    write_study(data / broken, broken, 9)
    mended = cohort(data)
    mended.slices("training", choice="brain")
    mended.finish()
    assert not report.exists()


def test_study_without_a_chosen_slice_is_a_failure(data: Path) -> None:
    study, *others = names(cohort(data))["training"]
    (data / study / f"{study}_seg.nii.gz").unlink()
    made = cohort(data)
    assert made.slices("training", choice="tumor").studies == others
    with pytest.raises(StudyError, match="1 of 6 studies"):
        made.finish()


# ---------------------------------------------------------------------------------------------------------- mistakes
def one_sentence(raised: pytest.ExceptionInfo[StudyError]) -> str:
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_folder_without_studies_or_no_folder_is_told(data: Path) -> None:
    (data.parent / "empty").mkdir()
    with pytest.raises(StudyError) as raised:
        cohort(data.parent / "empty")
    assert "No study was found" in one_sentence(raised)
    with pytest.raises(StudyError) as raised:
        cohort(data.parent / "nowhere")
    assert "does not exist" in one_sentence(raised)
    assert not (data.parent / "out").exists()


def test_part_without_a_study_is_told(data: Path) -> None:
    made = cohort(data, fractions=(0.5, 0, 0.5))
    assert made.slices("training", choice="brain")
    with pytest.raises(StudyError) as raised:
        made.slices("validation")
    assert "The validation part of the split has no study" in one_sentence(raised)


def test_part_of_broken_studies_is_told(data: Path) -> None:
    made = cohort(data)
    path = damage(data, names(made)["validation"][0])
    for study in names(made)["validation"][1:]:
        damage(data, study)
    with pytest.raises(StudyError) as raised:
        made.slices("validation")
    text = one_sentence(raised)
    assert f"None of {len(names(made)['validation'])} studies can be used" in text and str(path) in text
