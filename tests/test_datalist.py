# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Study discovery by file names and patient-level splits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from scripts.contrasts import StudyError
from scripts.data.datalist import (
    PARTS,
    find_studies,
    patient_of,
    read_datalist,
    single_study,
    split_patients,
    write_split,
)
from scripts.data.transforms import LoadStudyd

BRATS_2021 = {key: f"BraTS2021_00031_{key}.nii.gz" for key in ("flair", "t1", "t1ce", "t2", "seg")}
BRATS_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
UCSF_BMSR = {"flair": "FLAIR", "t1": "T1pre", "t1ce": "T1post", "t2": "T2Synth", "seg": "BraTS-seg"}
BIDS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "seg": "dseg"}

# folder, names of the files of each key, files to be ignored, study, patient, synthesized contrasts
PROTOCOLS = {
    "BraTS 2018": (
        "HGG/Brats18_2013_21_1",
        {key: f"Brats18_2013_21_1_{key}.nii.gz" for key in BRATS_2021},
        [],
        "Brats18_2013_21_1",
        "Brats18_2013_21_1",
        [],
    ),
    "BraTS 2021": ("BraTS2021_00031", BRATS_2021, ["notes.txt"], "BraTS2021_00031", "BraTS2021_00031", []),
    "BraTS 2023": (
        "BraTS-GLI-00005-100",
        {key: f"BraTS-GLI-00005-100-{ending}.nii.gz" for key, ending in BRATS_2023.items()},
        ["BraTS-GLI-00005-100-t1c-voided.nii.gz"],
        "BraTS-GLI-00005-100",
        "BraTS-GLI-00005",
        [],
    ),
    "UCSF-BMSR": (
        "UCSF_BrainMetastases_TRAIN/100101A",
        {key: f"100101A_{ending}.nii.gz" for key, ending in UCSF_BMSR.items()},
        ["100101A_seg.nii.gz", "100101A_subtraction.nii.gz", "100101A_T1pre_seg.nii.gz"],
        "100101A",
        "100101",
        ["t2"],
    ),
    "BIDS": (
        "sub-01/ses-1/anat",
        {key: f"sub-01_ses-1_{ending}.nii.gz" for key, ending in BIDS.items()},
        ["sub-01_ses-1_T1w.json", "sub-01_ses-1_T1w_seg.nii.gz"],
        "sub-01_ses-1",
        "sub-01",
        [],
    ),
    "BIDS with more entities": (
        "sub-anna/anat",
        {
            "flair": "sub-anna_acq-3d_FLAIR.nii",
            "t1ce": "sub-anna_ce-GD_run-2_T1w.nii",
            "t1": "sub-anna_run-1_T1w.nii",
            "seg": "sub-anna_space-T1w_label-lesion_mask.nii.gz",
        },
        [],
        "sub-anna",
        "sub-anna",
        [],
    ),
    "bare names": (
        "patient07",
        {
            "flair": "FLAIR.nii.gz",
            "t1": "T1.nii.gz",
            "t1ce": "T1POST.nii.gz",
            "t2": "T2.nii.gz",
            "seg": "GOLD_STANDARD.nii.gz",
        },
        ["._FLAIR.nii.gz", "T1_bias.nii.gz"],
        "patient07",
        "patient07",
        [],
    ),
    "prefix without a number": (
        "case_a",
        {"t1": "brain_T1.nii", "t1ce": "brain_T1_Gd.nii", "t2": "brain_t2.NII.GZ"},
        [],
        "case_a",
        "case_a",
        [],
    ),
}


def touch(folder: Path, *names: str) -> Path:
    """Empty files: discovery looks at names only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_name_conventions(tmp_path, protocol):
    folder, names, ignored, study, patient, synthesized = PROTOCOLS[protocol]
    where = touch(tmp_path / folder, *names.values(), *ignored)
    (item,) = find_studies(tmp_path)
    expected = {"study": study, "patient": patient, **{key: str(where / name) for key, name in names.items()}}
    if synthesized:
        expected["synthesized"] = synthesized
    assert item == expected


@pytest.mark.parametrize(
    ("folder", "names", "study"),
    [
        ("Trial_T2", {"flair": "Trial_T2_flair.nii.gz", "t1": "Trial_T2_t1.nii.gz"}, "Trial_T2"),
        ("p1_seg", {"flair": "p1_seg_flair.nii.gz"}, "p1_seg"),
        ("all", {key: f"Trial_T2_{key}.nii.gz" for key in ("flair", "t1", "t1ce", "t2", "seg")}, "Trial_T2"),
    ],
)
def test_study_named_as_a_contrast_loses_none(tmp_path, folder, names, study):
    touch(tmp_path / folder, *names.values(), f"{study}_t1_seg.nii.gz")
    paths = {key: str(tmp_path / folder / name) for key, name in names.items()}
    (item,) = find_studies(tmp_path)
    assert item == {"study": study, "patient": study, **paths}
    paths.pop("seg", None)
    assert single_study(**paths)[0]["study"] == study


def test_what_is_derived_from_a_volume_is_no_study(tmp_path):
    touch(tmp_path / "P1_T1", "P1_T1.nii.gz", "P1_T1_seg.nii.gz", "P1_T1_flair.nii.gz", "P1_T1_t2.nii.gz")
    touch(tmp_path / "bids", "sub-2_T1w_t2.nii.gz", "sub-2_T1w_flair.nii.gz", "sub-2_T1w.nii.gz")
    assert [set(item) - {"study", "patient"} for item in find_studies(tmp_path)] == [{"t1"}, {"t1"}]


def test_flat_folder_holds_several_studies(tmp_path):
    touch(tmp_path, *BRATS_2021.values(), "BraTS2021_00042_t1.nii.gz", "100101A_FLAIR.nii.gz", "100101B_FLAIR.nii.gz")
    items = find_studies(tmp_path)
    assert [item["study"] for item in items] == ["100101A", "100101B", "BraTS2021_00031", "BraTS2021_00042"]
    assert [item["patient"] for item in items][:2] == ["100101", "100101"]
    assert set(items[3]) == {"study", "patient", "t1"}


def test_masks_in_another_folder(tmp_path):
    touch(tmp_path / "images", "Case_01_t1.nii.gz", "Case_02_t1.nii.gz")
    touch(tmp_path / "labels", "Case_01_seg.nii.gz", "Case_02_seg.nii.gz")
    items = find_studies(tmp_path)
    assert [Path(item["seg"]).name for item in items] == ["Case_01_seg.nii.gz", "Case_02_seg.nii.gz"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    for site in ("a", "b"):
        touch(tmp_path / site / "patient1", "T1.nii.gz")
    assert [item["study"] for item in find_studies(tmp_path)] == ["a_patient1", "b_patient1"]
    items = find_studies(tmp_path, patient_pattern=r"(patient\d)")
    assert [item["patient"] for item in items] == ["patient1", "patient1"]
    with pytest.raises(StudyError, match="patient_pattern"):
        find_studies(tmp_path, patient_pattern=r"(sub\d)")


def test_an_acquired_series_and_a_brats_mask_are_preferred(tmp_path):
    touch(tmp_path, "P1_T2.nii.gz", "P1_T2Synth.nii.gz", "P1_seg.nii.gz", "P1_BraTS-seg.nii.gz", "P1_dseg.nii.gz")
    (item,) = find_studies(tmp_path)
    assert Path(item["t2"]).name == "P1_T2.nii.gz" and "synthesized" not in item
    assert Path(item["seg"]).name == "P1_BraTS-seg.nii.gz"


def test_mask_without_contrast_is_reported_not_dropped(tmp_path):
    touch(tmp_path / "S1", "S1_seg.nii.gz")
    (item,) = find_studies(tmp_path)
    assert set(item) == {"study", "patient", "seg"}


def test_a_mask_with_a_name_of_its_own(tmp_path):
    folder = touch(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355_t1.nii", "W39_1998.09.19_Segm.nii")
    (item,) = find_studies(tmp_path)
    assert item["study"] == "BraTS20_Training_355" and item["seg"] == str(folder / "W39_1998.09.19_Segm.nii")
    # but never the mask of another study
    touch(tmp_path / "flat", "S1_t1.nii", "S2_seg.nii")
    assert ["seg" in item for item in find_studies(tmp_path / "flat")] == [False, True]


def test_own_file_names(tmp_path):
    touch(tmp_path / "one", "Dark Fluid.nii.gz", "mprage.nii.gz", "mprage_gado.nii.gz")
    pattern = {"flair": "dark*fluid.nii.gz", "t1": "MPRAGE.nii.gz", "t1ce": "mprage_gado.nii.gz"}
    (item,) = find_studies(tmp_path, pattern)
    assert set(item) == {"study", "patient", "flair", "t1", "t1ce"}
    touch(tmp_path / "flat", "p1_x.nii", "p2_x.nii", "p2_y.nii")
    items = find_studies(tmp_path / "flat", {"t1": "*_x.nii", "t2": "*_y.nii"})
    assert [(item["study"], "t2" in item) for item in items] == [("p1", False), ("p2", True)]
    for wrong in ({"flare": "*.nii"}, {"flair": 3}):
        with pytest.raises(StudyError, match="file name glob"):
            find_studies(tmp_path, wrong)


def test_a_name_that_is_not_understood_is_told(tmp_path, caplog):
    touch(tmp_path / "one", "one_t1.nii.gz", "notes.txt")
    assert len(find_studies(tmp_path)) == 1 and not caplog.messages
    touch(tmp_path / "two", "two_dark.nii.gz", "two_mprage.nii.gz")
    assert len(find_studies(tmp_path)) == 1
    (message,) = caplog.messages
    assert "tell no contrast: 2" in message and "two_dark.nii.gz" in message


def test_what_cannot_be_used_is_named_and_stops_no_other_study(tmp_path, monkeypatch):
    touch(tmp_path / "S1", "S1_t1.nii.gz", "S1_t1.nii")
    touch(tmp_path / "S2", "S2_t1.nii.gz")
    touch(tmp_path / "line\nbreak", "line\nbreak_t1.nii.gz")
    (tmp_path / "S4" / "S4_t2.nii.gz").mkdir(parents=True)
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):  # whom permissions do not bind, root, could list it
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    items = {item["study"]: item for item in find_studies(tmp_path)}
    assert set(items) == {"S1", "S2", "line\nbreak", "S4", "locked"}
    assert [name for name, item in items.items() if "failure" in item] == ["S1", "locked"]
    assert re.search(r"S1 has two files for t1, .*S1_t1\.nii and .*S1_t1\.nii\.gz", items["S1"]["failure"])
    assert "locked cannot be listed (Permission denied)" in items["locked"]["failure"]
    for name in ("S1", "locked"):
        with pytest.raises(StudyError, match=re.escape(items[name]["failure"])):
            LoadStudyd()(items[name])
    with pytest.raises(StudyError, match=r"S4_t2\.nii\.gz cannot be read"):
        LoadStudyd()(items["S4"])


def test_one_study_in_two_places(tmp_path):
    touch(tmp_path / "a", "S1_t1.nii.gz")
    touch(tmp_path / "b", "S1_t1.nii.gz")
    (item,) = find_studies(tmp_path)
    assert re.search(r"a/S1_t1\.nii\.gz and .*b/S1_t1\.nii\.gz", item["failure"])


def test_nothing_found(tmp_path):
    with pytest.raises(StudyError, match=r"No study was found in .*BIDS.*correct dataset_dir"):
        find_studies(touch(tmp_path / "empty", "readme.txt"))
    with pytest.raises(StudyError, match=r"No study .*own_\*"):
        find_studies(tmp_path / "empty", {"t1": "own_*.nii"})
    with pytest.raises(StudyError, match=r"readme\.txt is a file: set dataset_dir"):
        find_studies(tmp_path / "empty" / "readme.txt")
    with pytest.raises(StudyError, match="nowhere does not exist"):
        find_studies(tmp_path / "nowhere")


def test_lists_of_studies(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\ufeffStudy,T1,t2,seg\nS1,x/a_t1.nii,NaN,/m.nii\n\n,y/sub-02_T1w.nii,y/sub-02_T2w.nii,,\n"
    )
    expected = [
        {"study": "S1", "patient": "S1", "t1": str(tmp_path / "x/a_t1.nii"), "seg": "/m.nii"},
        {
            "study": "sub-02",
            "patient": "sub-02",
            "t1": str(tmp_path / "y/sub-02_T1w.nii"),
            "t2": str(tmp_path / "y/sub-02_T2w.nii"),
        },
    ]
    assert read_datalist(tmp_path / "a.csv") == expected
    rows = [
        {"study": "S1", "t1": ["x/a_t1.nii"], "seg": "/m.nii"},
        {"t1": "y/sub-02_T1w.nii", "t2": "y/sub-02_T2w.nii"},
    ]
    for content in (rows, {"training": [], "testing": rows}, {"name": "x", "validation": rows}):
        (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content))
        assert read_datalist(tmp_path / "a.json") == expected
    for content, words in (
        ("study,t3\nS1,x\n", "unknown column t3"),
        ("study;t1\nS1;x\n", "unknown column study;t1: give the columns .*, with commas"),
        ("study,t1\nS1,x,y\n", "unknown column without a name"),
        ("study,t1\n", "has no study"),
        ("study,t1\nS1,x\nS1,y\n", "names the study S1 twice"),
    ):
        (tmp_path / "b.csv").write_text(content)
        with pytest.raises(StudyError, match=words):
            read_datalist(tmp_path / "b.csv")
    (tmp_path / "b.json").write_text('[{"t1": ["x", "y"]}]')
    with pytest.raises(StudyError, match="t1 must be one value"):
        read_datalist(tmp_path / "b.json")
    for content in ("{", "{}", "[1]", "3"):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(StudyError, match="cannot be read as CSV or JSON"):
            read_datalist(tmp_path / "b.json")
    with pytest.raises(StudyError, match="cannot be read"):
        read_datalist(tmp_path / "none.csv")


def cohort(studies: int = 20) -> list[dict[str, str]]:
    """Examinations A and B of each patient."""
    names = [f"{100101 + i // 2}{'AB'[i % 2]}" for i in range(studies)]
    return [{"study": name, "patient": patient_of(name)} for name in names]


def names_of(parts):
    return {part: [item["study"] for item in items] for part, items in parts.items()}


def test_split_is_by_patient_and_seeded():
    items = cohort(40)
    parts = split_patients(items, seed=3)
    assert tuple(parts) == PARTS
    patients = [{item["patient"] for item in parts[part]} for part in PARTS]
    assert [len(p) for p in patients] == [14, 2, 4] and len(set.union(*patients)) == 20
    assert sum(map(len, parts.values())) == 40
    assert split_patients(items[::-1], seed=3) == parts
    assert split_patients(items, seed=4) != parts


@pytest.mark.parametrize("patients", [3, 4, 5, 7])
def test_no_wanted_part_is_empty(patients):
    items = [{"study": str(i), "patient": str(i)} for i in range(patients)]
    assert all(split_patients(items, fractions=(0.98, 0.01, 0.01)).values())
    parts = split_patients(items, fractions=(0.7, 0, 0.3))
    assert parts["training"] and not parts["validation"] and parts["test"]


def test_split_of_few_patients_and_bad_fractions():
    parts = split_patients([{"study": "a", "patient": "a"}])
    assert names_of(parts) == {"training": ["a"], "validation": [], "test": []}
    assert not any(split_patients([]).values())
    for fractions in ((0.5, 0.5), (-1, 1, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="fractions"):
            split_patients(cohort(), fractions)


def test_split_file_round_trip(tmp_path):
    items = cohort()
    parts = split_patients(items, seed=1)
    write_split(parts, tmp_path / "new" / "split.json")
    assert split_patients(items, seed=2, split_file=tmp_path / "new" / "split.json") == parts
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["split.json"]


def test_split_file_by_patients_and_its_errors(tmp_path):
    path = tmp_path / "split.json"
    items = cohort(6)

    def read(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return names_of(split_patients(items, split_file=path))

    by_patient = read({"training": ["100101"], "test": ["100103A"]})
    assert by_patient == {"training": ["100101A", "100101B"], "validation": [], "test": ["100103A"]}
    for content, message in (
        ({"training": ["100999"]}, "names 100999"),
        ({"training": ["100101A"], "test": ["100101B"]}, "patient 100101 in training and in test"),
        ({"train": ["100101"]}, "correct its keys"),
        ("{", "cannot be read as JSON"),
    ):
        with pytest.raises(StudyError, match=message):
            read(content)


def test_single_study(tmp_path):
    touch(tmp_path / "S7", "S7_flair.nii.gz", "S7_t2.nii.gz", "T1.nii.gz", "p8 dark.nii", "p8 light.nii")
    folder = tmp_path / "S7"
    (item,) = single_study(flair=folder / "S7_flair.nii.gz", t2=str(folder / "S7_t2.nii.gz"))
    assert item == {
        "study": "S7",
        "patient": "S7",
        "flair": str(folder / "S7_flair.nii.gz"),
        "t2": str(folder / "S7_t2.nii.gz"),
    }
    assert single_study(t1=folder / "T1.nii.gz")[0]["study"] == "S7"
    assert single_study(t1=[folder / "T1.nii.gz"], name="x")[0]["study"] == "x"
    with pytest.raises(StudyError, match="t1 must be one value"):
        single_study(t1=["a", "b"])
    assert single_study(t1=folder / "p8 dark.nii", t2=folder / "p8 light.nii")[0]["study"] == "p8"
    with pytest.raises(StudyError, match="No file"):
        single_study()
    with pytest.raises(StudyError, match=r"no\.nii does not exist"):
        single_study(t1ce=tmp_path / "no.nii")
