# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the formulation saves: CITIM with its N x N affinities, and a bank of whole feature maps, in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from scripts.contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES
from scripts.networks.blocks import PRESETS
from scripts.networks.citim import CITIM, class_prototypes
from scripts.networks.retrieval import active_pairs

from .inference import filled_network, scenario
from .measure import median_seconds

CLASSES = NUM_TUMOR_CLASSES + 1
#: Largest intermediate tensor of the literal form, in elements.
CHUNK = 2**24


def literal_citim(
    citim: CITIM, feature: torch.Tensor, class_map: torch.Tensor, b: torch.Tensor, entry_map: torch.Tensor
) -> torch.Tensor:
    """Eq. 1-4 as printed, entry by entry and contrast by contrast, in chunks of entries that are few large products.

    Args:
        citim: gives psi, phi and the query.
        feature: B x C x h x w, the fused F^5.
        class_map: B x c' x N, W.
        b: L x K x C x N bottleneck features of the entries.
        entry_map: L x K x c' x N, W_l.

    Returns:
        F_CITIM, B x C x h x w.
    """
    batch, _, n = class_map.shape
    size, k, c, cells = b.shape
    psi = citim.psi.weight
    step = max(1, CHUNK // (batch * k * max(c, cells) * n))
    parts = []
    for start in range(0, size, step):
        chunk, maps = b[start : start + step], entry_map[start : start + step]
        p = torch.matmul(maps.transpose(2, 3), class_map[:, None, None])  # eq. 1: B x l x K x N_l x N
        retrieved = torch.matmul(chunk, p)  # B x l x K x C x N
        normalized = F.layer_norm(retrieved.transpose(3, 4), (c,), eps=citim.eps)  # eq. 2: B x l x K x N x C
        joined = normalized.permute(0, 1, 3, 2, 4).flatten(3)  # B x l x N x (K C)
        parts.append(F.linear(joined, psi, citim.psi.bias))  # eq. 3: F'_l, B x l x N x C
    prime = torch.cat(parts, dim=1)
    if citim.concat:
        out = F.linear(prime.transpose(1, 2).flatten(2), citim.phi.weight.view(c, -1), citim.phi.bias)
    else:
        query = citim.query(feature.flatten(2).transpose(1, 2))  # B x N x C
        scores = torch.einsum("bnc,blnc->bln", query, prime) / c**0.5
        pooled = torch.einsum("bln,blnc->bnc", scores.softmax(dim=1), prime)
        out = F.linear(pooled, citim.phi.weight.view(c, c), citim.phi.bias)  # eq. 4
    return out.transpose(1, 2).reshape(feature.shape)


def citim_against_literal(
    device: str = "cpu",
    width: str | Sequence[int] = "base",
    sizes: Sequence[int] = (10, 100, 300),
    batch: int = 1,
    aggregation: str = "attention",
    image_size: int = 192,
    min_time: float = 0.5,
) -> list[dict[str, Any]]:
    """Time and difference of the factorized CITIM and of the literal one, in float32 without TF32.

    Returns:
        One row for each bank size: ``literal_ms``, ``factorized_ms`` (``CITIM.forward``), ``speedup``, ``fold_ms``
        (``CITIM.fold``: once for a frozen bank, in training once for each step), ``difference`` (largest, as a part of
        the largest literal value).
    """
    where = torch.device(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    c, side = (PRESETS[width] if isinstance(width, str) else tuple(width))[-1], image_size // 16
    n, rows = side * side, []
    for size in sizes:
        torch.manual_seed(0)
        citim = CITIM(2, c, NUM_CONTRASTS, CLASSES, size, aggregation=aggregation).eval().to(where)
        b = torch.randn(size, NUM_CONTRASTS, c, n, device=where)
        entry_map = (2 * torch.randn(size, NUM_CONTRASTS, CLASSES, n, device=where)).softmax(dim=2)
        feature = torch.randn(batch, c, side, side, device=where)
        class_map = (2 * torch.randn(batch, CLASSES, n, device=where)).softmax(dim=1)
        present = torch.ones(size, NUM_CONTRASTS, dtype=torch.bool, device=where)
        allowed = torch.ones(batch, size, dtype=torch.bool, device=where)
        with torch.inference_mode():
            prototype = class_prototypes(b.flatten(0, 1), entry_map.flatten(0, 1), False).unflatten(0, b.shape[:2])
            value, gram = citim.fold(prototype, present)
            ours = citim(feature, class_map, value, gram, allowed)
            theirs = literal_citim(citim, feature, class_map, b, entry_map)

            def literal(citim=citim, inputs=(feature, class_map, b, entry_map)) -> torch.Tensor:
                return literal_citim(citim, *inputs)

            def factorized(citim=citim, inputs=(feature, class_map, value, gram, allowed)) -> torch.Tensor:
                return citim(*inputs)

            def fold(citim=citim, inputs=(prototype, present)) -> tuple[torch.Tensor, torch.Tensor]:
                return citim.fold(*inputs)

            slow, fast, folded = (median_seconds(f, min_time, where) for f in (literal, factorized, fold))
        rows.append(
            {
                "bank_size": size,
                "batch": batch,
                "aggregation": aggregation,
                "literal_ms": 1000 * slow,
                "factorized_ms": 1000 * fast,
                "speedup": slow / fast,
                "fold_ms": 1000 * folded,
                "difference": float((ours - theirs).abs().max() / theirs.abs().max()),
            }
        )
    torch.set_float32_matmul_precision(before)
    return rows


def bank_against_full_maps(
    device: str = "cpu",
    width: str | Sequence[int] = "base",
    bank_size: int = 300,
    batch: int = 1,
    image_size: int = 192,
    min_time: float = 0.5,
) -> list[dict[str, Any]]:
    """Memory of an entry and time of a retrieval, for this bank and for one of whole feature maps in float32.

    The other bank keeps F^1..F^5 of four contrasts, compares whole F^5 maps, and takes AdaIN's statistics from the maps
    that it finds. F^5 of all L entries is held; of F^1..F^4, whose memory would not fit, four entries, since the time
    depends on the maps that are read alone.

    Returns:
        Two rows: ``bank``, ``entry_mb``, ``bank_mb`` (of L entries), ``retrieval_ms`` (entries l* of all pairs of a
        batch with two contrasts missing, and mu and sigma at five scales).
    """
    where = torch.device(device)
    channels = PRESETS[width] if isinstance(width, str) else tuple(width)
    sides = [image_size // 2**j for j in range(5)]
    net = filled_network(where, channels, bank_size)
    target, source, _ = active_pairs(torch.tensor(scenario(2), device=where).expand(batch, -1))
    rows = torch.arange(batch, device=where).unsqueeze(1)

    training = net.new_bank((image_size, image_size))
    kept = {name: buffer for name, buffer in training.named_buffers() if buffer.dim()}
    entry_bytes = sum(buffer[0].numel() * buffer.element_size() for buffer in kept.values())
    full_bytes = 4 * NUM_CONTRASTS * sum(c * side * side for c, side in zip(channels, sides, strict=True))

    bank = net.stored_bank()
    bottleneck = torch.randn(batch, NUM_CONTRASTS, channels[-1], sides[-1], sides[-1], device=where)
    allowed = torch.ones(batch, bank_size, dtype=torch.bool, device=where)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        key = net.retrieval_key([bottleneck] * len(net.channels))
        mean, std, _ = net.retrieve(key, net.all_contrasts, source, bank, allowed, target, source)
        return mean, std

    deepest = torch.randn(bank_size, NUM_CONTRASTS, channels[-1] * sides[-1] ** 2, device=where)
    shallow = [
        torch.randn(4, NUM_CONTRASTS, c, side, side, device=where) for c, side in zip(channels, sides, strict=True)
    ]

    def full_maps() -> list[tuple[torch.Tensor, torch.Tensor]]:
        query = bottleneck.flatten(2).transpose(0, 1)  # K x B x (C N)
        distance = torch.cdist(query, deepest.transpose(0, 1))  # K x B x L
        index = distance.transpose(0, 1)[rows, source].argmin(dim=2)
        return [torch.std_mean(maps[index % 4, target].flatten(3), dim=3, correction=0) for maps in shallow]

    with torch.inference_mode():
        times = [median_seconds(function, min_time, where) for function in (ours, full_maps)]
    return [
        {
            "bank": name,
            "entry_mb": size / 1e6,
            "bank_mb": bank_size * size / 1e6,
            "batch": batch,
            "retrieval_ms": 1000 * seconds,
        }
        for name, size, seconds in zip(
            ("statistics and prototypes", "whole feature maps"), (entry_bytes, full_bytes), times, strict=True
        )
    ]
