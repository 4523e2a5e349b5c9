# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One batch on a CPU: the network, its part for one scenario, and its ONNX export in ONNX Runtime and OpenVINO.

Run it as ``python -m benchmarks.backends`` in the root, with ``sscf_bundle`` on ``PYTHONPATH`` and onnx, onnxscript,
onnxruntime and, if wanted, openvino installed. The backends take turns, and what counts is the time of the process on
one thread, so that other programs disturb the ratios little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from scripts.networks.export import export_network

from .inference import filled_network, network_case, scenario


def backends(path: Path) -> dict[str, Callable[[torch.Tensor], object]]:
    """Functions that run an ONNX file, by the name of the backend."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: dict[str, Callable[[torch.Tensor], object]] = {
        "ONNX Runtime": lambda image: session.run(None, {"image": image.numpy()})
    }
    try:
        import openvino
    except ImportError:
        return found
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return found | {"OpenVINO": lambda image: compiled(image.numpy())}


def main() -> None:
    """Prints seconds for a batch, and how many times those of our inference, by missing contrasts and backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", default="small")
    parser.add_argument("--bank-size", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    network, device = filled_network(torch.device("cpu"), chosen.width, chosen.bank_size), torch.device("cpu")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_network(network, path)
        exported = backends(path)
    for missing in (1, 2, 3):
        image = network_case(chosen.batch_size, chosen.image_size, missing, device)
        # inference runs the parts that one scenario needs, an export runs the whole network
        runs = {"one scenario": network.for_scenario(scenario(missing)), "whole network": network, **exported}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(chosen.rounds + 1):
            for name, run in runs.items():
                started = time.process_time()
                with torch.inference_mode():
                    run(image)
                if turn:  # the first one warms up
                    seconds[name].append(time.process_time() - started)
        ours = statistics.median(seconds["one scenario"])
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"{missing} missing, {name}: {median:.3f} s, {median / ours:.2f} of ours", flush=True)


if __name__ == "__main__":
    main()
