# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""``summary.csv`` and ``index.html`` of a folder of results, from the records of its studies."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from ..contrasts import StudyError
from ..data.datalist import write_whole
from .resume import read_record
from .trust import OVERALL

#: Columns of the table that every study has; what a record says under ``scores`` adds one for each number.
COLUMNS = ("study", "status", "verdict", "reasons", "available", "synthesized", "checks", "seconds", "patient_in_bank")
#: Those of the page, on which pictures must stay in sight: the reasons say what the checks found.
_PAGE = (*(name for name in COLUMNS if name != "checks"), *(f"score {name}" for name in (*OVERALL, "doubt")))


def write_summary(output_dir: str | os.PathLike[str]) -> None:
    """Write ``summary.csv`` and ``index.html``; the page needs the files beside it and no network.

    It reads what is there: all shards of a run, those still running, a run that was killed. A study that failed in the
    last run is shown as failed, whatever an earlier run left.

    Raises:
        StudyError: when there is no such folder.
    """
    root = Path(str(output_dir)).expanduser()
    if not root.is_dir():
        raise StudyError(f"There is no folder {root}: give the output_dir of a run.")
    failures: dict[str, str] = {}
    for path in sorted(root.glob("failures*.json")):
        failures |= {failure["study"]: failure["reason"] for failure in json.loads(path.read_text())}
    rows, runs = [], {}
    for path in sorted(root.rglob("*_synthesis.json")):
        record = read_record(path)
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or "study" not in record or record["study"] in failures:
            continue
        rows.append(_row(record, path, root))
        run = {name: record.get(name) for name in ("bundle", "bundle_version", "weights_sha256", "settings")}
        runs[json.dumps(run, sort_keys=True)] = run
    rows += [{"study": study, "status": "failed", "reasons": reason} for study, reason in failures.items()]
    rows.sort(key=lambda row: row["study"])
    columns = [*COLUMNS, *sorted({name for row in rows for name in row if name.startswith("score ")})]

    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(root / "summary.csv", table.getvalue())
    template = Path(__file__).resolve().parent / "templates" / "index.html.j2"
    page = render(template, rows=rows, columns=_PAGE, runs=list(runs.values()), failed=len(failures))
    write_whole(root / "index.html", page)


def render(template: Path, **content: Any) -> str:
    """A page of HTML from a template of jinja2, every text escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)


def _row(record: Mapping[str, Any], path: Path, root: Path) -> dict[str, Any]:
    """One study for the table."""
    seconds = record.get("seconds")
    row = {
        "study": record["study"],
        "status": "written",
        "verdict": record.get("verdict", ""),
        "reasons": " ".join(record.get("reasons") or []),
        "available": _text(record.get("available")),
        "synthesized": _text(record.get("synthesized")),
        "checks": _text(record.get("checks")),
        "seconds": "" if seconds is None else round(seconds, 1),
        "patient_in_bank": record.get("patient_in_bank", ""),
        "record": quote(path.relative_to(root).as_posix()),
    }
    row |= {f"score {name}": value for name, value in _numbers(record.get("scores") or {})}
    panel = path.with_name(path.name.replace("_synthesis.json", "_panel.png"))
    if panel.is_file():
        row["panel"] = quote(panel.relative_to(root).as_posix())
    return row


def _numbers(scores: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Numbers of nested scores by their names, joined by spaces."""
    found = []
    for name, value in scores.items():
        found += _numbers(value, f"{prefix}{name} ") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return [(name, round(value, 4) if isinstance(value, float) else value) for name, value in found]


def _text(value: Any) -> str:
    """Lists and mappings of a record in one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(one)}" for name, one in value.items() if one not in (None, "", [], {}))
    return "; ".join(map(_text, value)) if isinstance(value, list) else "" if value is None else str(value)
