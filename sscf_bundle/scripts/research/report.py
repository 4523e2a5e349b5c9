# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""One static HTML report of several runs: metadata, tables, differences, single patients, panels; all embedded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..checked_settings import refuse_unknown
from ..data.datalist import write_whole
from ..evaluation.bootstrap import MEASURE, MIN_PATIENTS
from ..inference.summary import render
from .figures import difference_plot, patient_plot, runs_panel
from .tables import SCORES, Runs, Table, methods_of, read_runs, recorded, standard_tables, write_tables

#: Caption of ``runs_panel``.
PANEL_CAPTION = (
    "The slice with the largest tumor, one contrast missing in each pair of rows; red: box of the annotated tumor. "
    "Below: absolute errors, from 0 (black) to half of the scale."
)
#: Protocol, region and score of the figures.
PLOTTED = (
    ("per_slice", "whole", "psnr"),
    ("per_slice", "whole", "lpips"),
    ("per_slice", "tumor", "psnr"),
    ("volume", "whole", "psnr"),
    ("segmentation", "whole", "dice"),
)
#: What the report says of every protocol that the metadata do not define.
LEGEND = {
    "mean over scenarios": "a value for each study and target contrast, the mean over studies, then over the targets "
    "of a scenario, then over the 14 scenarios (or those named)",
    "interval": "95% of bootstrap samples of the patients, all studies of a patient together",
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
    bootstrap_samples: int = 2000,
    notes: Mapping[str, str] | None = None,
    more_tables: Sequence[Table] = (),
) -> None:
    """Writes ``tables`` and ``index.html`` of some evaluations; the page needs no other file and no network.

    Args:
        runs, bootstrap_samples: see ``read_runs``.
        directory: where to write.
        tables, paper_values: see ``standard_tables``; ``reference`` is put in where a definition has none.
        reference: run from which differences are taken; None takes the first.
        panels: networks to show side by side, see ``runs_panel``; None shows none.
        panel_study: study of the panel; None takes the first one.
        notes: see ``build_table``.
        more_tables: shown last.

    Raises:
        StudyError: if an evaluation cannot be read or the runs cannot be compared.
    """
    read = read_runs(runs, bootstrap_samples)
    names = [*read.metadata, *(notes or {})]
    reference = names[0] if reference is None else reference
    refuse_unknown("reference", [reference], names)
    definitions = {name: {"reference": reference} | dict(one) for name, one in tables.items()}
    built = [*standard_tables(read, definitions, paper_values, notes), *more_tables]
    sections = plots(read, reference)
    if panels:
        sections["Panels"] = {PANEL_CAPTION: encode(runs_panel(panels, panel_study), facecolor="black")}
    directory = Path(directory)
    write_tables(built, directory / "tables")
    styled = [
        table.style(html.escape, "font-weight: bold").set_table_attributes('class="remarks"' if table.remarks else "")
        for table in built
    ]
    everything = [one for entries in read.metadata.values() for one in entries]
    text = render(
        Path(__file__).resolve().parent / "templates" / "report.html.j2",
        title="Synthesis of missing contrasts",
        purpose="Research figures. Synthetic contrasts are estimates and not for diagnosis.",
        metadata=metadata_html(read),
        tables=[(table, style.to_html()) for table, style in zip(built, styled, strict=True)],
        sections=sections,
        legend={k: v for one in everything for k, v in one.get("protocols", {}).items()} | LEGEND,
    )
    write_whole(directory / "index.html", text)
    print(f"wrote {directory / 'index.html'} and {len(built)} tables")


def plots(runs: Runs, reference: str) -> dict[str, dict[str, str]]:
    """For each heading the figures of the scores (see ``encode``) by their captions."""
    differences, patients = {}, {}
    for measure in PLOTTED:
        protocol, region, score = measure
        what = f"{SCORES[score][0]} ({protocol}, {region.replace('_', ' ')})"
        rows = runs.frame[(runs.frame[MEASURE[1:]] == measure).all(axis=1)]
        columns = methods_of(rows, {run: run for run in runs.metadata})
        others = {run: runs.difference(run, reference, *measure) for run, _, method in columns if method == "network"}
        found = {run: one for run, one in others.items() if run != reference and one is not None}
        if found:
            figure = difference_plot(found, f"{what}, difference from {reference}")
            caption = f"{what}: mean difference from {reference} on the same patients, with its 95% interval."
            differences[caption] = encode(figure)
        if columns:
            values = {label: runs.patients(run, method, *measure) for label, run, method in columns}
            caption = f"{what}: a point is the mean over the scenarios of one patient; box: quartiles."
            patients[caption] = encode(patient_plot(values, what))
    return {"Paired differences": differences, "Single patients": patients}


def encode(figure: Figure, **options: Any) -> str:
    """A figure as base64 of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def metadata_html(runs: Runs) -> str:
    """What is recorded of every run in one text or number, as a table."""
    rows: dict[str, dict[str, str]] = {}
    for name, entries in runs.metadata.items():
        keys = dict.fromkeys(k for one in entries for k, value in one.items() if isinstance(value, str | int | float))
        length = dict.fromkeys(("sha256", "lpips_sha256", "split"), 16)
        rows[name] = {k.replace("_", " "): ", ".join(recorded(entries, k, length.get(k))) for k in keys}
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return frame.rename(index=html.escape, columns=html.escape).map(html.escape).style.to_html()
