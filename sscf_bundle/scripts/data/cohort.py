# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The cohort of a run: studies found, split by patient and prepared in the slice cache, as configs use it."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from ..contrasts import StudyError
from .datalist import find_studies, split_patients, write_split, write_whole
from .slices import PreparedSlices, SliceDataset, prepare_slices

logger = logging.getLogger(__name__)


class Cohort:
    """Finds, splits and prepares the studies of a run, and remembers those that could not be used.

    Args:
        dataset_dir: folder with the studies, see ``find_studies``.
        transform: preprocessing of one study, see ``study_transforms``.
        cache_dir: folder of the slice cache.
        output_dir: a run that has begun to train or is complete leaves ``split.json`` here, and, if studies failed,
            ``failures.json``.
        fractions: shares of training, validation and test patients.
        seed: of the split.
        split_file: a split to use instead. Where it is None and ``output_dir`` holds a split of an earlier start of
            this run, that one is used, so that a resumed run never moves a patient.
        pattern, patient_pattern: see ``find_studies``.
        num_workers: threads for preparing.
        image_size: of slices, x and y; None takes the size of most studies of a part.
    """

    def __init__(
        self,
        dataset_dir: str,
        transform: Callable,
        cache_dir: str,
        output_dir: str,
        fractions: Sequence[float] = (0.7, 0.1, 0.2),
        seed: int = 0,
        split_file: str | None = None,
        pattern: Mapping[str, str] | None = None,
        patient_pattern: str | None = None,
        num_workers: int = 0,
        image_size: int | None = None,
    ) -> None:
        self.size = None if image_size is None else (image_size, image_size)
        self.transform, self.cache_dir, self.num_workers = transform, cache_dir, num_workers
        self.output_dir = Path(output_dir)
        self.failures: list[dict[str, str]] = []
        self._prepared: dict[str, PreparedSlices] = {}
        self._origin = ""
        earlier = self.output_dir / "split.json"
        if split_file is None and earlier.is_file():
            split_file = str(earlier)
        if split_file is not None:
            self._origin = f" in {split_file}"
        items = find_studies(dataset_dir, pattern, patient_pattern)
        self.parts = split_patients(items, fractions, seed, split_file)
        if split_file == str(earlier):
            same = self.parts == split_patients(items, fractions, seed)
            told = "using the split of %s" + ("" if same else ", which split_fractions and seed do not move")
            logger.log(logging.INFO if same else logging.WARNING, told, earlier)
        sizes = ", ".join(f"{len(studies)} {part}" for part, studies in self.parts.items())
        logger.info(f"{len(items)} studies in {dataset_dir}: {sizes}")

    def keep_split(self) -> None:
        """Writes the split as that of the training in ``output_dir``, in the place of one that is there."""
        if idist.get_rank() == 0:
            write_split(self.parts, self.output_dir / "split.json")

    def attach(self, engine: Engine) -> None:
        """Keeps the split of a training once it has started. Attach it after what may refuse to go on."""
        engine.add_event_handler(Events.STARTED, self.keep_split)

    def slices(self, part: str, **options: Any) -> SliceDataset:
        """Slices of one part of the split, with the ``options`` of ``SliceDataset``.

        Raises:
            StudyError: if the part has no usable study.
        """
        if not self.parts[part]:
            other = "another split_file" if self._origin else "more studies, other split_fractions or a split_file"
            needs = ", or leave nearest_contrast out of reference_methods" if part == "training" else ""
            raise StudyError(f"The {part} part of the split{self._origin} has no study: give {other}{needs}.")
        if part not in self._prepared:
            self._prepared[part] = prepare_slices(self.parts[part], self.transform, self.cache_dir, self.num_workers)
        dataset = SliceDataset(self._prepared[part], size=self.size, **options)
        self.failures += [failure for failure in dataset.failures if failure not in self.failures]
        return dataset

    def split_hash(self) -> str:
        """SHA-256 of who is in which part; equal for the same studies, wherever their files lie."""
        names = {part: sorted(item["study"] for item in items) for part, items in self.parts.items()}
        return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()

    def finish(self) -> None:
        """Ends a run: a study that could not be used shows in the exit status and in ``failures.json``.

        Raises:
            StudyError: if a study failed.
        """
        if not (self.output_dir / "split.json").is_file():
            self.keep_split()
        report = self.output_dir / "failures.json"
        # in an evaluation each process has its own share of the studies
        shares: Any = idist.all_gather(self.failures) if idist.get_world_size() > 1 else [self.failures]
        together = [failure for share in shares for failure in share]
        failures = [failure for k, failure in enumerate(together) if failure not in together[:k]]
        if idist.get_rank() == 0:
            if failures:
                write_whole(report, failures)
            else:
                report.unlink(missing_ok=True)
        if not failures:
            return
        total = sum(len(studies) for studies in self.parts.values())
        raise StudyError(
            f"The run is complete, but {len(failures)} of {total} studies could not be used: {report} says why."
        )


def cohort_slices(data: Cohort, part: str, **options: Any) -> SliceDataset:
    """``data.slices(part, **options)``, in the form that a config's ``dataset`` with its ``data`` takes."""
    return data.slices(part, **options)


def intensity_statistics(data: Cohort) -> dict[str, Any] | None:
    """How the intensities of the contrasts of the training part are related, for ``intensities`` of inference.

    Returns:
        ``log_ratios``: row b, column a: median over the studies of ln(scale of b / scale of a), where the scale is the
        percentile of ``ScaleBraind``; ``spread``: 1.48 times the median distance from that; ``studies``: how many.
        ``None`` stands where no study has both. ``None`` instead of all where the scaling knows no scale of a study.
    """
    data.slices("training")
    infos = [study.info for study in data._prepared["training"].studies]
    if not all("intensity_scale" in info for info in infos):
        return None
    scales = np.array([info["intensity_scale"] for info in infos])
    logs = np.log(np.where(scales > 0, scales, np.nan))
    differences = logs[:, :, None] - logs[:, None, :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no study with both gives NaN
        ratios = np.nanmedian(differences, axis=0)
        spread = 1.4826 * np.nanmedian(np.abs(differences - ratios), axis=0)
    plain = [[[None if np.isnan(v) else round(float(v), 4) for v in row] for row in m] for m in (ratios, spread)]
    return {"log_ratios": plain[0], "spread": plain[1], "studies": len(infos)}
