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

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test

from ..contrasts import CONTRASTS, REGIONS, SCENARIOS, SYNTHESIZED, StudyError, scenario_name

#: Columns that say what is measured; rows that agree in them are averaged.
MEASURE = ["method", "protocol", "region", "score"]
#: Columns of ``scores.csv``. ``available`` is the number of available contrasts, ``of`` the scored contrast or region.
COLUMNS = ["study", "patient", "scenario", "available", "of", *MEASURE, "value"]
#: With fewer patients no p-value is given: of five, the smallest possible one is 2 / 2^5 = 0.06.
MIN_PATIENTS = 6


def read_scores(path: str | Path) -> pd.DataFrame:
    """Rows of a ``scores.csv``, with ``COLUMNS``.

    Raises:
        StudyError: if there is no such file, or it is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"There is no scores.csv in {path.parent}: evaluate this run first, or correct its folder.")
    try:
        frame = pd.read_csv(path, dtype={"study": str, "patient": str})
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} cannot be read as a table ({error}): evaluate this run again.") from error
    lacking = [name for name in COLUMNS if name not in frame]
    if lacking:
        raise StudyError(f"{path} has no column {', '.join(lacking)}: it is not the scores.csv of an evaluation.")
    return frame


def group_masks(scenario: np.ndarray, of: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Which rows belong to each group of a summary, by ``group`` and ``of``, of the groups that have a row.

    ``all`` is the mean over scenarios of the mean over a scenario's targets, ``pairs`` the mean over all pairs of
    scenario and target, ``contrast`` the mean over the scenarios of one target, ``available:<n>`` and
    ``scenario:<name>`` are as ``all``, of these scenarios alone.
    """
    everything = np.ones(len(of), dtype=bool)
    available = np.char.count(scenario.astype(str), "+") + 1
    contrasts = [*CONTRASTS, *(name + SYNTHESIZED for name in CONTRASTS)]
    names = {name: of == name for name in (*contrasts, *REGIONS) if name in set(of)}
    masks = {("all", "all"): everything, ("pairs", "all"): everything}
    masks |= {("contrast" if name in contrasts else "all", name): mask for name, mask in names.items()}
    subsets = {f"available:{n}": available == n for n in sorted(set(available))}
    subsets |= {f"scenario:{name}": scenario == name for name in map(scenario_name, SCENARIOS)}
    for group, subset in subsets.items():
        masks |= {(group, "all"): subset, **{(group, name): subset & mask for name, mask in names.items()}}
    return {key: mask for key, mask in masks.items() if mask.any()}


class GroupMeans:
    """Means over studies, then targets, then scenarios of some patients, of rows with ``COLUMNS`` of one measure.

    What is missing is left out. ``masks``: ``group_masks`` of the cells (scenario and target); ``patients``: how many.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        values = frame.pivot_table("value", "patient", ["scenario", "of"], ["sum", "count"], observed=True).fillna(0)
        self._sums, self._numbers = values["sum"].to_numpy(), values["count"].to_numpy()
        scenario, of = (values["sum"].columns.get_level_values(level).to_numpy() for level in ("scenario", "of"))
        self.masks, self.patients = group_masks(scenario, of), len(values)
        self._scenarios = [scenario == name for name in dict.fromkeys(scenario)]

    def __call__(self, patients: np.ndarray, axis: int = -1) -> np.ndarray:
        """Means of samples of patients, groups x samples, as ``scipy.stats`` calls a statistic.

        ``patients`` are samples x any number of positions in alphabetical order; one that is there twice counts twice.
        """
        times = np.zeros((len(patients), self.patients))
        np.add.at(times, (np.arange(len(patients))[:, None], patients), 1)
        means = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of what none of the patients has
            cells = (times @ self._sums) / (times @ self._numbers)
            for (group, _), mask in self.masks.items():
                parts = [mask] if group == "pairs" else [mask & one for one in self._scenarios if (mask & one).any()]
                each = [np.nanmean(cells[:, part], axis=1) for part in parts]
                means.append(np.nanmean(np.stack(each, axis=1), axis=1))
        return np.stack(means)


def summarize(
    frame: pd.DataFrame, bootstrap_samples: int = 2000, seed: int = 0, p_values: bool = False
) -> list[dict[str, Any]]:
    """Means over studies, then targets, then scenarios, with bootstrap intervals over patients.

    Args:
        frame: rows with ``COLUMNS``.
        bootstrap_samples: a sample has as many patients as the frame, drawn with replacement, each with all of its
            studies. The interval is from the 2.5th to the 97.5th percentile. 0 gives no intervals.
        seed: of the samples; the same for equal arguments, so that two methods are resampled alike.
        p_values: also give ``p_value``, see ``sign_flip_p_value``, for values that are differences.

    Returns:
        For each measure and group (see ``group_masks``): ``method``, ``protocol``, ``region``, ``score``, ``group``,
        ``of``, ``mean``, ``low`` and ``high`` (None for a single patient), ``patients``, ``studies`` and ``values``
        (numbers of those behind the mean).
    """
    entries = []
    for key, part in frame.groupby(MEASURE, sort=False, observed=True):
        means = GroupMeans(part)
        masks = group_masks(part["scenario"].to_numpy(), part["of"].to_numpy())
        positions, study = np.arange(means.patients), part["study"].to_numpy()
        low = high = np.full(len(masks), np.nan)
        if bootstrap_samples and len(positions) > 1:
            with warnings.catch_warnings():  # of samples without any patient of a group, which are left out
                warnings.simplefilter("ignore", DegenerateDataWarning)
                result = bootstrap(
                    (positions,), means, n_resamples=bootstrap_samples, vectorized=True, method="percentile", rng=seed
                )
            low, high = np.nanpercentile(result.bootstrap_distribution, (2.5, 97.5), axis=-1)
        alone = means(positions[:, None])
        for k, (group, mean) in enumerate(zip(means.masks, means(positions[None])[:, 0], strict=True)):
            rows, values = masks[group], alone[k][~np.isnan(alone[k])]
            interval = bootstrap_samples and len(values) > 1
            entry = dict(zip((*MEASURE, "group", "of"), (*key, *group), strict=True))
            entry |= {"mean": float(mean)}
            entry |= {"low": float(low[k]) if interval else None, "high": float(high[k]) if interval else None}
            entry |= {"patients": len(values), "studies": len(set(study[rows])), "values": int(rows.sum())}
            if p_values:
                entry["p_value"] = sign_flip_p_value(values, bootstrap_samples, seed)
            entries.append(entry)
    return entries


def paired_differences(
    ours: pd.DataFrame, theirs: pd.DataFrame, bootstrap_samples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean difference ``ours - theirs`` over what both have scored, with intervals and p-values over patients.

    Args:
        ours: rows with ``COLUMNS``; one method, for example those of ``network`` in one run.
        theirs: rows of the other run or method; of its ``method`` nothing is read.
        bootstrap_samples, seed: of ``summarize``, which gives the differences with ``p_value``.

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
    difference = joined.assign(value=joined["value"] - joined["value_theirs"])
    return summarize(difference[COLUMNS], bootstrap_samples, seed, p_values=True)


def sign_flip_p_value(values: np.ndarray, flips: int = 2000, seed: int = 0) -> float | None:
    """Two-sided p-value of a mean against 0 when every sign is as likely as its opposite.

    Args:
        values: one for each patient; with fewer than ``MIN_PATIENTS`` there is no p-value.
        flips: number of random sign flips; all 2^patients of them where these are not more.
        seed: of the flips.
    """
    if len(values) < MIN_PATIENTS:
        return None
    return float(
        permutation_test(
            (values,), np.mean, permutation_type="samples", vectorized=True, n_resamples=flips, rng=seed
        ).pvalue
    )
