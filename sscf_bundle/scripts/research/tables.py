# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Tables from the long-form scores of evaluations: CSV, Markdown and LaTeX, with captions that say what they are of."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ..checked_settings import refuse_unknown
from ..contrasts import CONTRASTS, NUM_CONTRASTS, REGIONS, SCENARIOS, SYNTHESIZED, StudyError, scenario_name
from ..evaluation.bootstrap import (
    COLUMNS,
    MEASURE,
    MIN_PATIENTS,
    GroupMeans,
    paired_differences,
    read_scores,
    summarize,
)

#: Title, digits and whether larger is better.
SCORES = {
    "psnr": ("PSNR", 2, True),
    "ssim": ("SSIM", 4, True),
    "lpips": ("LPIPS", 4, False),
    "nmse": ("NMSE", 4, False),
    "mse": ("MSE", 4, False),
    "jump": ("jump between slices", 4, False),
    "dice": ("Dice", 4, True),
    "minutes": ("minutes", 1, False),
}
#: Names of the reference methods in a table.
REFERENCE_METHODS = {
    "zero_filling": "Zero filling",
    "mean_of_available": "Mean of available",
    "nearest_contrast": "Nearest contrast",
}
#: The same for what the downstream task makes of the real contrasts.
REAL = {"real": "Full contrasts (real)"}
_IMAGE_SCORES = ("psnr", "ssim", "lpips")
_DICE = {"scores": ("dice",), "blocks": {name: ("all", name) for name in ("WT", "ET", "TC")}}
#: What a kind of table shows: scores in order, and for each block of columns the ``group`` and ``of`` of a summary.
KINDS: dict[str, dict[str, Any]] = {
    "contrasts": {
        "scores": _IMAGE_SCORES,
        "blocks": {name + text: ("contrast", name + text) for name in CONTRASTS for text in ("", SYNTHESIZED)},
    },
    "scores": {"scores": ("ssim", "psnr", "lpips"), "blocks": {"all": ("all", "all")}},
    "available": {
        "scores": _IMAGE_SCORES,
        "blocks": {f"{n} available": (f"available:{n}", "all") for n in range(1, NUM_CONTRASTS)},
    },
    "scenarios": {
        "scores": _IMAGE_SCORES,
        "blocks": {name: (f"scenario:{name}", "all") for name in map(scenario_name, SCENARIOS)},
    },
    "dice": _DICE,
    "downstream": _DICE,
}
#: Protocol of the kinds that have one alone.
PROTOCOLS = {"dice": "segmentation", "downstream": "downstream"}
#: Those that score no image.
DICE_PROTOCOLS = {*PROTOCOLS.values(), "segmentation_per_slice"}
#: What scores of slices depend on, on the network's grid; whole studies have the grid on file, by a text without them.
_GRID = ("image_size", "spacing", "scaling", "scored_slices", "evaluated_slices")


# ------------------------------------------------------------------------------------------------------------ reading
class Runs:
    """Scores of some runs over the same studies, and the numbers made of them, each computed once.

    ``frame`` has ``bootstrap.COLUMNS`` and ``run``, ``seed``; ``metadata`` for each run those of its evaluations.
    """

    def __init__(
        self, frame: pd.DataFrame, metadata: Mapping[str, Sequence[Mapping[str, Any]]], bootstrap_samples: int = 2000
    ) -> None:
        self.frame, self.metadata, self.bootstrap_samples = frame, metadata, bootstrap_samples
        self._rows = dict(list(frame.groupby(["run", *MEASURE], sort=False)))
        self.summary, self.difference = functools.cache(self._summary), functools.cache(self._difference)

    def _summary(self, run: str, *measure: str) -> dict[tuple[str, str], dict[str, Any]]:
        """``summarize`` of one measure with every value averaged over the seeds, by ``group`` and ``of``.

        An entry has, besides, ``spread`` (standard deviation over the seeds, NaN for a single one) and ``range``
        (largest less smallest of the seeds).
        """
        if (run, *measure) not in self._rows:
            return {}
        rows = self._rows[run, *measure]

        def table(part: pd.DataFrame, samples: int) -> pd.DataFrame:
            return pd.DataFrame(summarize(part, samples)).set_index(["group", "of"])

        seeds = pd.concat([table(part, 0)["mean"] for _, part in rows.groupby("seed")], axis=1)
        spread = {"spread": seeds.std(axis=1), "range": seeds.max(axis=1) - seeds.min(axis=1)}
        return table(average_seeds(rows), self.bootstrap_samples).assign(**spread).to_dict("index")

    def _difference(self, run: str, reference: str, *measure: str) -> dict[str, Any] | None:
        """Paired difference of the mean over scenarios between the networks of a run and of the reference.

        Where the two do not have the same seeds, it is of those that both have. ``measure`` is protocol, region, score.

        Returns:
            The entry of ``paired_differences`` for ``all``, with ``noise``: why the difference may be none (too few
            patients, its interval covers 0, or it is not larger than the range of one of the two runs over its seeds),
            empty where it stands out. None if one of the two has no such score.
        """
        pair = [self._rows[key] for name in (run, reference) if (key := (name, "network", *measure)) in self._rows]
        if len(pair) < 2:
            return None
        common = set(pair[0]["seed"]) & set(pair[1]["seed"])
        if not common:
            return None
        ours, theirs = (average_seeds(rows[rows["seed"].isin(common)]) for rows in pair)
        entries = paired_differences(ours, theirs, self.bootstrap_samples)
        found = next(entry for entry in entries if (entry["group"], entry["of"]) == ("all", "all"))
        seeds = max(self.summary(name, "network", *measure)["all", "all"]["range"] for name in (run, reference))
        patients = f"{found['patients']} patients" if found["patients"] > 1 else "a single patient"
        reasons = {
            patients: found["patients"] < MIN_PATIENTS,
            "interval covers 0": found["low"] is not None and found["low"] <= 0 <= found["high"],
            "inside the seeds' range": abs(found["mean"]) <= seeds,
        }
        return found | {"noise": " and ".join(reason for reason, holds in reasons.items() if holds)}

    def patients(self, run: str, *measure: str) -> np.ndarray:
        """Mean over the scenarios of every patient alone; ``measure`` is method, protocol, region and score."""
        means = GroupMeans(average_seeds(self._rows[run, *measure]))
        return means(np.arange(means.patients)[:, None])[0]


def average_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ``bootstrap.COLUMNS``, every value the mean over the seeds."""
    return rows.groupby(COLUMNS[:-1], as_index=False, sort=False)["value"].mean()


def methods_of(frame: pd.DataFrame, labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The rows of a table or figure: label, run and method, first the reference methods, last the real contrasts.

    What is not of a network is the same for every run and taken from the first.
    """
    there = set(frame[["run", "method"]].itertuples(index=False, name=None))
    networks = [(label, run, "network") for run, label in labels.items() if (run, "network") in there]
    first = networks[0][1] if networks else ""
    before, after = (
        [(label, first, method) for method, label in names.items() if (first, method) in there]
        for names in (REFERENCE_METHODS, REAL)
    )
    return [*before, *networks, *after]


def read_runs(folders: Mapping[str, Any], bootstrap_samples: int = 2000) -> Runs:
    """Reads what evaluations wrote.

    Args:
        folders: for each run its folder with ``scores.csv`` and ``metrics.json``, or a list of folders whose studies
            differ (the folds of a cross-validation), or such a list or folder for each seed: ``{0: [...], 1: [...]}``.
        bootstrap_samples: of every bootstrap over patients.

    Raises:
        StudyError: if a file is missing or is no such table, a study is there twice for one seed, or the runs were
            evaluated on different studies, scenarios or grids.
    """
    if not folders:
        raise StudyError("There are no runs: give the folder of at least one evaluation.")
    frames: list[pd.DataFrame] = []
    metadata: dict[str, list[dict[str, Any]]] = {}
    for name, given in folders.items():
        metadata[str(name)] = []
        for seed, paths in (given if isinstance(given, Mapping) else {0: given}).items():
            parts = []
            for path in [paths] if isinstance(paths, str | Path) else paths:
                folder = Path(path).expanduser()
                parts.append(read_scores(folder / "scores.csv")[COLUMNS])
                if (folder / "metrics.json").is_file():
                    content = json.loads((folder / "metrics.json").read_text())
                    metadata[str(name)].append(content["metadata"])
            part = pd.concat(parts, ignore_index=True)
            # an image evaluation and a downstream evaluation differ in their protocol
            twice = part[part.duplicated(COLUMNS[:-1])]
            if len(twice):
                raise StudyError(
                    f"{name} has the study {twice['study'].iloc[0]} twice for seed {seed}: give every fold once."
                )
            frames.append(part.assign(run=str(name), seed=seed))
    frame = pd.concat(frames, ignore_index=True)
    defined: dict[tuple[str, str], tuple[str, Any]] = {}
    for run, facts in ((run, facts) for run, entries in metadata.items() for facts in entries):
        for protocol, definition in facts.get("protocols", {}).items():
            first, known = defined.setdefault((protocol, ""), (run, definition))
            if known != definition:
                raise StudyError(
                    f"{first} and {run} were scored by different definitions of the protocol {protocol}: evaluate both "
                    "with one version and the same evaluated_slices."
                )
            for key in _GRID if "slice" in f"{protocol} {definition}" else ():
                first, known = defined.setdefault((protocol, key), (run, facts.get(key)))
                if known != facts.get(key):
                    raise StudyError(
                        f"{first} and {run} were scored with the {key} {known} and {facts.get(key)}, on which the "
                        f"protocol {protocol} depends: evaluate both with one {key}, or by the protocol volume alone."
                    )
    # a task may need more of a study than another one (all contrasts, a mask), so by protocol
    for protocol, rows in frame[frame["method"] == "network"].groupby("protocol", sort=False):
        for column, what, remedy in (
            ("study", "studies", "on one split"),
            ("scenario", "scenarios", "with the same scenarios"),
        ):
            tested = rows.groupby(["run", "seed"], sort=False)[column].agg(frozenset)
            for (name, seed), there in tested.items():
                if there != tested.iloc[0]:
                    other = sorted(there ^ tested.iloc[0])[0]
                    raise StudyError(
                        f"{name} (seed {seed}) and {tested.index[0][0]} were evaluated on different {what} ({other} is "
                        f"in one alone, protocol {protocol}): evaluate both {remedy}."
                    )
    return Runs(frame, metadata, bootstrap_samples)


# ------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    """One table."""

    name: str  #: stem of its files.
    title: str  #: a few words.
    caption: str  #: cohort, part, patients, protocol, seeds and weights.
    #: long form with ``row``, ``block``, ``score``, ``mean`` and, where they were computed, ``low``, ``high`` (95%
    #: interval over patients), ``spread`` (standard deviation over seeds) and ``patients``.
    cells: pd.DataFrame
    #: text for some rows, shown in a last column of that title.
    remarks: Mapping[str, str] = field(default_factory=dict)
    remark_title: str = "remark"  #: title of that column.
    #: the methods are the blocks; the best is then that of a row, among the columns of one score.
    transposed: bool = False

    def grid(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Texts as they are shown, and whether each is the best of its column (or row)."""
        cells = self.cells.assign(text=[_text(cell) for cell in self.cells.to_dict("records")])
        columns = pd.MultiIndex.from_frame(cells[["block", "score"]].drop_duplicates(), names=[None, None])
        rows = list(dict.fromkeys([*cells["row"], *self.remarks]))
        value, text = (
            cells.pivot(index="row", columns=["block", "score"], values=name).reindex(index=rows, columns=columns)
            for name in ("mean", "text")
        )
        value *= [1 if SCORES[score][2] else -1 for _, score in columns]
        value[value.index.isin(REAL.values())] = np.nan  # a bound, no method
        largest = value.T.groupby(level=1).transform("max").T if self.transposed else value.max()
        compared = columns.get_level_values(0).nunique() if self.transposed else len(rows)
        best = value.eq(largest) & (compared > 1)
        text.columns = best.columns = pd.MultiIndex.from_tuples(
            [("" if block == "all" else block, head(score)) for block, score in columns]
        )
        if self.remarks:
            text["", self.remark_title] = pd.Series(self.remarks)
            best["", self.remark_title] = False
        return text.rename_axis(None).fillna(""), best

    def csv(self) -> str:
        """Long form, every number in full."""
        empty = [row for row in self.remarks if row not in set(self.cells["row"])]
        cells = pd.concat([self.cells, pd.DataFrame({"row": empty})], ignore_index=True)
        return cells.assign(remark=cells["row"].map(self.remarks)).to_csv(index=False)

    def markdown(self) -> str:
        """Pipe table with a bold best value, below its title and above its caption."""
        text, best = self.grid()
        lines = [["", *map(str.strip, map(" ".join, text.columns))], ["---", *["---:"] * text.shape[1]]]
        marked = text.where(~best, "**" + text + "**").replace("\n", " ", regex=True)
        lines += marked.reset_index().to_numpy().tolist()
        rows = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([f"### {self.title}", "", *rows, "", self.caption, ""])

    def style(self, escape: Callable[[str], str], bold: str) -> Styler:
        """The table for ``to_html`` or ``to_latex`` of pandas, every text escaped and the best in the CSS ``bold``."""
        text, best = self.grid()
        text = text.map(escape).rename(index=escape)
        text.columns = pd.MultiIndex.from_tuples([tuple(map(escape, column)) for column in text.columns])
        return text.style.apply(lambda _: np.where(best, bold, ""), axis=None)

    def latex(self) -> str:
        """``table`` environment with the rules of booktabs."""
        styler = self.style(_tex, "textbf:--rwrap;")
        remark = bool(self.remarks)
        return styler.to_latex(
            hrules=True,
            caption=_tex(f"{self.title}. {self.caption}"),
            label=f"tab:{self.name}",
            column_format="l" + "r" * (styler.data.shape[1] - remark) + "p{6cm}" * remark,
            multicol_align="c",
            position_float="centering",
        )


def head(score: str) -> str:
    """Title of a column, with an arrow to the better side."""
    title, _, larger = SCORES[score]
    return title + ("↑" if larger else "↓")


def _text(cell: Mapping[str, Any]) -> str:
    """A mean, with the spread over seeds where there are several."""
    if pd.isna(cell["mean"]):
        return "n/a"
    digits, spread = SCORES[cell["score"]][1], cell.get("spread")
    return f"{cell['mean']:.{digits}f}" + ("" if pd.isna(spread) else f" ± {spread:.{digits}f}")


def _tex(text: str) -> str:
    """Text with what LaTeX would read as a command escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def difference_text(found: Mapping[str, Any], score: str) -> str:
    """One difference as a cell of a table shows it."""
    title, digits, _ = SCORES[score]
    interval = "" if found["low"] is None else f" [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    noise = f", within noise ({found['noise']})" if found["noise"] else ""
    return f"{title} {found['mean']:+.{digits}f}{interval}{noise}"


# ----------------------------------------------------------------------------------------------------------- captions
def recorded(metadata: Sequence[Mapping[str, Any]], key: str, length: int | None = None) -> list[str]:
    """The different values of a key of some evaluations as text, ``length`` characters at most."""
    return list(dict.fromkeys(str(one[key])[:length] for one in metadata if one.get(key) is not None))


def describe(runs: Runs, names: Sequence[str], protocol: str, rows: pd.DataFrame) -> str:
    """What every caption says: cohort, part, patients, protocol, seeds, scaling, scored slices, weights.

    ``names`` are the runs that a table shows, ``rows`` the scores that its numbers were computed from.
    """
    metadata = [one for name in names for one in runs.metadata[name]]
    cohort, part, seed = (", ".join(recorded(metadata, key)) or "not recorded" for key in ("cohort", "part", "seed"))
    definition = next((m["protocols"][protocol] for m in metadata if protocol in m.get("protocols", {})), "")
    seeds = rows.groupby("run")["seed"].nunique().reindex(names).dropna().astype(int)
    spread = ""
    if seeds.max() > 1:
        fewer = ", ".join(f"{name} {number}" for name, number in seeds[seeds < seeds.max()].items())
        alone = f"; {fewer} alone, their differences being of the seeds that both have" if fewer else ""
        spread = f" ({seeds.max()} seeds, ± is their standard deviation{alone})"
    weights = []
    for name in names:
        hashes = recorded(runs.metadata[name], "sha256", 8)
        more = f" and {len(hashes) - 3} more" if len(hashes) > 3 else ""
        weights += [f"{name} {' '.join(hashes[:3])}{more}"] if hashes else []
    splits = recorded(metadata, "split", 8)
    whole = "the split" if len(splits) < 2 else f"{len(splits)} folds"
    parts = [
        f"Cohort {cohort}, {part} part of {whole} {' '.join(splits) or 'not recorded'}, "
        f"{rows['patient'].nunique()} patients ({rows['study'].nunique()} studies)",
        f"protocol {protocol}" + (f" ({definition.rstrip('.')})" if definition else ""),
    ]
    if protocol in DICE_PROTOCOLS:
        # each fold once, of however many seeds and runs
        folds = {tuple(one["studies"]): one["studies_with_region"] for one in metadata if "studies_with_region" in one}
        parts += [f"studies with {r}: {sum(fold.get(r, 0) for fold in folds.values())}" for r in REGIONS if folds]
    found = {key: ", ".join(recorded(metadata, key)) for key in ("scaling", "scored_slices")}
    settings = [f"{key.replace('_', ' ')} {values}" for key, values in found.items() if values]
    parts += [f"seed {seed}{spread}", *settings, f"SHA-256 of the weights: {'; '.join(weights) or 'not recorded'}"]
    return "; ".join(parts) + "."


def protocol_differences(
    metadata: Sequence[Mapping[str, Any]], patients: int, protocol: Mapping[str, Any]
) -> list[str]:
    """In what evaluations of ``patients`` differ from the protocol of published values, a text for each difference.

    ``protocol`` has ``cohort``, ``studies``, ``fractions``, and ``metadata`` that must be as they are there.
    """
    differences = []
    wanted = round(protocol["fractions"][2] * protocol["studies"])
    if not metadata or not all(protocol["cohort"].lower() in str(one.get("cohort", "")).lower() for one in metadata):
        differences.append(f"the cohort is not {protocol['cohort']}")
    if abs(patients - wanted) > 1:
        differences.append(f"{patients} instead of about {wanted} test patients")
    for key, value in protocol["metadata"].items():
        values = dict.fromkeys(json.dumps(one.get(key)) for one in metadata)
        if list(values) != [json.dumps(value)]:
            differences.append(f"{key.replace('_', ' ')} {', '.join(values) or 'not recorded'} instead of {value}")
    return differences


# ----------------------------------------------------------------------------------------------------------- building
def build_table(
    runs: Runs,
    name: str,
    title: str,
    kind: str,
    rows: Mapping[str, str] | None = None,
    reference: str | None = None,
    protocol: str | None = None,
    region: str = "whole",
    reference_methods: bool = True,
    notes: Mapping[str, str] | None = None,
) -> Table | None:
    """One table of some runs.

    Args:
        name, title: see ``Table``.
        kind: one of ``KINDS``, or ``protocols``: every protocol, region and score that there is, side by side.
        rows: labels of the runs, in order; None takes all runs under their own names.
        reference: run from which differences of the mean over scenarios are taken, in the last column; None or a run
            that is not there takes none.
        protocol: None takes that of the kind, else ``per_slice``.
        region: ``whole``, ``tumor_box``, ``tumor`` or ``healthy``.
        reference_methods: also show the reference methods, and the real contrasts of the downstream task.
        notes: for runs without scores, why; shown in their rows.

    Returns:
        The table; None if no run has such scores.

    Raises:
        StudyError: for an unknown kind.
    """
    refuse_unknown("kind", [kind], [*KINDS, "protocols"])
    protocol, notes = protocol or PROTOCOLS.get(kind, "per_slice"), notes or {}
    labels = dict(rows) if rows is not None else {run: run for run in (*runs.metadata, *notes)}
    frame = runs.frame[runs.frame["run"].isin(labels)]
    if kind == "protocols":
        frame = frame[~frame["protocol"].isin(DICE_PROTOCOLS)]
        measures = frame[MEASURE[1:]].drop_duplicates().itertuples(index=False, name=None)
        columns = [(f"{p}, {r.replace('_', ' ')}", ("all", "all"), (p, r, s)) for p, r, s in measures]
    else:
        scores, blocks = KINDS[kind]["scores"], KINDS[kind]["blocks"]
        frame = frame[(frame["protocol"] == protocol) & (frame["region"] == region) & frame["score"].isin(scores)]
        columns = [(block, place, (protocol, region, s)) for block, place in blocks.items() for s in scores]
    methods = methods_of(frame, labels)
    shown = [run for _, run, method in methods if method == "network"]
    if not shown:
        return None
    cells = []
    for label, run, method in methods if reference_methods else [one for one in methods if one[2] == "network"]:
        for block, place, measure in columns:
            if entry := runs.summary(run, method, *measure).get(place):
                numbers = {key: entry[key] for key in ("mean", "low", "high", "spread", "patients", "studies")}
                cells.append({"row": label, "block": block, "score": measure[2], **numbers})
    table = pd.DataFrame(cells)
    caption = describe(runs, shown, "as named" if kind == "protocols" else protocol, frame)
    if kind == "protocols" and "brasyn" in set(frame["protocol"]):
        scenarios = frame[frame["protocol"] == "brasyn"]["scenario"].nunique()
        caption += f" The brasyn protocols are means over {scenarios} scenarios."
    if kind == "scenarios":  # a row for each, the methods side by side
        table = table.rename(columns={"row": "block", "block": "row"})
        order = list(blocks)
        table = table.sort_values("row", key=lambda column: column.map(order.index), kind="stable")
        return Table(name, title, caption, table, transposed=True)
    remarks = {labels[run]: text for run, text in notes.items() if run in labels and run not in shown}
    remark_title = "remark"
    if reference in shown and len(shown) > 1 and kind in ("contrasts", "scores", "dice", "downstream"):
        remark_title = f"difference from {labels[reference]}"
        for run in shown:
            found = {score: runs.difference(run, reference, protocol, region, score) for score in scores}
            if run != reference:
                remarks[labels[run]] = "; ".join(difference_text(f, s) for s, f in found.items() if f is not None)
    return Table(name, title, caption, table, remarks, remark_title)


def paper_table(name: str, values: Mapping[str, Any], entry: str, differences: Sequence[str]) -> Table:
    """The published ``values`` of one table (``entry``), with the ``differences`` of our protocol from the paper's."""
    one = values["tables"][entry]
    columns = pd.MultiIndex.from_product([one["blocks"], one["scores"]], names=["block", "score"])
    wide = pd.DataFrame.from_dict(one["rows"], orient="index", columns=columns).rename_axis("row")
    cells = wide.stack(["block", "score"]).rename("mean").reset_index()
    how = (
        f"Not to be compared with our numbers digit by digit: {'; '.join(differences)}"
        if differences
        else "Same protocol as ours as far as it is published; another random split of the patients"
    )
    caption = f"As published in {values['source']} ({one['title']}). {how}."
    if "remark" in one:
        caption += f" {one['remark']}"
    cohort, studies = (one.get(key, values["protocol"][key]) for key in ("cohort", "studies"))
    return Table(name, f"Paper ({cohort}, {studies} studies)", caption, cells)


def standard_tables(
    runs: Runs,
    definitions: Mapping[str, Mapping[str, Any]],
    paper_values: str | Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Table]:
    """The tables that a config names, each followed by the paper's where it has one.

    ``definitions`` have for each name the arguments of ``build_table`` and ``paper``, an entry of the JSON file
    ``paper_values``, without which none of the paper is shown.
    """
    published = None if paper_values is None else json.loads(Path(paper_values).read_text())
    tables = []
    for name, definition in definitions.items():
        options = dict(definition)
        entry = options.pop("paper", None)
        table = build_table(runs, name, **options, notes=notes)
        if table is None or (len(options.get("rows") or ()) > 1 and len(table.grid()[0]) < 2):
            continue  # nothing to show, or nothing to compare with
        tables.append(table)
        if published is not None and entry is not None:
            metadata = [one for entries in runs.metadata.values() for one in entries]
            protocol = published["protocol"] | published["tables"][entry]
            differences = protocol_differences(metadata, runs.frame["patient"].nunique(), protocol)
            tables.append(paper_table(f"{name}_paper", published, entry, differences))
    return tables


def write_tables(tables: Sequence[Table], folder: str | Path) -> None:
    """Writes ``<name>.csv``, ``.md`` and ``.tex`` of every table, and all of them in ``tables.md``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for suffix, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            (folder / f"{table.name}.{suffix}").write_text(text)
    (folder / "tables.md").write_text("\n".join(table.markdown() for table in tables))
