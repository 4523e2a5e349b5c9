# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Slices for training: a cache on disk, the choice of slices, the dataset, and the sampler of an epoch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler
from tqdm import tqdm

from ..contrasts import CONTRAST_KEYS, MASK_KEY, StudyError, find_study_error
from .randomness import stable_hash

#: Part of every cache key: raise it when the code of the transforms changes what they do.
CACHE_FORMAT = 1
#: Age in seconds from which an incomplete entry is taken for one that a killed process left.
_ABANDONED = 3600

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedStudy:
    """One study in the cache."""

    study: str  #: name of the study.
    patient: str  #: name of the patient.
    #: holds ``image.npy`` (slices x 4 x H x W float16 from -1, above 1 where the scaling does not clip), ``label.npy``
    #: (slices x H x W uint8) and ``info.json``.
    directory: Path
    #: content of ``info.json``: for each slice ``z`` (index in the volume), ``tumor_area`` (pixels) and
    #: ``brain_fraction`` (0 to 1); ``has_contrast``, ``has_mask``, ``size`` ([H, W]), ``intensity_scale`` where the
    #: transform gives it, and ``files`` and ``transform`` to trace the entry.
    info: Mapping[str, Any]


@dataclass(frozen=True)
class PreparedSlices:
    """Result of ``prepare_slices``."""

    studies: list[CachedStudy]  #: the usable studies, in the order of the items.
    #: ``{"study": ..., "reason": ...}`` for each of the others.
    failures: list[dict[str, str]] = field(default_factory=list)


def prepare_slices(
    items: Sequence[Mapping[str, Any]],
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    cache_dir: str | os.PathLike[str],
    num_workers: int = 0,
) -> PreparedSlices:
    """Run the preprocessing once for each study and keep every slice with brain on disk.

    An entry is keyed by the paths, sizes and times of the study's files and by the parameters of ``transform``, so a
    changed file or parameter makes a new entry and an unchanged one is used again, also by other choices of slices.
    An entry appears complete or not at all. Processes of a distributed run share the work without waiting for each
    other: each starts at another study and skips what it finds.

    Args:
        items: datalist items (``find_studies``).
        transform: deterministic transform that gives ``image``, ``label``, ``brain``, ``has_contrast`` and
            ``has_mask`` (``study_transforms``).
        cache_dir: folder of the cache; a BraTS study takes about 45 MB.
        num_workers: threads; each holds one study in memory (about 0.5 GB for BraTS). 0 works in the calling thread.

    Returns:
        The studies in the cache, and those that could not be used with one sentence each, which is also logged.

    Raises:
        StudyError: when no study can be used.
    """
    cache = Path(cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".incomplete-*"):
        with contextlib.suppress(FileNotFoundError):  # of another process that clears them
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    description = json.loads(json.dumps(transform, default=_describe))

    def prepare(item: Mapping[str, Any]) -> CachedStudy | str:
        try:
            return _prepare_study(item, transform, description, cache)
        except Exception as error:
            reason = find_study_error(error)
            if reason is None:
                raise
            return str(reason)

    rank = idist.get_rank()
    start = len(items) * rank // idist.get_world_size()
    turned = [*items[start:], *items[:start]]
    with ThreadPoolExecutor(max(1, num_workers)) as executor:
        made = (executor.map if num_workers else map)(prepare, turned)
        results = list(tqdm(made, "preparing slices", len(turned), unit="study", disable=rank > 0))
    results = results[len(items) - start :] + results[: len(items) - start]

    prepared = PreparedSlices([result for result in results if isinstance(result, CachedStudy)])
    for item, result in zip(items, results, strict=True):
        if isinstance(result, str):
            _add_failure(prepared.failures, item["study"], result)
    if not prepared.studies:
        first = f"; the first: {prepared.failures[0]['reason']}" if prepared.failures else " because none was given."
        raise StudyError(f"None of {len(items)} studies can be used{first}")
    return prepared


def _describe(value: Any) -> Any:
    """What JSON knows for a parameter of a transform, the same in every process; of functions only the name."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, torch.dtype | np.dtype):
        return str(value)
    if isinstance(value, type) or not hasattr(value, "__dict__") or hasattr(value, "__code__"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    # MONAI keeps whether to trace in a thread-local that appears with the first call and is no parameter
    parameters = {name: item for name, item in vars(value).items() if not isinstance(item, threading.local)}
    return {"class": type(value).__qualname__, **parameters}


def select_slices(
    info: Mapping[str, Any], choice: str | Sequence[int] = "brain", count: int = 20, min_brain: float = 0.02
) -> list[int]:
    """Slices of one study to train with.

    Args:
        info: ``CachedStudy.info``.
        choice: ``"largest_tumor"``: the ``count`` slices with the largest tumor area, the larger brain
            first where this is equal, as it is without a mask; ``"tumor"``: all with tumor; ``"brain"``: all with more
            brain than ``min_brain``; or numbers of slices in the volume, as the published loader takes 70 to 79.
        count: number of slices of ``"largest_tumor"``.
        min_brain: share of brain in a slice, 0 to 1.

    Returns:
        Positions in the cached arrays, ascending; the slice's index in the volume is ``info["z"][position]``.

    Raises:
        ValueError: when ``choice`` is unknown.
    """
    area = np.asarray(info["tumor_area"])
    brain = np.asarray(info["brain_fraction"])
    if choice == "largest_tumor":
        rows = np.sort(np.lexsort((brain, area))[::-1][:count])
    elif choice == "tumor":
        rows = np.flatnonzero(area > 0)
    elif choice == "brain":
        rows = np.flatnonzero(brain > min_brain)
    elif isinstance(choice, Sequence) and all(isinstance(number, int) for number in choice):
        rows = np.flatnonzero(np.isin(info["z"], choice))
    else:
        raise ValueError(
            f"slice_choice must be one of largest_tumor, tumor, brain or a list of slice numbers, got {choice!r}."
        )
    return rows.tolist()


class SliceDataset(Dataset):
    """Axial slices of prepared studies, read from the cache when asked for; nothing of them is held in memory.

    An item is a dictionary of tensors: ``target`` (4 x H x W float32 in [-1, 1], -1 for missing contrasts), ``label``
    (1 x H x W uint8, 0 background, k + 1 for ``TUMOR_CLASSES[k]``), ``has_contrast`` (4 bool), ``has_mask`` (bool),
    and the int64 scalars ``patient`` and ``slice_id`` (stable hashes of the patient and of ``<study>/<z>``),
    ``study_index`` (into ``studies``) and ``z`` (slice index in the preprocessed volume).

    Attributes: ``studies`` (names), ``failures`` (those of ``prepared``, and studies without a chosen slice or of
    another slice size), ``index`` (slices x 2 int64: study index, z), ``weights`` (float64, one for each slice: how
    often it is drawn relative to others), ``slice_ids`` and ``patients`` (int64, one for each slice: its hashes).

    Args:
        prepared: result of ``prepare_slices``.
        choice, count, min_brain: see ``select_slices``.
        tumor_weight: weight of a slice with tumor under the choice ``"brain"``, where others have 1.
        unclipped: items also have ``unclipped``, the contrasts as they were cached.
        size: of the slices in x and y; studies whose brain is wider fail. None takes the size of most studies.

    Raises:
        ValueError: when ``choice`` is unknown.
        StudyError: when no slice is left.
    """

    def __init__(
        self,
        prepared: PreparedSlices,
        choice: str | Sequence[int] = "brain",
        count: int = 20,
        min_brain: float = 0.02,
        tumor_weight: float = 3.0,
        unclipped: bool = False,
        size: Sequence[int] | None = None,
    ) -> None:
        self.unclipped = unclipped
        self.failures = list(prepared.failures)
        sizes = Counter(tuple(study.info["size"]) for study in prepared.studies)
        common = tuple(size or max(sizes, key=lambda size: sizes[size], default=(0, 0)))
        largest = max(map(max, sizes), default=0)
        self._cached: list[CachedStudy] = []
        rows: list[tuple[int, int, int]] = []
        weights: list[float] = []
        for study in prepared.studies:
            chosen = select_slices(study.info, choice, count, min_brain)
            own = tuple(study.info["size"])
            if own != common:
                reason = (
                    f"Study {study.study} has slices of {own[0]} x {own[1]}, not {common[0]} x {common[1]}, since its "
                    f"brain is wider: raise image_size to {largest}."
                )
                _add_failure(self.failures, study.study, reason)
            elif not chosen:
                reason = (
                    f"Study {study.study} has no slice for the choice {choice!r}: choose otherwise or leave it out."
                )
                _add_failure(self.failures, study.study, reason)
            else:
                area = study.info["tumor_area"]
                rows += [(len(self._cached), study.info["z"][row], row) for row in chosen]
                weights += [tumor_weight if choice == "brain" and area[row] > 0 else 1.0 for row in chosen]
                self._cached.append(study)
        if not rows:
            first = f" {self.failures[0]['reason']}" if self.failures else ""
            raise StudyError(f"No slice is left of {len(prepared.studies)} studies for the choice {choice!r}.{first}")
        self.studies = [study.study for study in self._cached]
        table = torch.tensor(rows, dtype=torch.int64)
        self.index = table[:, :2].clone()
        self._rows = table[:, 2].clone()
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.slice_ids = torch.tensor([stable_hash(f"{self.studies[k]}/{z}") for k, z in self.index.tolist()])
        patients = torch.tensor([stable_hash(study.patient) for study in self._cached])
        self.patients = patients[self.index[:, 0]]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        study_index, z = self.index[position].tolist()
        row = int(self._rows[position])
        study = self._cached[study_index]
        # mapped anew for each slice: hundreds of studies kept open would exhaust the file descriptors of a process
        image = np.load(study.directory / "image.npy", mmap_mode="r")[row]
        label = np.load(study.directory / "label.npy", mmap_mode="r")[row]
        cached = torch.from_numpy(np.array(image)).float()  # six times as fast as numpy's conversion
        return {
            "target": cached.clamp(max=1),
            **({"unclipped": cached} if self.unclipped else {}),
            "label": torch.from_numpy(np.array(label)[None]),
            "has_contrast": torch.tensor(study.info["has_contrast"]),
            "has_mask": torch.tensor(study.info["has_mask"]),
            "patient": self.patients[position].clone(),
            "slice_id": self.slice_ids[position].clone(),
            "study_index": torch.tensor(study_index),
            "z": torch.tensor(z),
        }


class EpochSampler(DistributedSampler):
    """Order of an epoch as a function of seed and epoch alone, split equally over the processes.

    It is a ``DistributedSampler`` in a single process too, because MONAI's engines call ``set_epoch`` of such a sampler
    themselves; so an interrupted run goes on with the order that it would have had.

    Args:
        dataset: what to draw from; its length counts.
        num_samples: draws in an epoch over all processes, rounded up to a multiple of their number. ``None`` is the
            length of the dataset.
        weights: draw weight of each item, for drawing with replacement. ``None`` or equal weights draw without
            replacement: permutations, one after the other until there are enough.
        seed: seed of the run.
        num_replicas, rank: number of processes, and of this one; ``None`` asks ``torch.distributed``.

    Raises:
        ValueError: when ``weights`` has another length than ``dataset`` or ``num_samples`` is not positive.
    """

    def __init__(
        self,
        dataset: Any,
        num_samples: int | None = None,
        weights: torch.Tensor | Sequence[float] | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        num_replicas = idist.get_world_size() if num_replicas is None else num_replicas
        rank = idist.get_rank() if rank is None else rank
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.length = len(dataset)
        draws = self.length if num_samples is None else num_samples
        if draws <= 0:
            raise ValueError(f"num_samples must be positive, got {draws}.")
        self.num_samples = -(-draws // num_replicas)
        self.total_size = self.num_samples * num_replicas
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if self.weights is not None and len(self.weights) != self.length:
            raise ValueError(f"weights has {len(self.weights)} values for {self.length} items.")
        if self.weights is not None and bool((self.weights == self.weights[0]).all()):
            self.weights = None

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/{self.epoch}/order"))
        if self.weights is None:
            passes = -(-self.total_size // self.length)
            order = torch.cat([torch.randperm(self.length, generator=generator) for _ in range(passes)])
        else:
            order = torch.multinomial(self.weights, self.total_size, replacement=True, generator=generator)
        return iter(order[: self.total_size][self.rank :: self.num_replicas].tolist())


def _prepare_study(
    item: Mapping[str, Any], transform: Callable[[Mapping[str, Any]], Mapping[str, Any]], description: Any, cache: Path
) -> CachedStudy:
    """The cache entry of one study, made if it does not exist."""
    study, patient = str(item["study"]), str(item["patient"])
    files = {}
    for key in (*CONTRAST_KEYS, MASK_KEY):
        if item.get(key):
            path = Path(item[key])
            if not path.exists():
                raise StudyError(f"{path} does not exist: correct the path or leave this file out.")
            files[key] = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    key = json.dumps([CACHE_FORMAT, study, patient, files, description], sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    directory = cache / f"{re.sub(r'[^A-Za-z0-9._-]', '_', study)}-{digest}"
    info = None
    if directory.exists():
        info = _read_entry(directory)
        if info is None:
            logger.warning("%s is damaged and made anew.", directory)
            shutil.rmtree(directory)
    if info is None:
        arrays, info = _slices(transform(item))
        info = {"study": study, "patient": patient, **info, "files": files, "transform": description}
        temporary = cache / f".incomplete-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            info["bytes"] = {path.name: path.stat().st_size for path in temporary.iterdir()}
            (temporary / "info.json").write_text(json.dumps(info))
            os.rename(temporary, directory)
        except OSError:
            # another process may have made the same entry meanwhile
            if not directory.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return CachedStudy(study, patient, directory, info)


def _read_entry(directory: Path) -> dict[str, Any] | None:
    """Facts of a cache entry; ``None`` if its files are not as they were written.

    Sizes and headers are looked at: to read all arrays would take minutes at each start.
    """
    try:
        info = json.loads((directory / "info.json").read_text())
        for name, size in info["bytes"].items():
            if (directory / name).stat().st_size != size:
                return None
            np.load(directory / name, mmap_mode="r")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return info


def _slices(data: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of all slices with brain."""
    brain_fraction = data["brain"][0].as_tensor().float().mean(dim=(0, 1))
    kept = torch.nonzero(brain_fraction > 0).flatten()
    image = data["image"].as_tensor().movedim(-1, 0)[kept].half()
    label = data["label"][0].as_tensor().movedim(-1, 0)[kept]
    info = {
        "z": kept.tolist(),
        "tumor_area": (label > 0).sum(dim=(1, 2)).tolist(),
        "brain_fraction": [round(value, 6) for value in brain_fraction[kept].tolist()],
        "has_contrast": data["has_contrast"].tolist(),
        "has_mask": bool(data["has_mask"]),
        "size": list(image.shape[2:]),
    }
    if "intensity_scale" in data:
        info["intensity_scale"] = data["intensity_scale"].tolist()
    return {"image": image.contiguous().numpy(), "label": label.contiguous().numpy()}, info


def _add_failure(failures: list[dict[str, str]], study: str, reason: str) -> None:
    logger.warning(reason)
    failures.append({"study": study, "reason": reason})
