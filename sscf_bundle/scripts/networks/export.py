# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Exports that ``monai.bundle onnx_export`` cannot give: torch.export and ONNX, for any batch and any slice size."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..contrasts import NUM_CONTRASTS, StudyError, scenario_table
from .availability import network_input
from .settings import ConfiguredNetwork

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
#: What an export to ONNX needs beside torch.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Sides of a slice are multiples of this.
_MULTIPLE = 16


def export_network(network: ConfiguredNetwork, filepath: str | Path, tolerance: float = 1e-4) -> None:
    """Writes a network with its bank and its settings, after a check of all scenarios against the network itself.

    A correction in the settings is applied by what is written, see ``ConfiguredNetwork.exported``.

    Args:
        network: in eval mode, on the CPU, in float32.
        filepath: ``.pt2`` for ``torch.export.load``, the settings are in the state; or ``.onnx``, with the input
            ``image``, the output ``pred`` and the settings as JSON in the metadata. Batch and both sides are dynamic.
        tolerance: largest difference that is accepted.

    Raises:
        StudyError: for another suffix, without the packages of ONNX, or if what was exported computes something
            else; no file is left then.
    """
    path = Path(filepath)
    if path.suffix not in (".pt2", ".onnx"):
        raise StudyError(f"{path} has no known suffix: write .pt2 or .onnx, or use monai.bundle ckpt_export for .ts.")
    if path.suffix == ".onnx" and not all(map(find_spec, ONNX_PACKAGES)):
        raise StudyError(f"ONNX needs more packages: pip install {' '.join(ONNX_PACKAGES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp_{path.name}")
    sides = {2: _MULTIPLE * torch.export.Dim("rows", max=64), 3: _MULTIPLE * torch.export.Dim("columns", max=64)}
    example = _example(2, 48, 64)
    network = network.exported()
    logger.info("%s: tracing the network, the first of some steps that take seconds to minutes", path.name)
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=1024), **sides},)
            )
            if path.suffix == ".pt2":
                torch.export.save(program, temporary)
                run: Callable[[torch.Tensor], torch.Tensor] = torch.export.load(temporary).module()
            else:
                logger.info("%s: traced, translating to ONNX", path.name)
                run = _write_onnx(program, example, network, temporary)
            logger.info("%s: exported, comparing with the network", path.name)
            for shape in ((len(scenario_table()), 48, 64), (3, 96, 32)):
                image = _example(*shape)
                difference = float((run(image) - network(image)).abs().max())
                logger.info("%s at %s: largest difference %.1e", path.name, shape, difference)
                if not difference <= tolerance:
                    raise StudyError(
                        f"{path} would differ from the network by {difference:.1e}: export with other versions of "
                        "torch and onnxruntime, or raise the tolerance."
                    )
        temporary.replace(path)
        logger.info("%s: written", path)
    finally:
        temporary.unlink(missing_ok=True)


def _example(batch: int, rows: int, columns: int) -> torch.Tensor:
    """Noise under one scenario after the other: batch x 8 x rows x columns."""
    images = torch.rand((batch, NUM_CONTRASTS, rows, columns), generator=torch.Generator().manual_seed(0)) * 2 - 1
    scenarios = scenario_table()
    return network_input(images, scenarios[torch.arange(batch) % len(scenarios)])


def _write_onnx(
    program: torch.export.ExportedProgram, example: torch.Tensor, network: ConfiguredNetwork, path: Path
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Writes ONNX and returns a function that runs it."""
    import onnxruntime

    table = torch.export.default_decompositions()
    table[_aten.sort.stable] = _sort
    table[_aten.repeat_interleave.self_int] = _repeat
    table[_aten.adaptive_avg_pool2d.default] = _pool
    table[_aten.index_add.default] = _index_add
    exported: Any = torch.onnx.export(
        program.run_decompositions(table), (example,), input_names=["image"], output_names=["pred"], verbose=False
    )
    exported.model.metadata_props["settings"] = json.dumps(network.read_settings())
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


# ------------- operations that ONNX lacks, that torch 2.14 exports for one size only, or that onnxruntime does wrong
def _sort(values: torch.Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Sequence:
    """Stable sort of truth values as integers."""
    size = values.shape[dim]
    place = torch.arange(size, device=values.device)
    order = torch.topk(values * size + place, size, dim=dim, largest=descending, sorted=True).indices
    return values.gather(dim, order), order


def _repeat(values: torch.Tensor, repeats: int, dim: int, output_size: int | None = None) -> torch.Tensor:
    shape = values.shape
    repeated = values.unsqueeze(dim + 1).expand(*shape[: dim + 1], repeats, *shape[dim + 1 :])
    return repeated.flatten(dim, dim + 1)


def _index_add(
    values: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1
) -> torch.Tensor:
    """Sums by a matrix: ScatterND of onnxruntime, on several threads, loses sums of rows with the same index."""
    assert dim == 0 and alpha == 1
    chosen = torch.arange(values.shape[0], device=values.device).unsqueeze(1) == index
    return values + (chosen.to(source.dtype) @ source.flatten(1)).reshape(values.shape)


def _pool(maps: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    rows, columns = (_pooling_matrix(maps, dim, cells) for dim, cells in zip((2, 3), output_size, strict=True))
    return rows @ maps @ columns.t()


def _pooling_matrix(maps: torch.Tensor, dim: int, cells: int) -> torch.Tensor:
    """Means over the intervals of adaptive pooling along one dimension: cells x size."""
    size = maps.shape[dim]
    cell = torch.arange(cells, device=maps.device).unsqueeze(1)
    place = torch.arange(size, device=maps.device)
    inside = (place >= cell * size // cells) & (place < ((cell + 1) * size + cells - 1) // cells)
    return inside.to(maps.dtype) / inside.sum(dim=1, keepdim=True)
