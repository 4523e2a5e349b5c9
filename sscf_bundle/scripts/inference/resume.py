# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Studies that are finished: their record says from which files, weights and settings they came."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contrasts import CONTRAST_KEYS, FAILURE_KEY, StudyError
from ..networks.weights import find_weights

if TYPE_CHECKING:
    from .writer import StudyWriter

logger = logging.getLogger(__name__)


def unfinished(
    items: Sequence[Mapping[str, Any]], writer: StudyWriter, ckpt_path: str | os.PathLike[str], overwrite: bool = False
) -> list[Mapping[str, Any]]:
    """The studies that are still to be done, for configs.

    A study is done if its record names the same input files by their content, the same weights, settings and version
    of the bundle, and all of its volumes are there. A file of equal size and time counts as unchanged. ``overwrite``
    does all of them. A name that cannot be written is the failure of its study before the network runs.
    """
    items = [_with_failure(item, writer) for item in items]
    if overwrite:
        return items
    weights = hashlib.sha256(find_weights(str(ckpt_path)).read_bytes()).hexdigest()
    same = {"weights_sha256": weights, "settings": writer.settings, **writer.bundle}
    left = [item for item in items if item.get(FAILURE_KEY) or not _is_finished(item, writer, same)]
    if len(left) < len(items):
        logger.info("%d of %d studies are finished and skipped.", len(items) - len(left), len(items))
    return left


def _with_failure(item: Mapping[str, Any], writer: StudyWriter) -> Mapping[str, Any]:
    try:
        writer.files(str(item["study"]))
    except StudyError as error:
        return {FAILURE_KEY: str(error), **item}
    return item


def _is_finished(item: Mapping[str, Any], writer: StudyWriter, same: Mapping[str, Any]) -> bool:
    files = writer.files(str(item["study"]))
    folder = writer.output_dir / files.folder
    record = read_record(folder / files.record)
    if record.get("study") != item["study"] or any(record.get(name) != value for name, value in same.items()):
        return False
    inputs, recorded = {key: item[key] for key in CONTRAST_KEYS if item.get(key)}, record.get("input_files", {})
    try:
        return (
            inputs.keys() == recorded.keys()
            and all((folder / name).is_file() for name in record["outputs"].values())
            and all(_is_unchanged(path, recorded[key]) for key, path in inputs.items())
        )
    except (OSError, ValueError):  # ValueError: a folder that is empty by now
        return False


def _is_unchanged(path: str, recorded: Mapping[str, Any]) -> bool:
    stamp = _stamp(path)
    # another size is another content, without reading it
    return stamp == (recorded["bytes"], recorded["modified"]) or (
        stamp[0] == recorded["bytes"] and describe_file(path)["sha256"] == recorded["sha256"]
    )


def describe_file(path: str) -> dict[str, Any]:
    """What tells the content of a volume from another: ``bytes``, ``modified`` (ns) and ``sha256`` of all its files."""
    size, modified = _stamp(path)
    digest = hashlib.sha256()
    for file in _parts(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"bytes": size, "modified": modified, "sha256": digest.hexdigest()}


def _stamp(path: str) -> tuple[int, int]:
    """Size and latest time of a volume's files."""
    stats = [file.stat() for file in _parts(path)]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _parts(path: str) -> list[Path]:
    """The files of a volume: one, those of a DICOM folder, or those of one name where header and values are apart."""
    volume = Path(path)
    if volume.is_dir():
        return sorted(file for file in volume.iterdir() if file.is_file())
    pair = re.fullmatch(r"(.*\.)(?:nhdr|mhd|hdr|img|img\.gz)", volume.name, re.IGNORECASE | re.DOTALL)
    if pair:
        return sorted(file for file in volume.parent.iterdir() if file.name.startswith(pair[1]))
    return [volume]


def read_record(path: Path) -> dict[str, Any]:
    """The record of a study; empty where there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
