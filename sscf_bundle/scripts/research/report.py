# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""One static HTML page of several runs: facts, tables, differences, single patients, panels; all embedded."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..contrasts import StudyError
from ..evaluation.bootstrap import MIN_PATIENTS
from .figures import difference_plot, patient_plot, runs_panel
from .tables import REFERENCE_METHODS, SCORES, Runs, Table, head, read_runs, standard_tables, write_tables

#: Caption of ``runs_panel``.
PANEL_CAPTION = (
    "The slice with the largest tumor, one contrast missing in each pair of rows; red: box of the annotated tumor. "
    "Below: absolute errors, from 0 (black) to half of the scale."
)
#: What the page says of every protocol that the facts do not define.
LEGEND = {
    "mean over scenarios": "a value for each study and target contrast, the mean over studies, then over the targets "
    "of a scenario, then over the 14 scenarios (or those named)",
    "interval": "95% of bootstrap draws of the patients, all studies of a patient together",
    "within noise": f"fewer than {MIN_PATIENTS} patients, or the interval of the paired difference covers 0, or the "
    "difference is not larger than the range of one of the two runs over its seeds",
    "PSNR, SSIM, Dice": "larger is better; LPIPS, NMSE and MSE: smaller is better. Numbers of different protocols "
    "cannot be compared with each other",
    "WT, TC, ET": "whole tumor, tumor core (enhancing and non-enhancing), enhancing tumor",
}


def write_report(
    runs: Mapping[str, Any],
    directory: str | Path,
    tables: Mapping[str, Mapping[str, Any]],
    paper_values: str | Path | None = None,
    reference: str | None = None,
    panels: Mapping[str, Mapping[str, Any]] | None = None,
    panel_study: str | None = None,
    draws: int = 2000,
) -> None:
    """Writes ``tables`` and ``index.html`` of some evaluations.

    Args:
        runs: folders of the evaluations by name, see ``read_runs``.
        directory: where to write.
        tables: see ``standard_tables``; ``reference`` is put in where a definition has none.
        paper_values: JSON file; None shows nothing of the paper.
        reference: run from which differences are taken; None takes the first.
        panels: networks to show side by side, see ``runs_panel``; None shows none.
        panel_study: study of the panel; None takes the first one.
        draws: of the bootstrap over patients.

    Raises:
        StudyError: if an evaluation cannot be read or the runs cannot be compared.
    """
    read = read_runs(runs, draws)
    reference = read.names[0] if reference is None else reference
    if reference not in read.names:
        raise StudyError(f"The reference {reference} is no run: write one of {', '.join(read.names)}.")
    definitions = {name: {"reference": reference} | dict(one) for name, one in tables.items()}
    built = standard_tables(read, definitions, paper_values)
    figures = {}
    if panels:
        figures[PANEL_CAPTION] = runs_panel(panels, panel_study)
    directory = Path(directory)
    write_tables(built, directory / "tables")
    write_page(read, built, directory / "index.html", reference, figures)
    print(f"wrote {directory / 'index.html'} and {len(built)} tables")


def write_page(
    runs: Runs,
    tables: Sequence[Table],
    path: str | Path,
    reference: str | None = None,
    panels: Mapping[str, Figure] | None = None,
    title: str = "Synthesis of missing contrasts",
) -> None:
    """Writes the page, complete or not at all; it needs no other file and no network.

    Args:
        runs: scores and facts.
        tables: in order.
        path: of the page.
        reference: run from which differences are drawn; None draws none.
        panels: figures by their captions.
        title: heading.
    """
    sections: dict[str, dict[str, str]] = {"Paired differences": {}, "Single patients": {}, "Panels": {}}
    for measure, labels in _plotted(runs).items():
        protocol, region, score = measure
        what = f"{SCORES[score][0]} ({protocol}, {region.replace('_', ' ')})"
        networks = [run for run, method in labels.values() if method == "network"]
        if reference in networks and len(networks) > 1:
            found = {name: runs.difference(name, reference, *measure) for name in networks if name != reference}
            rows = {name: tuple(f[key] for key in ("mean", "low", "high")) for name, f in found.items()}
            figure = difference_plot(rows, f"{what}, difference from {reference}")
            caption = f"{what}: mean difference from {reference} on the same patients, with its 95% interval."
            sections["Paired differences"][caption] = encode(figure)
        values = {label: runs.patients(*column, *measure).tolist() for label, column in labels.items()}
        caption = f"{what}: a point is the mean over the scenarios of one patient; box: quartiles."
        sections["Single patients"][caption] = encode(patient_plot(values, what))
    for caption, figure in (panels or {}).items():
        sections["Panels"][caption] = encode(figure, facecolor="black")
    facts, keys = _facts(runs)
    folder = Path(__file__).resolve().parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    definitions = {
        k: v for facts in runs.facts.values() for fact in facts for k, v in fact.get("protocols", {}).items()
    }
    text = environment.get_template("report.html.j2").render(
        title=title,
        purpose="Research figures. Synthetic contrasts are estimates and not for diagnosis.",
        facts=facts,
        fact_keys=keys,
        tables=[_html(table) for table in tables],
        sections=sections,
        legend=definitions | LEGEND,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def encode(figure: Figure, **options: Any) -> str:
    """A figure as base64 of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _plotted(runs: Runs) -> dict[tuple[str, str, str], dict[str, tuple[str, str]]]:
    """What is drawn: for a protocol, region and score the (run, method) of every column by its label."""
    found: dict[tuple[str, str, str], dict[str, tuple[str, str]]] = {}
    there = runs.frame[["protocol", "region", "score", "run", "method"]].drop_duplicates()
    for key in (
        ("per_slice", "whole", "psnr"),
        ("per_slice", "whole", "lpips"),
        ("per_slice", "tumor", "psnr"),
        ("volume", "whole", "psnr"),
        ("segmentation", "whole", "dice"),
    ):
        rows = there[(there[["protocol", "region", "score"]] == key).all(axis=1)]
        labels = {}
        if len(rows):
            first = rows["run"].iloc[0]
            methods = set(rows[rows["run"] == first]["method"])
            labels |= {label: (first, method) for method, label in REFERENCE_METHODS.items() if method in methods}
            labels |= {run: (run, "network") for run in rows[rows["method"] == "network"]["run"]}
            found[key] = labels
    return found


def _facts(runs: Runs) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Short facts of every run, and their names."""
    facts: dict[str, dict[str, str]] = {}
    hashes = {"sha256", "lpips_sha256", "split"}
    for name in runs.names:
        values: dict[str, dict[str, None]] = {}
        for fact in runs.facts[name]:
            for key, value in fact.items():
                if isinstance(value, str | int | float):
                    values.setdefault(key, {})[str(value)[:16] if key in hashes else str(value)] = None
        facts[name] = {key: ", ".join(texts) for key, texts in values.items()}
    keys = list(dict.fromkeys(key for values in facts.values() for key in values))
    return {name: {key: values.get(key, "") for key in keys} for name, values in facts.items()}, keys


def _html(table: Table) -> dict[str, Any]:
    """What the template shows of a table."""
    text, best = table.grid()
    remark = [score not in SCORES for _, score in text.columns]
    return {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "blocks": [("" if b == "all" else b, len(list(g))) for b, g in groupby(block for block, _ in text.columns)],
        "scores": [head(score) for _, score in text.columns],
        "rows": [(row, list(zip(text.loc[row], best.loc[row], remark, strict=True))) for row in text.index],
    }
