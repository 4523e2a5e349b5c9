# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Scores of studies that inference fills in: whole ones on the grid on file, slices on the network's grid."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events

from ..contrasts import (
    CONTRAST_KEYS,
    CONTRAST_NAMES,
    CONTRASTS,
    MASK_KEY,
    NUM_CONTRASTS,
    REGIONS,
    SCENARIOS,
    SYNTHESIZED,
    TUMOR_CLASSES,
    StudyError,
    class_masks,
    label_map,
    region_masks,
    scenario_name,
)
from ..data.datalist import write_whole
from ..data.transforms import LoadStudyd, ScaleBraind, StudyCompose
from ..inference.evaluator import StudyEvaluator
from ..inference.postprocessing import BRATS_MASK_LABELS
from ..networks.memory_bank import style_spread
from ..networks.weights import find_weights
from .bootstrap import COLUMNS, summarize
from .metrics import fill_background
from .protocols import PerceptualDistance, Protocol, StudyTarget, region_dice, slice_dice

#: Where a value belongs: contrast or region of the mask, method, protocol, region, score.
Key = tuple[str, str, str, str, str]

_PACKAGES = ("monai", "torch", "numpy", "pandas", "scipy", "pytorch-ignite", "lpips")


class StudyScores:
    """Stands in the place of the writer of ``StudyEvaluator`` and scores what that would write.

    A whole study comes as the volumes that are written, and is compared with its files, each contrast divided by the
    99.5th percentile of its brain and clipped to [0, 1]; the target is read once for all scenarios of a study. Slices
    (items with ``slices``) are compared on the network's grid. Every method, ``reference_methods`` included, gets the
    same background: outside the union of the available brains.

    Attributes: ``rows``, one dict for each value with the columns of ``bootstrap.COLUMNS``; ``seconds``, time of
    scoring by study; ``regions``, number of studies with WT, TC and ET; ``failures``, studies that could not be scored;
    ``segmentation``, what the protocols of masks are, for the metadata.

    Args:
        protocols: see ``protocols``.
        reference_methods: functions of contrasts and availability by their names, see ``reference_methods``.
        load: reads a study; by default ``LoadStudyd()``.
        whole: masks are scored on whole studies; else on slices.
        device: where it computes.
    """

    def __init__(
        self,
        protocols: Sequence[Protocol],
        reference_methods: Mapping[str, Callable] | None = None,
        load: LoadStudyd | None = None,
        whole: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.protocols, self.reference_methods = list(protocols), dict(reference_methods or {})
        self.whole, self.device = whole, torch.device(device)
        self._load = load or LoadStudyd()
        self._classes = torch.zeros(256, dtype=torch.uint8)
        for name, value in BRATS_MASK_LABELS.items():
            self._classes[value] = TUMOR_CLASSES.index(name) + 1
        of = "the whole study on the grid on file" if self.whole else "the evaluated slices of a study together"
        self.segmentation = {
            "segmentation": f"Dice of {of}, both empty 1, one empty 0",
            "segmentation_per_slice": "Dice of each evaluated slice that has the region, mean over slices",
        }
        self.prepare()

    def prepare(self) -> None:
        """Starts anew."""
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.regions: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self._current: tuple[str, bool, str | None] | None = None

    def finish(self, failures: Sequence[dict[str, str]], total: int) -> None:
        """Notes each study that failed once, whatever the number of its scenarios."""
        self.failures = [failure for k, failure in enumerate(failures) if failure not in failures[:k]]

    @torch.no_grad()
    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Takes in one study under one scenario and writes nothing; the scenarios of a study follow each other.

        ``data`` is of ``list_scenarios`` with ``pred``: after ``prediction_transforms``, or, where there are ``slices``
        (of ``SliceScenarios``), the prediction for those that are shown, 7 x H x W x Z.
        """
        started = time.perf_counter()
        whole, scenario = "slices" not in data, SCENARIOS[data["scenario"]]
        # resampled volumes have the grid of a contrast that the scenario gives
        current = data["study"], whole, data["grid"] if whole and self._load.resample else None
        if self._current != current:
            self._current = None
            self._start(data, whole)
            self._current = current
        available = torch.tensor(scenario, dtype=torch.bool, device=self.device).expand(len(self._slices), -1)
        known = torch.where(available[..., None, None], self._slices, -1.0)
        methods = {name: fill(known, available)[self._shown] for name, fill in self.reference_methods.items()}
        known, available = known[self._shown], available[self._shown]
        images, classes, pred = {}, None, torch.as_tensor(data["pred"]).to(self.device)
        if whole:  # the volumes as they are written
            images["network"] = torch.zeros_like(self._target)
            for key, volume in zip(data["output_keys"], pred, strict=True):
                if key != MASK_KEY:
                    images["network"][:, CONTRAST_KEYS.index(key)] = volume
                elif data["segmented"]:
                    classes = self._classes.to(self.device)[volume.long()].unsqueeze(1)
        else:
            pred = pred.movedim(-1, 0)
            methods = {"network": pred[:, :NUM_CONTRASTS], **methods}
            classes = label_map(pred[:, NUM_CONTRASTS:]) if pred[:, NUM_CONTRASTS:].any() else None
        for name, values in methods.items():
            images[name] = ((fill_background(values, known, available) + 1) / 2).clamp(0, 1)
        self._append(data, scenario, self.score(scenario, images, classes, whole))
        self.seconds[data["study"]] += time.perf_counter() - started
        return {}

    def score(
        self, scenario: Sequence[int], images: Mapping[str, torch.Tensor], classes: torch.Tensor | None, whole: bool
    ) -> dict[Key, torch.Tensor]:
        """Scores of the missing contrasts of all methods, N x K x spatial in [0, 1], and of the mask of the network.

        ``classes`` is N x 1 x spatial, None without a segmentation branch; ``whole`` says whether it is a whole study.
        """
        protocols = [one for one in self.protocols if one.whole == whole and sum(scenario) in one.available]
        values: dict[Key, torch.Tensor] = {}
        missing = [k for k in range(NUM_CONTRASTS) if self._exists[k] and not scenario[k]]
        for (method, stack), k, protocol in itertools.product(images.items(), missing, protocols):
            for name, scores in protocol.score(k, stack[:, k]).items():
                values |= {(CONTRASTS[k], method, name, *key): value for key, value in scores.items()}
        if classes is not None and self._has_mask:
            kinds = {"segmentation": region_dice} if whole == self.whole else {}
            kinds |= {} if whole else {"segmentation_per_slice": slice_dice}
            for name, measure in kinds.items():
                dice = measure(classes, self._label)
                values |= {(region, "network", name, "whole", "dice"): dice[k] for k, region in enumerate(REGIONS)}
        return values

    def _start(self, data: Mapping[str, Any], whole: bool) -> None:
        """Takes in target and label, N x K x and N x 1 x spatial: N are slices or a volume's first axis."""
        slice_axis = 2
        if whole:
            load = copy.copy(self._load)
            load.resample = load.resample and data["grid"]
            study = StudyCompose([load, ScaleBraind("image")])(data["complete"])
            # slices are axial, whatever the order of the axes on file
            codes = nib.orientations.aff2axcodes(np.asarray(study["image"].affine))
            slice_axis = next(axis for axis, code in enumerate(codes) if code in "SI")
            # the first axis stands in the place of the slices
            volumes = (study[key].as_tensor().transpose(0, 1) for key in ("image", "label"))
            study = {**study, **dict(zip(("target", "label"), volumes, strict=True))}
        else:
            study = data["slices"]
        target, label = study["target"].to(self.device), study["label"].to(self.device)
        self._shown = study["shown"].to(self.device) if "shown" in study else slice(None)
        self._exists, self._has_mask = study["has_contrast"].tolist(), bool(study["has_mask"])
        exists = study["has_contrast"].to(self.device).expand(len(target), -1)[..., None, None]
        self._slices = torch.where(exists, target, -1.0)
        self._target, self._label = self._slices[self._shown], label[self._shown]
        brain = (self._target > -1).any(dim=1)
        tumor = (self._label[:, 0] > 0) & self._has_mask
        images = self._target
        if "unclipped" in study:
            images = torch.where(exists, study["unclipped"].to(self.device), -1.0)[self._shown]
        for protocol in self.protocols:
            if protocol.whole == whole:
                protocol.start(StudyTarget(((images + 1) / 2).clamp(min=0), brain, tumor, slice_axis))
        if self._has_mask and whole == self.whole:
            present = region_masks(class_masks(self._label)).transpose(0, 1).flatten(1).any(dim=1).tolist()
            self.regions.update(name for name, found in zip(REGIONS, present, strict=True) if found)

    def _append(
        self, data: Mapping[str, Any], scenario: Sequence[int], values: Mapping[Key, torch.Tensor | float]
    ) -> None:
        """Rows of one study and scenario."""
        if not values:
            return
        common = {"study": data["study"], "patient": data["patient"]}
        common |= {"scenario": scenario_name(scenario), "available": sum(scenario)}
        # a target that is itself synthesized, as T2 of UCSF-BMSR, is told apart
        synthesized = {CONTRAST_NAMES[key] for key in data.get("complete", {}).get("synthesized", ())}
        # the one synchronization
        numbers = torch.stack([torch.as_tensor(value).double() for value in values.values()]).tolist()
        for key, number in zip(values, numbers, strict=True):
            if math.isfinite(number):
                names = dict(zip(("of", "method", "protocol", "region", "score"), key, strict=True))
                if names["of"] in synthesized:
                    names["of"] += SYNTHESIZED
                self.rows.append({**common, **names, "value": number})


class EvaluationTables:
    """Writes ``scores.csv`` (all rows) and ``metrics.json`` (metadata and summary) at the end of an evaluation.

    Each file appears complete or not at all. In a distributed run the rows of all processes are joined.

    Args:
        scores: the writer of the evaluator.
        directory: where to write.
        metadata: of the run, written as they are; where there is ``weights``, the hash of that file is added. For a
            network with a bank, ``bank_entries`` and the ``style_spread`` of its bank are.
        lpips: the perceptual distance in use, for the hash of its weights.
        bootstrap_samples, seed: see ``summarize``.
    """

    def __init__(
        self,
        scores: StudyScores,
        directory: str | Path,
        metadata: Mapping[str, Any],
        lpips: PerceptualDistance | None = None,
        bootstrap_samples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.scores, self.directory, self.metadata = scores, Path(directory), dict(metadata)
        self.lpips, self.bootstrap_samples, self.seed = lpips, bootstrap_samples, seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)  # of the one epoch: loggers of metrics find the means

    def __call__(self, engine: StudyEvaluator) -> None:
        """Joins the rows of all processes and writes both files; a ``StudyError`` if nothing could be scored.

        The metrics of the engine become the means over all scenarios.
        """
        mine: dict[str, Any] = {"rows": self.scores.rows, "regions": self.scores.regions}
        mine |= {"network": engine.seconds, "scoring": self.scores.seconds}
        parts: Any = idist.all_gather(mine)
        if idist.get_rank() > 0:
            return
        frame = pd.DataFrame([row for part in parts for row in part["rows"]], columns=COLUMNS)
        if frame.empty:
            raise StudyError(
                "Nothing could be scored: the evaluated studies have neither a missing contrast nor a mask."
            )
        names = sorted(set(frame["study"]))
        metadata: dict[str, Any] = {
            **self.metadata,
            "studies": names,
            "patients": sorted(set(frame["patient"])),
            "studies_with_region": _total(part["regions"] for part in parts),
            "protocols": {k: v for c in self.scores.protocols for k, v in c.definitions.items()}
            | {k: v for k, v in self.scores.segmentation.items() if k in set(frame["protocol"])},
            "methods": ["network", *self.scores.reference_methods],
            "lpips_sha256": None if self.lpips is None else self.lpips.fingerprint(),
            "bootstrap": {
                "samples": self.bootstrap_samples,
                "seed": self.seed,
                "interval": "95%, percentile, patients",
            },
            "seconds_per_study": {
                name: round(sum(_total(part[name] for part in parts).values()) / len(names), 3)
                for name in ("network", "scoring")
            },
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
        }
        network: Any = engine.network
        if getattr(network, "uses_bank", False):
            present = network.bank_present
            spread = style_spread(network.bank_mean, network.bank_std, present)
            metadata["bank_entries"] = int(present.any(dim=1).sum())
            metadata |= {f"bank_{name}": round(float(value), 4) for name, value in spread.items()}
        if "weights" in metadata:
            metadata["sha256"] = hashlib.sha256(find_weights(metadata["weights"]).read_bytes()).hexdigest()
        summary = summarize(frame, self.bootstrap_samples, self.seed)
        write_whole(self.directory / "scores.csv", frame.to_csv(index=False))
        text = json.dumps({"metadata": metadata, "summary": summary}, indent=1, allow_nan=False)
        write_whole(self.directory / "metrics.json", text + "\n")
        engine.state.metrics.update(
            {
                "/".join(str(entry[name]) for name in ("protocol", "region", "method", "of", "score")): entry["mean"]
                for entry in summary
                if entry["group"] == "all"
            }
        )
        for line in overview(summary):
            engine.logger.info(line)
        engine.logger.info(f"wrote scores.csv and metrics.json in {self.directory}")


def overview(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """The means of the scenarios (group ``all``) as text, a line for each method, protocol and region."""
    lines: dict[str, list[str]] = {}
    for entry in summary:
        if entry["group"] == "all":
            name = entry["score"] if entry["of"] == "all" else f"{entry['score']} {entry['of']}"
            interval = "" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})"
            line = lines.setdefault(f"{entry['protocol']}, {entry['region']}, {entry['method']}", [])
            line.append(f"{name} {entry['mean']:.3f}{interval}")
    return [f"{key}: {', '.join(parts)}" for key, parts in sorted(lines.items())]


def _total(counters: Iterable[Mapping[str, float]]) -> dict[str, float]:
    return dict(sum(map(Counter, counters), Counter()))
