# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Datalists: which files make up a study, whose study it is, and the split of the patients."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import os
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai.data import partition_dataset
from monai.utils import ensure_tuple

from ..contrasts import CONTRAST_KEYS, FAILURE_KEY, MASK_KEY, StudyError
from .formats import holds_dicom, volume_stem

#: Parts of a split, in the order of the fractions.
PARTS = ("training", "validation", "test")

_SYNTHESIZED = r"(?:[_-]?synth\w*)?"
#: What a file name ends with (any case, after ``_``, ``-``, ``.`` or at its start): key, expression, precedence. The
#: precedence chooses between two files of one key, lower first; two files of the same precedence are an error.
_ENDINGS = (
    ("flair", rf"(?:flair|t2f|t2w?[_-]?flair){_SYNTHESIZED}", 0),
    # BIDS marks a contrast agent by an entity, before other entities or at once: sub-01_ce-gadolinium_run-1_T1w
    ("t1ce", rf"ce-[a-z0-9]+(?:_[a-z]+-[a-z0-9]+)*_t1w{_SYNTHESIZED}", 0),
    ("t1ce", rf"t1w?[_-]?(?:ce|c|gd|post|km)(?:[_-]?contrast)?{_SYNTHESIZED}", 0),
    ("t1", rf"t1(?:w|n|[_-]?pre|[_-]?native)?{_SYNTHESIZED}", 0),
    ("t2", rf"t2w?{_SYNTHESIZED}", 0),
    # UCSF-BMSR and UCSD-PTGBM have a mask in the BraTS coding beside or instead of a binary one
    ("seg", r"brats[_-](?:tumor[_-])?seg", 0),
    ("seg", r"label-lesion_(?:mask|dseg)", 0),
    ("seg", r"(?:dseg|segm?|tumor_segmentation|gold_standard)", 1),
)
_BUILT_IN = tuple(
    (key, re.compile(rf"^(?:(?P<prefix>.*?)[_.\- ])?(?P<ending>{ending})$", re.IGNORECASE | re.DOTALL), precedence)
    for key, ending, precedence in _ENDINGS
)
_BIDS = re.compile(r"^(?P<patient>sub-[a-z0-9]+)(?:_(?P<session>ses-[a-z0-9]+))?(?=_|$)", re.IGNORECASE)
#: An examination of UCSF-BMSR: six digits of the patient and a letter.
_UCSF_BMSR = re.compile(r"^(\d{6})[A-Z]$", re.IGNORECASE)
#: BraTS 2023 and later: task, patient, time point.
_BRATS_TIME_POINT = re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d+$", re.IGNORECASE)

_KNOWN_NAMES = (
    "X_flair, X_t1, X_t1ce, X_t2 and X_seg (BraTS to 2021), X-t2f, X-t1n, X-t1c, X-t2w and X-seg (BraTS from 2023), "
    "X_FLAIR, X_T1pre, X_T1post and X_T2Synth (UCSF-BMSR) or BIDS names, each .nii, .nii.gz, .nrrd or .mha or the name "
    "of a folder with a DICOM series"
)

logger = logging.getLogger(__name__)


class _Match(NamedTuple):
    """What a file name says: key of the datalist item, study prefix, precedence, made by a machine or not."""

    key: str
    prefix: str
    precedence: int
    synthesized: bool


def find_studies(
    dataset_dir: str | os.PathLike[str], pattern: Mapping[str, str] | None = None, patient_pattern: str | None = None
) -> list[dict[str, Any]]:
    """Find the studies below a folder by the names of their files.

    A study is one folder with contrast files, or, where a folder holds several studies, the files that share what
    stands before the contrast in their names. Files whose common prefix holds a number are one study wherever they
    lie, so that masks may be kept in another folder. A mask in the BraTS coding is preferred to a binary one, and an
    acquired series to a synthesized one; the binary masks of UCSF-BMSR are not taken at all, since they do not tell
    the tumor classes apart. A folder of DICOM files is a volume, and its name is read as a file's name is; a number
    before the contrast in there is that of the series (``study/3.000-FLAIR``). Hidden files are skipped.

    Args:
        dataset_dir: folder to search at any depth.
        pattern: for other names, one glob for each key (``flair``, ``t1``, ``t1ce``, ``t2``, ``seg``), matched with
            the file name without regard to case; what its first ``*`` stands for is the study's prefix. For example
            ``{"flair": "*_dark.nii.gz", "t1": "*_mprage.nii.gz"}``. Replaces the built-in names entirely.
        patient_pattern: regular expression searched in ``<folder below dataset_dir>/<study>``, whose first group is the
            patient. Needed where the patient cannot be told from a BIDS, BraTS or UCSF-BMSR name: else every study
            counts as a patient of its own.

    Returns:
        Items sorted by study name: ``study``, ``patient``, a path for each of the keys that exist, and
        ``synthesized`` (list of contrast keys) if a file name says that its series was synthesized. A study that has
        a mask only is an item too, as is one with two files for a contrast or a folder that cannot be listed, which
        have ``failure``, one sentence; loading them says what is wrong.

    Raises:
        StudyError: when nothing is found, two studies have one name, or ``pattern`` or ``patient_pattern`` is wrong.
    """
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise StudyError(f"{root} {problem}: set dataset_dir to the folder that holds the studies.")
    globs = None if pattern is None else _compile_globs(pattern)
    try:
        patient_expression = re.compile(patient_pattern) if patient_pattern else None
    except re.error as error:
        raise StudyError(f"The patient_pattern {patient_pattern} is no regular expression ({error}).") from error

    groups: dict[tuple[str, str], list[tuple[Path, _Match]]] = defaultdict(list)
    prefixes: dict[str, set[str]] = defaultdict(set)
    unreadable: list[OSError] = []
    unknown: list[Path] = []
    paths = _files(root, unreadable)
    known = _studies_like_contrasts(paths)
    for path in paths:
        match = _match_built_in(path, known[path.parent]) if globs is None else _match_globs(path.name, globs)
        if match is not None:
            if path.parent != root and path.is_dir() and not any(map(str.isalpha, match.prefix)):
                match = match._replace(prefix="")  # the number of a series, not of a study
            folder = path.parent.relative_to(root).as_posix()
            # a prefix with a number names a study in the whole data set, others ("brain_T1") only in their folder
            groups["" if _is_identity(match.prefix) else folder, match.prefix].append((path, match))
            prefixes[folder].add(match.prefix)
        elif volume_stem(path) is not None:
            unknown.append(path)
    if not groups and not unreadable:
        wanted = _KNOWN_NAMES if pattern is None else ", ".join(pattern.values())
        raise StudyError(
            f"No study was found in {root} or below it: expected are {wanted}; correct dataset_dir or give your own "
            "file names as file_pattern."
        )

    if unknown:
        logger.warning(
            "Volumes left out, since their names tell no contrast: %d, %s first. If they are wanted, rename them or "
            "give their names as file_pattern or a datalist_file.",
            len(unknown),
            unknown[0],
        )

    _adopt_masks(groups, prefixes)

    folders_called = defaultdict(set)
    for folder in prefixes:
        folders_called[Path(folder).name or root.resolve().name].add(folder)
    items = []
    for (folder, prefix), files in groups.items():
        if prefix and (_is_identity(prefix) or len(prefixes[folder]) > 1):
            study = prefix
        else:
            study = Path(folder).name or root.resolve().name
            if len(folders_called[study]) > 1:
                study = folder.replace("/", "_")
        items.append(_item(study, files, root, patient_expression))
    for failure in unreadable:
        study = Path(failure.filename).relative_to(root).as_posix().replace("/", "_")
        reason = f"The folder {failure.filename} cannot be listed ({failure.strerror}): change its permissions."
        items.append({"study": study, "patient": study, FAILURE_KEY: reason})
    items.sort(key=lambda item: item["study"])
    for one, other in itertools.pairwise(items):
        if one["study"] == other["study"]:
            raise StudyError(
                f"Two studies are named {one['study']} ({_any_path(one)} and {_any_path(other)}): rename one of them."
            )
    return items


def split_patients(
    items: Sequence[Mapping[str, Any]],
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    split_file: str | os.PathLike[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Split studies into training, validation and test, all studies of a patient into one part.

    Args:
        items: datalist items with ``study`` and ``patient``.
        fractions: share of the patients for training, validation and test, at least 0; 0 leaves the part empty, any
            other part gets at least one of three or more patients.
        seed: decides which patients go where; the order of ``items`` does not matter.
        split_file: JSON file ``{"training": [...], "validation": [...], "test": [...]}`` of study or patient names,
            used instead of ``fractions`` and ``seed``. Studies that it does not name are left out.

    Returns:
        Items of each part, sorted by study name.

    Raises:
        StudyError: when ``split_file`` cannot be read, names something unknown or puts a patient into two parts.
        ValueError: when ``fractions`` are not three numbers >= 0 with a positive sum.
    """
    if split_file is not None:
        return _parts(items, "study", _read_split(items, Path(split_file).expanduser()))
    patients = sorted({item["patient"] for item in items})
    # with counts as ratios the rounding of partition_dataset has nothing left to decide
    counts = _part_sizes(len(patients), fractions)
    parts = partition_dataset(patients, ratios=counts, shuffle=True, seed=seed) if patients else [[], [], []]
    return _parts(items, "patient", dict(zip(PARTS, parts, strict=True)))


def cross_validation_splits(
    items: Sequence[Mapping[str, Any]], folds: int = 5, validation_fraction: float = 0.1, seed: int = 0
) -> list[dict[str, list[dict[str, Any]]]]:
    """Splits for cross-validation by patient: every patient is tested in exactly one fold.

    Args:
        items: datalist items with ``study`` and ``patient``.
        folds: number of folds, at least 2.
        validation_fraction: share of the patients who are not tested in a fold that its validation part takes, 0 to
            below 1; a share above 0 gives at least one patient.
        seed: decides who is in which fold and part; the order of ``items`` does not matter.

    Returns:
        One split for each fold, as ``split_patients`` returns it; test parts differ by at most one patient.

    Raises:
        StudyError: when there are fewer patients than ``folds``.
        ValueError: when ``folds`` is below 2 or ``validation_fraction`` outside [0, 1).
    """
    if folds < 2 or not 0 <= validation_fraction < 1:
        raise ValueError(
            f"folds must be at least 2 and validation_fraction in [0, 1), got {folds} and {validation_fraction}."
        )
    patients = sorted({item["patient"] for item in items})
    if len(patients) < folds:
        raise StudyError(f"{len(patients)} patients cannot make {folds} folds: give more patients or fewer folds.")
    tested = partition_dataset(patients, num_partitions=folds, shuffle=True, seed=seed, even_divisible=False)
    splits = []
    for fold, test in enumerate(tested):
        rest = [patient for patient in patients if patient not in set(test)]
        count = math.ceil(validation_fraction * len(rest))
        validation, training = partition_dataset(
            rest, ratios=[count, len(rest) - count], shuffle=True, seed=seed + fold + 1
        )
        splits.append(_parts(items, "patient", dict(zip(PARTS, (training, validation, test), strict=True))))
    return splits


def write_split(parts: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> None:
    """Write the result of ``split_patients`` as a JSON file that it reads back, complete or not at all."""
    write_whole(Path(path).expanduser(), {part: [item["study"] for item in items] for part, items in parts.items()})


def write_whole(path: str | Path, content: Any) -> None:
    """Write a text, or anything else as JSON, complete or not at all; the folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: others may be writing to the same folder
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n", newline="")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def single_study(
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Datalist of one study from loose files, whatever their names.

    Args:
        flair, t1, t1ce, t2: path of each volume, ``None`` where it is missing.
        name: name of the study; by default what the file names have in common, else the name of the folder.

    Returns:
        A list of one item.

    Raises:
        StudyError: when no file is given or one does not exist.
    """
    given = zip(CONTRAST_KEYS, (flair, t1, t1ce, t2), strict=True)
    paths = {key: Path(only_one(key, path)).expanduser() for key, path in given if path}
    if not paths:
        raise StudyError(f"No file is given: give at least one of {', '.join(CONTRAST_KEYS)}.")
    for key, path in paths.items():
        if not path.exists():
            raise StudyError(f"The {key} file {path} does not exist: correct the path or leave it out.")
    study = name or _common_name(list(paths.values()))
    return [{"study": study, "patient": patient_of(study), **{key: str(path) for key, path in paths.items()}}]


def only_one(name: str, value: Any) -> str:
    """A value as a text, or the one in a list of one, as platforms give paths."""
    values = ensure_tuple(value)
    if len(values) != 1:
        raise StudyError(f"{name} must be one value, got {value!r}: give each study an entry of its own.")
    return str(values[0])


def read_datalist(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Studies of a list, in its order.

    Args:
        path: CSV file with a header, or a JSON file with a list of objects, alone or as the ``testing`` part of a MONAI
            datalist (or its only part). Columns or names are ``flair``, ``t1``, ``t1ce``, ``t2`` and ``seg`` (paths,
            relative to the folder of the list; empty where missing), ``study`` and ``patient``, which the file names
            and the study name give where they are absent.

    Returns:
        Datalist items. An item that lacks a contrast has ``failure``, so that it does not stop the others.

    Raises:
        StudyError: when the list cannot be read, is empty, has an unknown column, or names a study twice.
    """
    path = Path(path).expanduser()
    known = (*CONTRAST_KEYS, MASK_KEY, "study", "patient")
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(rows, dict):
                parts = [name for name, part in rows.items() if isinstance(part, list)]
                rows = rows["testing" if "testing" in parts else parts[0]]
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                header, *lines = list(csv.reader(file)) or [[]]
            rows = [dict(itertools.zip_longest(header, line, fillvalue="")) for line in lines if line]
        cells = [[(str(name).strip().lower(), value) for name, value in row.items() if value] for row in rows]
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise StudyError(
            f"The list {path} cannot be read as CSV or JSON ({error}): give rows below a header, or a list of objects."
        ) from error
    # "nan" is what tables make of nothing
    rows = [
        {name: text for name, value in row if (text := only_one(name, value).strip()).lower() != "nan"} for row in cells
    ]
    unknown = [name for row in rows for name in row if name not in known]
    if unknown or not rows:
        problem = f"the unknown column {unknown[0] or 'without a name'}" if unknown else "no study"
        raise StudyError(
            f"The list {path} has {problem}: give the columns {', '.join(known)}, as far as there are, with commas."
        )
    items = []
    for number, row in enumerate(rows, start=1):
        paths = {key: path.parent / Path(row[key]).expanduser() for key in (*CONTRAST_KEYS, MASK_KEY) if row.get(key)}
        study = row.get("study") or (_common_name(list(paths.values())) if paths else f"row {number}")
        files = {key: str(file) for key, file in paths.items()}
        item = {"study": study, "patient": row.get("patient") or patient_of(study), **files}
        if not set(paths) & set(CONTRAST_KEYS):
            item[FAILURE_KEY] = f"Study {study} of the list {path} names no contrast: add one or remove the row."
        items.append(item)
    twice = [study for study, count in Counter(item["study"] for item in items).items() if count > 1]
    if twice:
        raise StudyError(f"The list {path} names the study {twice[0]} twice: give each row its own study name.")
    return items


def patient_of(study: str) -> str:
    """Patient of a study, from the study's name.

    It is ``sub-01`` for BIDS, the name without the time point for BraTS from 2023 on, without the letter for UCSF-BMSR,
    else the study's name.
    """
    for expression in (_BIDS, _UCSF_BMSR, _BRATS_TIME_POINT):
        match = expression.match(study)
        if match:
            return match[1]
    return study


def _files(root: Path, unreadable: list[OSError]) -> list[Path]:
    """All files and folders of DICOM files below ``root``, sorted, linked folders included but each only once.

    What is hidden is left out. A folder that is named as a NIfTI file counts as one, so that loading it says what is
    wrong. Folders that cannot be listed are added to ``unreadable``.
    """
    found = []
    visited = set()
    for folder, children, names in os.walk(root, followlinks=True, onerror=unreadable.append):
        real = os.path.realpath(folder)
        if real in visited:
            children.clear()
            continue
        visited.add(real)
        children[:] = sorted(child for child in children if not child.startswith("."))
        names = [name for name in names if not name.startswith(".")]
        found += [Path(folder, name) for name in names]
        found += [Path(folder, child) for child in children if child.lower().endswith((".nii", ".nii.gz"))]
        if Path(folder) != root and holds_dicom(folder, names):
            found.append(Path(folder))
    return sorted(found)


def _studies_like_contrasts(paths: Sequence[Path]) -> dict[Path, set[str]]:
    """Studies whose names end as a contrast does, such as ``Trial_T2``, by folder.

    They are named as the folder is, or before several contrasts in it. What a volume is named is none: ``X_T1_seg`` is
    derived from ``X_T1``.
    """
    stems: dict[Path, set[str]] = defaultdict(set)
    for path in paths:
        stems[path.parent].add(volume_stem(path) or "")
    found = {}
    for folder, names in stems.items():
        contrasts: dict[str, set[str]] = defaultdict(set)
        for name in names:
            study, ending = re.split(r"(?=[_.\- ][^_.\- ]*$)", f"_{name}", maxsplit=1)
            contrasts[study[1:]].update(k for k, e, _ in _BUILT_IN if k != MASK_KEY and e.match(ending[1:]))
        several = {study for study, keys in contrasts.items() if len(keys) > 1}
        found[folder] = {
            study
            for study in {folder.name, *several} - names
            if not _BIDS.match(study) and any((match := e.match(study)) and match["prefix"] for _, e, _ in _BUILT_IN)
        }
    return found


def _match_built_in(path: Path, studies: Collection[str] = ()) -> _Match | None:
    """What the name of a file says; ``studies`` are of ``_studies_like_contrasts``."""
    stem = volume_stem(path)
    if stem is None:
        return None
    for study in studies:
        if re.match(rf"{re.escape(study)}[_.\- ]", stem):
            match = _match_stem(stem[len(study) + 1 :])
            if match is not None:
                return match._replace(prefix="_".join(filter(None, (study, match.prefix))))
    return _match_stem(stem)


def _match_stem(stem: str) -> _Match | None:
    for key, expression, precedence in _BUILT_IN:
        match = expression.match(stem)
        if match is None:
            continue
        prefix = match["prefix"] or ""
        # "X_T1pre_seg" and "X_seg_t1post" are derived from another file of X, but "sub-01_space-T1w_dseg" is BIDS
        bids = _BIDS.match(prefix)
        if bids and all("-" in entity for entity in prefix.split("_")):
            prefix = "_".join(entity for entity in bids.groups() if entity)
        elif any(other.match(prefix) for _, other, _ in _BUILT_IN):
            return None
        if key == MASK_KEY and _UCSF_BMSR.match(prefix) and match["ending"].lower() == "seg":
            return None
        synthesized = "synth" in match["ending"].lower() or "desc-synth" in (match["prefix"] or "").lower()
        # an acquired series comes before a synthesized one
        return _Match(key, prefix, precedence + synthesized, synthesized)
    return None


def _compile_globs(pattern: Mapping[str, str]) -> list[tuple[str, re.Pattern[str]]]:
    """Expressions from globs, the part matched by the first ``*`` as group ``prefix``."""
    if not isinstance(pattern, Mapping) or not all(isinstance(glob, str) for glob in pattern.values()):
        raise StudyError(f"The pattern must give a file name glob for each contrast by its key, got {pattern!r}.")
    unknown = set(pattern) - {*CONTRAST_KEYS, MASK_KEY}
    if unknown or not set(pattern) & set(CONTRAST_KEYS):
        raise StudyError(
            f"The pattern has the keys {', '.join(map(str, pattern)) or '(none)'}: give a file name glob for some of "
            f"{', '.join((*CONTRAST_KEYS, MASK_KEY))}."
        )
    globs = []
    for key, glob in pattern.items():
        expression = re.escape(glob).replace(r"\*", "(?P<prefix>.*?)", 1).replace(r"\*", ".*").replace(r"\?", ".")
        globs.append((key, re.compile(f"^{expression}$", re.IGNORECASE)))
    return globs


def _match_globs(name: str, globs: list[tuple[str, re.Pattern[str]]]) -> _Match | None:
    for key, expression in globs:
        match = expression.match(name)
        if match is not None:
            prefix = (match.groupdict().get("prefix") or "").rstrip("_-. ")
            return _Match(key, prefix, 0, "synth" in name.lower())
    return None


def _adopt_masks(groups: dict[tuple[str, str], list[tuple[Path, _Match]]], prefixes: dict[str, set[str]]) -> None:
    """Give a mask with a name of its own to the one study of its folder, if that has no mask.

    BraTS 2020 has such a mask: W39_1998.09.19_Segm.nii in the folder BraTS20_Training_355.
    """
    for folder, names in prefixes.items():
        for prefix in sorted(names) if len(names) == 2 else ():
            (other,) = names - {prefix}
            key = ("" if _is_identity(prefix) else folder, prefix)
            other_key = ("" if _is_identity(other) else folder, other)
            named_as_folder = other == Path(folder).name or not _is_identity(other)
            only_mask = len(groups[key]) == 1 and groups[key][0][1].key == MASK_KEY
            has_mask = any(match.key == MASK_KEY for _, match in groups[other_key])
            if named_as_folder and only_mask and not has_mask:
                groups[other_key] += groups.pop(key)
                names.discard(prefix)
                break


def _is_identity(prefix: str) -> bool:
    """Whether a prefix names a study in a whole data set, as ``BraTS20_Training_001`` does and ``brain`` does not."""
    return any(character.isdigit() for character in prefix) or _BIDS.match(prefix) is not None


def _item(
    study: str, files: Sequence[tuple[Path, _Match]], root: Path, patient_expression: re.Pattern[str] | None
) -> dict[str, Any]:
    """Datalist item of one group of files."""
    chosen: dict[str, tuple[Path, _Match]] = {}
    failure = None
    for key in (*CONTRAST_KEYS, MASK_KEY):
        candidates = sorted((f for f in files if f[1].key == key), key=lambda f: f[1].precedence)
        if len(candidates) > 1 and candidates[0][1].precedence == candidates[1][1].precedence:
            failure = (
                f"Study {study} has two files for {key}, {candidates[0][0]} and {candidates[1][0]}: remove or rename "
                "one of them, or give your own file names as file_pattern."
            )
        if candidates:
            chosen[key] = candidates[0]
    item: dict[str, Any] = {"study": study, "patient": patient_of(study)}
    item.update({key: str(path) for key, (path, _) in chosen.items()})
    synthesized = [key for key, (_, match) in chosen.items() if match.synthesized and key != MASK_KEY]
    if synthesized:
        item["synthesized"] = synthesized
    if failure:
        item[FAILURE_KEY] = failure
    if patient_expression is not None:
        folder = Path(_any_path(item)).parent.relative_to(root).as_posix()
        match = patient_expression.search(f"{folder}/{study}")
        if match is None or not match.groups() or not match[1]:
            raise StudyError(
                f"The patient_pattern {patient_expression.pattern} finds no patient in {folder}/{study}: give an "
                "expression whose first group is the patient."
            )
        item["patient"] = match[1]
    return item


def _any_path(item: Mapping[str, Any]) -> str:
    return next((item[key] for key in (*CONTRAST_KEYS, MASK_KEY) if key in item), item["study"])


def _common_name(paths: Sequence[Path]) -> str:
    """What the names of loose files have in common, without the contrast; the folder's name if that is nothing."""
    known = _studies_like_contrasts(paths)
    matches = [_match_built_in(path, known[path.parent]) for path in paths]
    prefixes = {match.prefix if match else None for match in matches}
    if len(prefixes) == 1 and None not in prefixes:
        common = prefixes.pop()
    else:
        stems = [volume_stem(path) or path.stem for path in paths]
        equal = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*stems, strict=False))
        common = "".join(characters[0] for characters in equal).rstrip("_-. ")
    return common or paths[0].resolve().parent.name or "study"


def _part_sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers of patients: the largest remainders, and one for each wanted part where there are enough."""
    if len(fractions) != len(PARTS) or min(fractions) < 0 or sum(fractions) <= 0:
        raise ValueError(f"fractions must be {len(PARTS)} numbers >= 0 with a positive sum, got {list(fractions)}.")
    exact = [fraction / sum(fractions) * count for fraction in fractions]
    sizes = [int(share) for share in exact]
    for index in sorted(range(len(PARTS)), key=lambda i: sizes[i] - exact[i])[: count - sum(sizes)]:
        sizes[index] += 1
    if count >= len(PARTS):
        for index, fraction in enumerate(fractions):
            if fraction > 0 and sizes[index] == 0:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[index] = 1
    return sizes


def _parts(
    items: Sequence[Mapping[str, Any]], key: str, names: Mapping[str, Collection[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Items of each part, sorted by study; ``names`` gives the studies or patients (``key``) of each."""
    part_of = {name: part for part, chosen in names.items() for name in chosen}
    ordered = sorted(map(dict, items), key=lambda item: item["study"])
    return {part: [item for item in ordered if part_of.get(item[key]) == part] for part in PARTS}


def _read_split(items: Sequence[Mapping[str, Any]], path: Path) -> dict[str, list[str]]:
    """Studies of each part of a split file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"The split file {path} cannot be read as JSON ({error}): correct or rewrite it.") from error
    if (
        not isinstance(content, dict)
        or not content
        or set(content) - set(PARTS)
        or not all(isinstance(names, list) for names in content.values())
    ):
        raise StudyError(
            f"The split file {path} must hold an object with lists of names for {', '.join(PARTS)}: correct its keys."
        )
    known = {name for item in items for name in (item["study"], item["patient"])}
    studies: dict[str, list[str]] = {part: [] for part in PARTS}
    part_of: dict[str, str] = {}
    for part, names in content.items():
        wanted = set(map(str, names))
        if unknown := sorted(wanted - known):
            raise StudyError(
                f"The split file {path} names {unknown[0]}, which is no study and no patient of the data set: correct "
                "the name or remove it."
            )
        for item in items:
            if wanted.isdisjoint((item["study"], item["patient"])):
                continue
            patient = item["patient"]
            if part_of.setdefault(patient, part) != part:
                raise StudyError(
                    f"The split file {path} has patient {patient} in {part_of[patient]} and in {part}: keep all "
                    "studies of a patient in one part."
                )
            studies[part].append(item["study"])
    named = set().union(*studies.values())
    left_out = sorted(item["study"] for item in items if item["study"] not in named)
    if left_out:
        logger.warning("%d studies are in no part of %s and left out, %s first.", len(left_out), path, left_out[0])
    return studies
