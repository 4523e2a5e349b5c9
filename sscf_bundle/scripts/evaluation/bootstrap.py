# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Means over studies, targets and scenarios with intervals over patients, and differences of two runs.

Everything works on the rows of an evaluation in long form, a pandas frame with ``COLUMNS``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from scipy.stats import permutation_test

from ..contrasts import CONTRASTS, REGIONS, SCENARIOS, StudyError, scenario_name
from ..inference.evaluator import StudyEvaluator
from ..networks.memory_bank import style_spread
from .protocols import PerceptualDistance
from .scores import StudyScores

#: Columns of ``scores.csv``. ``available`` is the number of available contrasts, ``of`` the scored contrast or region.
COLUMNS = (
    "study",
    "patient",
    "scenario",
    "available",
    "of",
    "method",
    "protocol",
    "region",
    "score",
    "value",
)
#: Columns that say what is measured; rows that agree in them are averaged.
MEASURE = ("method", "protocol", "region", "score")
#: With fewer patients no p-value is given: of five, the smallest possible one is 2 / 2^5 = 0.06.
MIN_PATIENTS = 6

_OF = (*CONTRASTS, *REGIONS)
_SCENARIOS = tuple(scenario_name(row) for row in SCENARIOS)
_PACKAGES = ("monai", "torch", "numpy", "pandas", "scipy", "pytorch-ignite", "lpips")


class Group(NamedTuple):
    """A mean over (scenario, contrast or region) cells.

    Args:
        name: ``all`` (mean over scenarios of the mean over a scenario's targets), ``pairs`` (mean over the cells),
            ``contrast`` (mean over the scenarios of one target), ``available:<n>`` and ``scenario:<name>`` (as ``all``,
            of these scenarios alone).
        of: the contrast or region, or ``all``.
        cells: positions of the cells.
        scenarios: the scenario of each cell, by which it is averaged first.
    """

    name: str
    of: str
    cells: np.ndarray
    scenarios: np.ndarray


def read_scores(path: str | Path) -> pd.DataFrame:
    """Rows of a ``scores.csv``.

    Raises:
        StudyError: if there is no such file, or it lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"There are no scores at {path}: run the evaluation first, or correct the path.")
    frame = pd.read_csv(path, dtype={"study": str, "patient": str})
    lacking = [name for name in COLUMNS if name not in frame]
    if lacking:
        raise StudyError(f"{path} has no column {', '.join(lacking)}: it is not the scores.csv of an evaluation.")
    return frame


def patient_draws(patients: int, draws: int, seed: int) -> np.ndarray:
    """How often each patient is in each bootstrap sample.

    Args:
        patients: number of patients.
        draws: number of samples.
        seed: of the draws; the same for equal arguments, so that two methods are resampled alike.

    Returns:
        draws x patients, rows add up to ``patients``.
    """
    drawn = np.random.default_rng(seed).integers(patients, size=(draws, patients))
    offsets = np.arange(draws)[:, None] * patients
    return np.bincount((drawn + offsets).ravel(), minlength=draws * patients).reshape(draws, patients)


def group_mean(cells: np.ndarray, group: Group) -> np.ndarray:
    """Mean of a group, first over the cells of a scenario, then over scenarios; NaN cells are left out.

    Args:
        cells: any number of rows x cells.
        group: what to average.

    Returns:
        A value for each row.
    """
    chosen = cells[:, group.cells]
    # scenarios x cells; a matrix product averages all bootstrap samples at once
    member = (np.unique(group.scenarios)[:, None] == group.scenarios).astype(float)
    known = ~np.isnan(chosen)
    with np.errstate(invalid="ignore"):
        means = (np.where(known, chosen, 0.0) @ member.T) / (known @ member.T)
        exists = ~np.isnan(means)
        return np.where(exists, means, 0.0).sum(axis=1) / exists.sum(axis=1)


class _Cells(NamedTuple):
    """Sums and numbers of values: patients x cells, and the same by study for counting."""

    patients: list[str]
    keys: list[tuple[str, str]]
    sums: np.ndarray
    numbers: np.ndarray
    by_study: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame) -> _Cells:
        def table(name: str, how: str) -> pd.DataFrame:
            grouped = frame.groupby([name, "scenario", "of"], observed=True)["value"].agg(how)
            return grouped.unstack(["scenario", "of"]).sort_index(axis=0).sort_index(axis=1)

        sums = table("patient", "sum").fillna(0.0)
        numbers, by_study = (table(name, "count").fillna(0).to_numpy() for name in ("patient", "study"))
        return cls(list(sums.index), list(sums.columns), sums.to_numpy(), numbers, by_study)

    def means(self, weights: np.ndarray) -> np.ndarray:
        """Mean over studies of each cell, for samples x patients: samples x cells."""
        with np.errstate(invalid="ignore"):
            return (weights @ self.sums) / (weights @ self.numbers)

    def groups(self) -> list[Group]:
        """All groups that have a cell."""
        scenario, of = (np.array(column) for column in zip(*self.keys, strict=True))
        available = np.array([name.count("+") + 1 for name in scenario])
        everything = np.ones(len(self.keys), dtype=bool)
        names = [name for name in _OF if name in set(of)]
        subsets = [(f"available:{n}", available == n) for n in sorted(set(available.tolist()))]
        subsets += [(f"scenario:{name}", scenario == name) for name in _SCENARIOS if name in set(scenario)]
        listed = [("all", "all", everything), ("pairs", "all", everything)]
        listed += [("contrast", name, of == name) for name in names if name in CONTRASTS]
        listed += [("all", name, of == name) for name in names if name in REGIONS]
        for group, mask in subsets:
            listed += [(group, "all", mask), *((group, name, mask & (of == name)) for name in names)]
        result = []
        for group, name, mask in listed:
            cells = np.flatnonzero(mask)
            if cells.size:
                result.append(Group(group, name, cells, cells if group == "pairs" else scenario[cells]))
        return result

    def entry(self, group: Group, draws: np.ndarray) -> dict[str, Any]:
        """Mean of a group, its 95% percentile interval (None for a single patient), and the numbers behind it."""
        mean = group_mean(self.means(np.ones((1, len(self.patients)))), group)[0]
        low = high = None
        seen = int((self.numbers[:, group.cells].sum(axis=1) > 0).sum())
        if seen > 1:
            samples = group_mean(self.means(draws), group)
            low, high = (float(value) for value in np.nanpercentile(samples, (2.5, 97.5)))
        return {
            "group": group.name,
            "of": group.of,
            "mean": float(mean),
            "low": low,
            "high": high,
            "patients": seen,
            "studies": int((self.by_study[:, group.cells].sum(axis=1) > 0).sum()),
            "values": int(self.numbers[:, group.cells].sum()),
        }


def summarize(frame: pd.DataFrame, draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Means over studies, then targets, then scenarios, with bootstrap intervals over patients.

    Args:
        frame: rows with ``COLUMNS``.
        draws: bootstrap samples; a sample has as many patients as the frame, drawn with replacement, each with all of
            its studies. The interval is from the 2.5th to the 97.5th percentile.
        seed: of the draws.

    Returns:
        For each measure and ``Group``: ``method``, ``protocol``, ``region``, ``score``, ``group``, ``of``, ``mean``,
        ``low``, ``high``, ``patients``, ``studies`` and ``values`` (numbers of those behind the mean).
    """
    entries = []
    for key, part in frame.groupby(list(MEASURE), sort=False, observed=True):
        cells = _Cells.of(part)
        weights = patient_draws(len(cells.patients), draws, seed)
        entries += [{**dict(zip(MEASURE, key, strict=True)), **cells.entry(group, weights)} for group in cells.groups()]
    return entries


def patient_means(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of the scenarios of every patient alone, for plots.

    Args:
        frame: rows with ``COLUMNS``.

    Returns:
        Frame with ``MEASURE``, ``patient`` and ``value`` (group ``all``).
    """
    parts = []
    for key, part in frame.groupby(list(MEASURE), sort=False, observed=True):
        cells = _Cells.of(part)
        value = group_mean(cells.means(np.eye(len(cells.patients))), cells.groups()[0])
        measure = dict(zip(MEASURE, key, strict=True))
        parts.append(pd.DataFrame({**measure, "patient": cells.patients, "value": value}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*MEASURE, "patient", "value"])


def paired_differences(
    ours: pd.DataFrame, theirs: pd.DataFrame, draws: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean difference ``ours - theirs`` over what both have scored, with intervals and p-values over patients.

    Args:
        ours: rows with ``COLUMNS``; one method, for example those of ``network`` in one run.
        theirs: rows of the other run or method; of its ``method`` nothing is read.
        draws: bootstrap samples, and sign flips where there are too many patients for all of them.
        seed: of both.

    Returns:
        As ``summarize``, of the differences, with ``p_value``: two-sided sign-flip test of the patients' mean
        differences in the group; None with fewer than ``MIN_PATIENTS`` patients.

    Raises:
        ValueError: if nothing was scored by both, or one frame holds several methods.
    """
    for frame in (ours, theirs):
        if frame["method"].nunique() > 1:
            raise ValueError("a paired difference is between two methods: select one method of each run.")
    keys = [name for name in COLUMNS if name not in ("method", "value")]
    joined = ours.merge(theirs.drop(columns="method"), on=keys, suffixes=("", "_theirs"), validate="one_to_one")
    if joined.empty:
        raise ValueError("the two runs have no score of the same study and scenario in common.")
    difference = joined.assign(value=joined["value"] - joined["value_theirs"])[list(COLUMNS)]
    entries = []
    for key, part in difference.groupby(list(MEASURE), sort=False, observed=True):
        cells = _Cells.of(part)
        weights = patient_draws(len(cells.patients), draws, seed)
        apart = cells.means(np.eye(len(cells.patients)))
        for group in cells.groups():
            values = group_mean(apart, group)
            p_value = sign_flip_p_value(values[~np.isnan(values)], draws, seed)
            entry = {**dict(zip(MEASURE, key, strict=True)), **cells.entry(group, weights), "p_value": p_value}
            entries.append(entry)
    return entries


def sign_flip_p_value(values: np.ndarray, draws: int = 2000, seed: int = 0) -> float | None:
    """Two-sided p-value of a mean against 0 when every sign is as likely as its opposite.

    Args:
        values: one for each patient.
        draws: sign flips; all 2^patients of them where these are not more.
        seed: of the draws.

    Returns:
        The p-value, or None with fewer than ``MIN_PATIENTS`` values.
    """
    if len(values) < MIN_PATIENTS:
        return None
    result = permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


class EvaluationTables:
    """Writes ``scores.csv`` (all rows) and ``metrics.json`` (facts and summary) at the end of an evaluation.

    Each file appears complete or not at all. In a distributed run the rows of all processes are joined.

    Args:
        scores: the writer of the evaluator.
        directory: where to write.
        facts: what the run was, written as it is; where there is ``weights``, the hash of that file is added. For a
            network with a bank, ``bank_entries`` and the ``style_spread`` of its bank are.
        lpips: the perceptual distance in use, for the hash of its weights.
        draws: bootstrap samples.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        scores: StudyScores,
        directory: str | Path,
        facts: Mapping[str, Any],
        lpips: PerceptualDistance | None = None,
        draws: int = 2000,
        seed: int = 0,
    ) -> None:
        self.scores, self.directory, self.facts = scores, Path(directory), dict(facts)
        self.lpips, self.draws, self.seed = lpips, draws, seed

    def attach(self, engine: Engine) -> None:
        """Writes at ``COMPLETED``."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: StudyEvaluator) -> None:
        """Raises: SystemExit: if nothing could be scored."""
        mine = {
            "rows": self.scores.rows,
            "regions": self.scores.regions,
            "network": engine.seconds,
            "scoring": self.scores.seconds,
        }
        parts = idist.all_gather(mine) if idist.get_world_size() > 1 else [mine]
        if idist.get_rank() > 0:
            return
        frame = pd.DataFrame([row for part in parts for row in part["rows"]], columns=list(COLUMNS))
        if frame.empty:
            raise SystemExit(
                "Nothing could be scored: the evaluated studies have neither a missing contrast nor a mask."
            )
        names = sorted(set(frame["study"]))
        facts = {
            **self.facts,
            "studies": names,
            "patients": sorted(set(frame["patient"])),
            "studies_with_region": _total(part["regions"] for part in parts),
            "protocols": {k: v for c in self.scores.protocols for k, v in c.definitions().items()},
            "methods": ["network", *self.scores.reference_methods],
            "lpips_sha256": None if self.lpips is None else self.lpips.fingerprint(),
            "bootstrap": {"draws": self.draws, "seed": self.seed, "unit": "patient", "interval": "95%, percentile"},
            "seconds_per_study": {
                name: round(sum(_total(part[name] for part in parts).values()) / len(names), 3)
                for name in ("network", "scoring")
            },
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
        }
        if "segmentation" in set(frame["protocol"]):
            facts["protocols"]["segmentation"] = self.scores.segmentation
        if getattr(engine.network, "uses_bank", False):
            network = engine.network
            present = network.bank_present
            spread = style_spread(network.bank_mean, network.bank_std, present)
            facts["bank_entries"] = int(present.any(dim=1).sum())
            facts |= {f"bank_{name}": round(float(value), 4) for name, value in spread.items()}
        if "weights" in facts:
            facts["sha256"] = hashlib.sha256(Path(facts["weights"]).read_bytes()).hexdigest()
        report = {"facts": facts, "summary": summarize(frame, self.draws, self.seed)}
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / "scores.csv", frame.to_csv(index=False))
        _write(self.directory / "metrics.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        for line in overview(report["summary"]):
            engine.logger.info(line)
        engine.logger.info(f"wrote scores.csv and metrics.json in {self.directory}")


def overview(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each method, protocol and region with the means of the scenarios (group ``all``)."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for entry in summary:
        if entry["group"] == "all":
            name = entry["score"] if entry["of"] == "all" else f"{entry['score']} {entry['of']}"
            interval = "" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})"
            line = lines.setdefault((entry["protocol"], entry["region"], entry["method"]), [])
            line.append(f"{name} {entry['mean']:.3f}{interval}")
    return [f"{', '.join(key)}: {', '.join(parts)}" for key, parts in sorted(lines.items())]


def _total(counters: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
