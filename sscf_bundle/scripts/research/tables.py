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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..contrasts import CONTRASTS, NUM_CONTRASTS, REGIONS, SCENARIOS, StudyError, scenario_name
from ..evaluation.bootstrap import COLUMNS, MIN_PATIENTS, paired_differences, patient_means, read_scores, summarize

#: Title, digits and whether larger is better.
SCORES = {
    "psnr": ("PSNR", 2, True),
    "ssim": ("SSIM", 4, True),
    "lpips": ("LPIPS", 4, False),
    "nmse": ("NMSE", 4, False),
    "mse": ("MSE", 4, False),
    "dice": ("Dice", 4, True),
    "minutes": ("minutes", 1, False),
}
#: Names of the reference_methods in a table.
REFERENCE_METHODS = {
    "zero_filling": "Zero filling",
    "mean_of_available": "Mean of available",
    "nearest_contrast": "Nearest contrast",
}
#: The same for what the downstream task makes of the real contrasts.
REAL = {"real": "Full contrasts (real)"}
#: What a kind of table shows: scores in order, and for each block of columns the ``group`` and ``of`` of a summary.
KINDS: dict[str, dict[str, Any]] = {
    "contrasts": {"scores": ("psnr", "ssim", "lpips"), "blocks": {name: ("contrast", name) for name in CONTRASTS}},
    "scores": {"scores": ("ssim", "psnr", "lpips"), "blocks": {"all": ("all", "all")}},
    "available": {
        "scores": ("psnr", "ssim", "lpips"),
        "blocks": {f"{n} available": (f"available:{n}", "all") for n in range(1, NUM_CONTRASTS)},
    },
    "scenarios": {
        "scores": ("psnr", "ssim", "lpips"),
        "blocks": {name: (f"scenario:{name}", "all") for name in map(scenario_name, SCENARIOS)},
        "transposed": True,
    },
    "dice": {"scores": ("dice",), "blocks": {name: ("all", name) for name in ("WT", "ET", "TC")}},
    "downstream": {"scores": ("dice",), "blocks": {name: ("all", name) for name in ("WT", "ET", "TC")}},
}
#: Protocol of the kinds that have one alone.
PROTOCOLS = {"dice": "segmentation", "downstream": "downstream"}


# ------------------------------------------------------------------------------------------------------------ reading
class Runs:
    """Scores of some runs over the same studies, and the numbers made of them, each computed once.

    Args:
        frame: ``statistics.COLUMNS`` and ``run``, ``seed``.
        facts: for each run the ``facts`` of its evaluations.
        draws: of every bootstrap over patients.
        min_patients: with fewer, a difference is noise whatever its interval is.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        facts: Mapping[str, Sequence[Mapping[str, Any]]],
        draws: int = 2000,
        min_patients: int = MIN_PATIENTS,
    ) -> None:
        self.frame, self.facts, self.draws, self.min_patients = frame, facts, draws, min_patients
        self._summaries: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Any]]] = {}
        self._differences: dict[tuple[str, ...], dict[str, Any] | None] = {}

    @property
    def names(self) -> list[str]:
        """Names of the runs in their order."""
        return list(self.facts)

    def rows(self, run: str, **measure: str) -> pd.DataFrame:
        """Rows of one run where the columns of ``measure`` (``method``, ``protocol`` and so on) are as given."""
        chosen = self.frame["run"] == run
        for column, value in measure.items():
            chosen &= self.frame[column] == value
        return self.frame[chosen]

    def summary(
        self, run: str, method: str, protocol: str, region: str, score: str
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """``summarize`` of one measure with every value averaged over the seeds, by ``group`` and ``of``.

        An entry has, besides, ``spread`` (standard deviation over the seeds, NaN for a single one) and ``range``
        (largest less smallest of the seeds).
        """
        key = (run, method, protocol, region, score)
        if key not in self._summaries:
            rows = self.rows(run, method=method, protocol=protocol, region=region, score=score)
            entries = (
                {(e["group"], e["of"]): e for e in summarize(average_seeds(rows), self.draws)} if len(rows) else {}
            )
            apart = [{(e["group"], e["of"]): e["mean"] for e in summarize(p, 1)} for _, p in rows.groupby("seed")]
            for place, entry in entries.items():
                means = [seed[place] for seed in apart]
                entry["spread"] = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
                entry["range"] = max(means) - min(means)
            self._summaries[key] = entries
        return self._summaries[key]

    def difference(self, run: str, reference: str, protocol: str, region: str, score: str) -> dict[str, Any] | None:
        """Paired difference of the mean over scenarios between the networks of a run and of the reference.

        Where the two do not have the same seeds, it is of those that both have.

        Returns:
            The entry of ``paired_differences`` for ``all``, with ``noise``: why the difference may be none (too few
            patients, its interval covers 0, or it is not larger than the range of one of the two runs over its seeds),
            empty where it stands out. None if one of the two has no such score.
        """
        key = (run, reference, protocol, region, score)
        if key not in self._differences:
            measure = {"method": "network", "protocol": protocol, "region": region, "score": score}
            ours, theirs = self.rows(run, **measure), self.rows(reference, **measure)
            common = set(ours["seed"]) & set(theirs["seed"])
            ours, theirs = (rows[rows["seed"].isin(common)] for rows in (ours, theirs))
            found = None
            if common:
                entries = paired_differences(average_seeds(ours), average_seeds(theirs), self.draws)
                found = next(dict(e) for e in entries if (e["group"], e["of"]) == ("all", "all"))
                ranges = [self.summary(name, **measure)["all", "all"]["range"] for name in (run, reference)]
                reasons = []
                if found["patients"] < self.min_patients:
                    reasons.append(f"{found['patients']} patients" if found["patients"] > 1 else "a single patient")
                if found["low"] is not None and found["low"] <= 0 <= found["high"]:
                    reasons.append("interval covers 0")
                if abs(found["mean"]) <= max(ranges):
                    reasons.append("inside the seeds' range")
                found["noise"] = " and ".join(reasons)
            self._differences[key] = found
        return self._differences[key]

    def patients(self, run: str, method: str, protocol: str, region: str, score: str) -> pd.Series:
        """Mean over the scenarios of every patient, by the patient's name."""
        rows = self.rows(run, method=method, protocol=protocol, region=region, score=score)
        return patient_means(average_seeds(rows)).set_index("patient")["value"]


def average_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ``statistics.COLUMNS``, every value the mean over the seeds."""
    keys = [column for column in COLUMNS if column != "value"]
    return rows.groupby(keys, as_index=False, sort=False)["value"].mean()


def read_runs(folders: Mapping[str, Any], draws: int = 2000, min_patients: int = MIN_PATIENTS) -> Runs:
    """Reads what evaluations wrote.

    Args:
        folders: for each run its folder with ``scores.csv`` and ``metrics.json``, or a list of folders whose studies
            differ (the folds of a cross-validation), or such a list or folder for each seed: ``{0: [...], 1: [...]}``.
        draws: of every bootstrap over patients.
        min_patients: see ``Runs``.

    Raises:
        StudyError: with one sentence, if a file is missing or is no such table, a study is there twice for one seed, or
            the runs were evaluated on different studies.
    """
    if not folders:
        raise StudyError("There are no runs: give the folder of at least one evaluation.")
    frames, facts = [], {}
    for name, given in folders.items():
        seeds = given if isinstance(given, Mapping) else {0: given}
        facts[str(name)] = []
        for seed, paths in seeds.items():
            paths = [paths] if isinstance(paths, str | Path) else list(paths)
            parts = [_read_scores(Path(path).expanduser()) for path in paths]
            part = pd.concat(parts, ignore_index=True)
            keys = [column for column in COLUMNS if column != "value"]
            # the reference_methods of a downstream evaluation and of an image evaluation differ in their protocol
            twice = part[part.duplicated(keys)]
            if len(twice):
                raise StudyError(
                    f"{name} has the study {twice['study'].iloc[0]} twice for seed {seed}: give every fold once."
                )
            frames.append(part.assign(run=str(name), seed=seed))
            facts[str(name)] += [f for path in paths if (f := _read_facts(Path(path).expanduser()))]
    frame = pd.concat(frames, ignore_index=True)
    # a task may need more of a study than another one (all contrasts, a mask), so by protocol
    for protocol, rows in frame.groupby("protocol", sort=False):
        tested = rows.groupby(["run", "seed"], sort=False)["study"].agg(frozenset)
        for (name, seed), studies in tested.items():
            if studies != tested.iloc[0]:
                other = sorted(studies ^ tested.iloc[0])[0]
                raise StudyError(
                    f"{name} (seed {seed}) and {tested.index[0][0]} were evaluated on different studies ({other} is in "
                    f"one alone, protocol {protocol}): evaluate both on one split."
                )
    return Runs(frame, facts, draws, min_patients)


def _read_scores(folder: Path) -> pd.DataFrame:
    """Rows of one evaluation, of images or of the downstream task."""
    path = next((p for p in (folder / "scores.csv", folder / "downstream.csv") if p.is_file()), None)
    if path is None:
        raise StudyError(f"There is no scores.csv in {folder}: evaluate this run first, or correct its folder.")
    try:
        return read_scores(path)[list(COLUMNS)]
    except StudyError:
        raise
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} cannot be read as a table ({error}): evaluate this run again.") from error


def _read_facts(folder: Path) -> dict[str, Any]:
    """Facts of one evaluation, empty where it has none."""
    path = next((p for p in (folder / "metrics.json", folder / "downstream.json") if p.is_file()), None)
    return {} if path is None else json.loads(path.read_text()).get("facts", {})


# ------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        name: stem of its files.
        title: a few words.
        caption: cohort, part, patients, protocol, seeds and weights.
        cells: long form with ``row``, ``block``, ``score``, ``mean`` and, where they were computed, ``low``, ``high``
            (95% interval over patients), ``spread`` (standard deviation over seeds) and ``patients``.
        remarks: text for some rows, shown in a last column of that title.
        remark_title: title of that column.
        transposed: the methods are the blocks; the best is then that of a row, among the columns of one score.
    """

    name: str
    title: str
    caption: str
    cells: pd.DataFrame
    remarks: Mapping[str, str] = field(default_factory=dict)
    remark_title: str = "remark"
    transposed: bool = False

    def grid(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Texts, and whether each is the best of its column; columns are (block, score)."""
        cells = self.cells
        columns = pd.MultiIndex.from_frame(cells[["block", "score"]].drop_duplicates(), names=[None, None])
        rows = pd.Index(list(dict.fromkeys([*cells["row"], *self.remarks])))
        value = cells.pivot(index="row", columns=["block", "score"], values="mean").reindex(index=rows, columns=columns)
        texts = cells.assign(text=[_text(cell) for cell in cells.to_dict("records")])
        text = texts.pivot(index="row", columns=["block", "score"], values="text").reindex(index=rows, columns=columns)
        best = pd.DataFrame(False, index=rows, columns=columns)
        value[value.index.isin(REAL.values())] = np.nan  # a bound, no method
        for score in dict.fromkeys(columns.get_level_values(1)):
            same = [column for column in columns if column[1] == score]
            for group in [same] if self.transposed else [[column] for column in same]:
                one, axis = value[group], 1 if self.transposed else 0
                if one.shape[axis] > 1:
                    best[group] = one.eq(one.max(axis=axis) if SCORES[score][2] else one.min(axis=axis), axis=1 - axis)
        if self.remarks:
            text["", self.remark_title] = pd.Series(self.remarks).reindex(rows)
            best["", self.remark_title] = False
        return text.fillna(""), best

    def csv(self) -> str:
        """Long form, every number in full."""
        cells = self.cells.assign(remark=self.cells["row"].map(self.remarks).fillna(""))
        bare = pd.DataFrame([{"row": r, "remark": t} for r, t in self.remarks.items() if r not in set(cells["row"])])
        return pd.concat([cells, bare], ignore_index=True).to_csv(index=False)

    def markdown(self) -> str:
        """Pipe table with a bold best value, below its title and above its caption."""
        text, best = self.grid()
        heads = [f"{'' if block == 'all' else block} {head(score)}".strip() for block, score in text.columns]
        lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
        for row in text.index:
            marked = [f"**{t}**" if b and t else t for t, b in zip(text.loc[row], best.loc[row], strict=True)]
            lines.append(f"| {row} | " + " | ".join(marked).replace("\n", " ") + " |")
        return f"### {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.caption}\n"

    def latex(self) -> str:
        """``table`` environment with the rules of booktabs."""
        text, best = self.grid()
        text.columns = best.columns = pd.MultiIndex.from_tuples(
            [("" if b == "all" else _tex(b), _tex(head(s))) for b, s in text.columns]
        )
        text.index = best.index = pd.Index([_tex(str(row)) for row in text.index])
        styler = text.map(_tex).style.apply(lambda _: best.replace({True: "textbf:--rwrap;", False: ""}), axis=None)
        return styler.to_latex(
            hrules=True,
            caption=_tex(f"{self.title}. {self.caption}"),
            label=f"tab:{self.name}",
            column_format="l" + "r" * (text.shape[1] - bool(self.remarks)) + "p{6cm}" * bool(self.remarks),
            multicol_align="c",
            position_float="centering",
        )


def head(score: str) -> str:
    """Title of a column, with an arrow to the better side."""
    title, _, larger = SCORES.get(score, (score, 0, None))
    return title + ("" if larger is None else "↑" if larger else "↓")


def _text(cell: Mapping[str, Any]) -> str:
    """A mean, with the spread over seeds where there are several."""
    if cell["mean"] != cell["mean"]:
        return "n/a"
    digits = SCORES[cell["score"]][1]
    spread = cell.get("spread", float("nan"))
    return f"{cell['mean']:.{digits}f}" + ("" if spread != spread else f" ± {spread:.{digits}f}")


def _tex(text: str) -> str:
    """Text with what LaTeX would read as a command escaped."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "±": r"$\pm$",
    }
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def difference_text(found: Mapping[str, Any], score: str) -> str:
    """One difference as a cell of a table shows it."""
    title, digits, _ = SCORES[score]
    interval = "" if found["low"] is None else f" [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    noise = f", within noise ({found['noise']})" if found["noise"] else ""
    return f"{title} {found['mean']:+.{digits}f}{interval}{noise}"


# ----------------------------------------------------------------------------------------------------------- captions
def describe(runs: Runs, names: Sequence[str], protocol: str, rows: pd.DataFrame) -> str:
    """What every caption says: cohort, part, patients, protocol, seeds, weights.

    Args:
        runs: scores.
        names: of the runs that a table shows.
        protocol: of its numbers; its definition is taken from the facts.
        rows: that its numbers were computed from.
    """
    facts = [fact for name in names for fact in runs.facts[name]]

    def told(key: str) -> str:
        return ", ".join(dict.fromkeys(str(fact[key]) for fact in facts if fact.get(key) is not None)) or "not recorded"

    definition = next((f["protocols"][protocol] for f in facts if protocol in f.get("protocols", {})), "")
    numbers = rows.groupby("run")["seed"].nunique()
    number = int(numbers.max())
    counted = f" ({number} seeds, ± is their standard deviation)" if number > 1 else ""
    if number > 1 and numbers.min() < number:
        fewer = ", ".join(f"{name} {numbers[name]}" for name in names if 0 < numbers.get(name, 0) < number)
        counted = (
            f" ({number} seeds, ± is their standard deviation; {fewer} alone, their differences being of the seeds "
            "that both have)"
        )
    weights = []
    for name in names:
        hashes = list(dict.fromkeys(str(f["sha256"])[:8] for f in runs.facts[name] if f.get("sha256")))
        if hashes:
            more = f" and {len(hashes) - 3} more" if len(hashes) > 3 else ""
            weights.append(f"{name} {' '.join(hashes[:3])}{more}")
    splits = list(dict.fromkeys(str(fact["split"])[:8] for fact in facts if fact.get("split")))
    regions = []
    if protocol in PROTOCOLS.values():
        # each fold once, of however many seeds and runs
        folds = {tuple(f["studies"]): f["studies_with_region"] for f in facts if "studies_with_region" in f}
        found = {name: sum(fold.get(name, 0) for fold in folds.values()) for name in REGIONS} if folds else {}
        regions = [f"studies with {name}: {number}" for name, number in found.items()]
    whole = "the split" if len(splits) < 2 else f"{len(splits)} folds"
    parts = [
        f"Cohort {told('cohort')}, {told('part')} part of {whole} {' '.join(splits) or 'not recorded'}, "
        f"{rows['patient'].nunique()} patients ({rows['study'].nunique()} studies)",
        f"protocol {protocol}" + (f" ({definition.rstrip('.')})" if definition else ""),
        *regions,
        f"seed {told('seed')}{counted}",
        f"SHA-256 of the weights: {'; '.join(weights) or 'not recorded'}",
    ]
    return "; ".join(parts) + "."


def protocol_differences(facts: Sequence[Mapping[str, Any]], patients: int, protocol: Mapping[str, Any]) -> list[str]:
    """In what an evaluation differs from the protocol of published values.

    Args:
        facts: of the evaluations, all runs, folds and seeds.
        patients: evaluated.
        protocol: ``cohort``, ``studies``, ``fractions``, and ``facts`` that must be as they are there.

    Returns:
        One text for each difference; with none, only the random split is another.
    """
    differences = []
    wanted = round(protocol["fractions"][2] * protocol["studies"])
    if not facts or not all(protocol["cohort"].lower() in str(f.get("cohort", "")).lower() for f in facts):
        differences.append(f"the cohort is not {protocol['cohort']}")
    if abs(patients - wanted) > 1:
        differences.append(f"{patients} instead of about {wanted} test patients")
    for key, value in protocol["facts"].items():
        values = dict.fromkeys(json.dumps(f.get(key)) for f in facts)
        if set(values) != {json.dumps(value)}:
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
        runs: scores.
        name: stem of its files.
        title: a few words.
        kind: one of ``KINDS``, or ``protocols``: every protocol, region and score that there is, side by side.
        rows: labels of the runs, in order; None takes all runs under their own names.
        reference: run from which differences of the mean over scenarios are taken, in the last column; None or a run
            that is not there takes none.
        protocol: None takes that of the kind, else ``per_slice``.
        region: ``whole``, ``tumor_box``, ``tumor`` or ``healthy``.
        reference_methods: also show the reference_methods, and the real contrasts of the downstream task.
        notes: for runs without scores, why; shown in their rows.

    Returns:
        The table; None if no run has such scores.

    Raises:
        StudyError: for an unknown kind.
    """
    if kind not in {*KINDS, "protocols"}:
        raise StudyError(f"There is no kind of table {kind}: write one of {', '.join(KINDS)} or protocols.")
    protocol = protocol or PROTOCOLS.get(kind, "per_slice")
    labels = {run: run for run in (*runs.names, *(notes or {}))} if rows is None else dict(rows)
    frame = runs.frame[runs.frame["run"].isin(labels)]
    if kind == "protocols":
        frame = frame[~frame["protocol"].isin(PROTOCOLS.values())]
    else:
        frame = frame[(frame["protocol"] == protocol) & (frame["region"] == region)]
        frame = frame[frame["score"].isin(KINDS[kind]["scores"])]
    there = set(frame["run"])
    shown = [run for run in labels if run in there]
    if not shown:
        return None
    entries = [(labels[run], run, "network") for run in shown]
    if reference_methods:
        # those of the data, the same for every run
        methods = set(frame[frame["run"] == shown[0]]["method"])
        entries = [
            (label, shown[0], method) for method, label in REFERENCE_METHODS.items() if method in methods
        ] + entries
        entries += [(label, shown[0], method) for method, label in REAL.items() if method in methods]
    if kind == "protocols":
        measures = frame[["protocol", "region", "score"]].drop_duplicates().itertuples(index=False)
        columns = [(f"{c}, {r.replace('_', ' ')}", ("all", "all"), (c, r, s)) for c, r, s in measures]
    else:
        columns = [
            (block, place, (protocol, region, score))
            for block, place in KINDS[kind]["blocks"].items()
            for score in KINDS[kind]["scores"]
        ]
    cells = []
    for label, run, method in entries:
        for block, place, measure in columns:
            entry = runs.summary(run, method, *measure).get(place)
            if entry is not None:
                numbers = {key: entry[key] for key in ("mean", "low", "high", "spread", "patients", "studies")}
                cells.append({"row": label, "block": block, "score": measure[2], **numbers})
    table = pd.DataFrame(cells)
    remarks = {labels[run]: text for run, text in (notes or {}).items() if run in labels and run not in shown}
    remark_title = "remark"
    if reference in shown and len(shown) > 1 and kind in ("contrasts", "scores", "dice", "downstream"):
        remark_title = f"difference from {labels[reference]}"
        for run in shown:
            found = {s: runs.difference(run, reference, protocol, region, s) for s in KINDS[kind]["scores"]}
            if run != reference:
                remarks[labels[run]] = "; ".join(difference_text(f, s) for s, f in found.items() if f is not None)
    caption = describe(runs, shown, "as named" if kind == "protocols" else protocol, frame)
    if kind == "protocols" and "brasyn" in set(frame["protocol"]):
        scenarios = frame[frame["protocol"] == "brasyn"]["scenario"].nunique()
        caption += f" The brasyn protocols are means over {scenarios} scenarios."
    transposed = KINDS.get(kind, {}).get("transposed", False)
    if transposed:
        order = {block: i for i, block in enumerate(KINDS[kind]["blocks"])}
        table = table.rename(columns={"row": "block", "block": "row"})
        table = table.sort_values("row", key=lambda column: column.map(order), kind="stable")
        remarks = {}
    return Table(name, title, caption, table, remarks, remark_title, transposed)


def paper_table(name: str, values: Mapping[str, Any], entry: str, differences: Sequence[str]) -> Table:
    """The published values of one table.

    Args:
        name: stem of its files.
        values: content of ``paper_values.json``.
        entry: key of its ``tables``.
        differences: of our protocol from that of the paper, see ``protocol_differences``.
    """
    one = values["tables"][entry]
    columns = [(block, score) for block in one["blocks"] for score in one["scores"]]
    cells = [
        {"row": row, "block": block, "score": score, "mean": mean}
        for row, means in one["rows"].items()
        for (block, score), mean in zip(columns, means, strict=True)
    ]
    how = (
        f"Not to be compared with our numbers digit by digit: {'; '.join(differences)}"
        if differences
        else "Same protocol as ours as far as it is told; another random split of the patients"
    )
    caption = f"As published in {values['source']} ({one['title']}). {how}."
    if "remark" in one:
        caption += f" {one['remark']}"
    cohort, studies = (one.get(key, values["protocol"][key]) for key in ("cohort", "studies"))
    return Table(name, f"Paper ({cohort}, {studies} studies)", caption, pd.DataFrame(cells))


def standard_tables(
    runs: Runs,
    definitions: Mapping[str, Mapping[str, Any]],
    paper_values: str | Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Table]:
    """The tables that a config names, each followed by the paper's where it has one.

    Args:
        runs: scores.
        definitions: for each name the arguments of ``build_table`` and ``paper``, an entry of ``paper_values``.
        paper_values: JSON file; None shows none.
        notes: see ``build_table``.
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
            facts = [fact for facts in runs.facts.values() for fact in facts]
            protocol = published["protocol"] | published["tables"][entry]
            patients = runs.frame["patient"].nunique()
            differences = protocol_differences(facts, patients, protocol)
            tables.append(paper_table(f"{name}_paper", published, entry, differences))
    return tables


def write_tables(tables: Sequence[Table], folder: str | Path) -> None:
    """Writes ``<name>.csv``, ``.md`` and ``.tex`` of every table, and all of them in ``tables.md``.

    Args:
        tables: at least one.
        folder: made if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for suffix, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            (folder / f"{table.name}.{suffix}").write_text(text)
    (folder / "tables.md").write_text("\n".join(table.markdown() for table in tables))
