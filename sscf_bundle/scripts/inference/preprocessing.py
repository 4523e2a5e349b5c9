# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""From folders and files to the network's input, a study that cannot be used included."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import Dataset
from monai.transforms import MapTransform

from ..contrasts import CONTRAST_KEYS, FAILURE_KEY, MASK_KEY, StudyError, find_study_error
from ..data.datalist import find_studies, read_datalist, single_study
from ..data.transforms import AddAvailabilityd, BrainMaskd, LoadStudyd, StudyCompose, study_transforms
from .checks import CheckStudyd

#: Key of the union of the available brains on the grid on file.
FILE_BRAIN_KEY = "brain_on_file"

logger = logging.getLogger(__name__)


class FindStudyd(MapTransform):
    """Let ``image`` name a study where no contrast is named: its folder, or any one of its files.

    This is how MONAI Label names what it wants to be inferred. Items with a path of a contrast stay as they are.

    Raises:
        StudyError: from the call, when the path leads to no study or to several.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if any(d.get(key) for key in CONTRAST_KEYS):
            return d
        for key in self.key_iterator(d):
            path = Path(d[key])
            items = find_studies(path if path.is_dir() else path.parent)
            if not path.is_dir():
                items = [item for item in items if str(path) in item.values()]
            if len(items) != 1:
                raise StudyError(
                    f"{path} leads to {len(items)} studies: name the folder or a file of one study, or the files as "
                    f"{', '.join(CONTRAST_KEYS)}."
                )
            d.update({k: v for k, v in items[0].items() if k in (*CONTRAST_KEYS, "study", "patient")})
        return d


class KeepAcquiredd(MapTransform):
    """Add ``"acquired"``, the contrasts on file (4 x X x Y x Z, >= 0) in 8 bits, for a panel long after reading."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            kept = torch.zeros(d[key].shape, dtype=torch.uint8)
            for volume, small, given in zip(d[key].as_tensor(), kept, d["has_contrast"], strict=True):
                if given:
                    few = volume[::3, ::3, ::3]
                    few = few[few > 0] if few.any() else volume[volume > 0]
                    top = float(np.percentile(few, 99.5))
                    small.copy_(volume.clamp(max=top).mul_(255 / top))
            d["acquired"] = kept
        return d


def inference_transforms(
    keep_acquired: bool = False, checks: bool = False, rejecting_checks: Sequence[str] = (), **options: Any
) -> StudyCompose:
    """The preprocessing of inference: that of training, and what only inference needs.

    Args:
        keep_acquired: add ``"acquired"``, the contrasts on file for the panel, see ``KeepAcquiredd``.
        checks: add ``"checks"``, see ``CheckStudyd``.
        rejecting_checks: codes of findings that refuse a study.
        options: of ``study_transforms``; all but ``resample`` and ``register`` must be those of the training.

    Returns:
        An invertible composition of transforms for one datalist item. Afterwards ``image`` is the network's
        8 x X x Y x Z input and ``brain_on_file`` (1 x X x Y x Z uint8) the union of the available brains on the grid
        on file.
    """
    steps, registered = [], options.get("register") is not None
    for step in study_transforms(**options).transforms:
        steps.append(step)
        if isinstance(step, LoadStudyd):
            # the mask is taken before resampling, so that no written voxel outside the brain is other than 0
            steps += [BrainMaskd("image", FILE_BRAIN_KEY)]
            steps += [KeepAcquiredd("image")] if keep_acquired else []
            steps += [CheckStudyd("image", rejecting_checks, registered=registered)] if checks else []
    return StudyCompose([FindStudyd("image"), *steps, AddAvailabilityd("image")])


class StudyDataset(Dataset):
    """``monai.data.Dataset`` of studies that gives a failed study as data, so that the others still come.

    An item that cannot be preprocessed has its datalist entries and ``"failure"``, one sentence.
    """

    def _transform(self, index: int) -> dict[Hashable, Any]:
        try:
            return super()._transform(index)
        except Exception as error:
            item = dict(self.data[index])
            return {**item, FAILURE_KEY: failure_reason(error, item["study"])}


def list_studies(
    dataset_dir: str | os.PathLike[str] | None = None,
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    study: str | None = None,
    pattern: Mapping[str, str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    datalist_file: str | os.PathLike[str] | None = None,
    shard: str | None = None,
) -> list[dict[str, Any]]:
    """Datalist for inference: one study from loose files, those of a list, or all below a folder. Masks are left out.

    Args:
        dataset_dir, pattern: see ``find_studies``.
        flair, t1, t1ce, t2: paths of the volumes of a single study.
        study: name of the single study.
        output_dir: where results go; must not lie in ``dataset_dir``.
        datalist_file: see ``read_datalist``.
        shard: ``"2/4"`` takes the second of every four studies, for four machines.

    Raises:
        StudyError: when there is no study or input of several kinds, ``output_dir`` lies in ``dataset_dir``, or
            ``shard`` is no part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", "1/1" if shard is None else str(shard))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise StudyError(f'shard must be a part such as "1/4", got {shard!r}.')
    files = {key: path for key, path in zip(CONTRAST_KEYS, (flair, t1, t1ce, t2), strict=True) if path}
    if bool(files) + bool(dataset_dir) + bool(datalist_file) > 1:
        raise StudyError("Give dataset_dir, or datalist_file, or the files of one study: more than one is given.")
    if files:
        if match[2] != "1":
            raise StudyError("shard is a part of many studies, but the files of one are given: leave it out.")
        return single_study(**files, name=None if study is None else str(study))
    if not dataset_dir and not datalist_file:
        raise StudyError(
            "No input is given: set dataset_dir or datalist_file, or the files of one study as "
            f"{', '.join(CONTRAST_KEYS)}."
        )
    if study is not None:
        raise StudyError("study names the study of flair, t1, t1ce and t2, of which none is given: leave it out.")
    root = Path(str(dataset_dir)).expanduser()
    if datalist_file:
        items = read_datalist(datalist_file)
    else:
        items = find_studies(root, pattern)
        real, results = root.resolve(), Path(str(output_dir)).expanduser().resolve()
        folders = {Path(item[key]).parent for item in items for key in CONTRAST_KEYS if key in item}
        # a link may lead there too
        linked = not real.is_relative_to(results) and any(one.resolve().is_relative_to(results) for one in folders)
        if output_dir is not None and (linked or results.is_relative_to(real)):
            raise StudyError(
                f"output_dir {output_dir} lies in dataset_dir {root}, where the next run would take synthetic volumes "
                "for input: choose another output_dir."
            )
    # a mask on file is not needed, and a damaged one must not stop a study
    return [{k: v for k, v in item.items() if k != MASK_KEY} for item in items[int(match[1]) - 1 :: int(match[2])]]


def failure_reason(error: BaseException, study: Hashable) -> str:
    """One sentence for a failure; the traceback of one that nobody foresaw goes to the log."""
    known = find_study_error(error)
    if known is not None:
        return str(known)
    logger.error("Study %s raised an unexpected error.", study, exc_info=error)
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    return f"Unexpected {type(error).__name__}: {line}; the log has the traceback."
