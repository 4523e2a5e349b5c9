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
onnxruntime and, if wanted, openvino installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from scripts.networks.export import export_network

from .inference import filled_network, network_case, scenario
from .measure import median_seconds


def backends(path: Path, threads: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """Functions that run an ONNX file, by the name of the backend."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: dict[str, Callable[[torch.Tensor], object]] = {
        "ONNX Runtime": lambda image: session.run(None, {"image": image.numpy()})
    }
    try:
        import openvino
    except ImportError:
        return found
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return found | {"OpenVINO": lambda image: compiled(image.numpy())}


def main() -> None:
    """Prints seconds for a batch, by backend and number of missing contrasts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", default="small")
    parser.add_argument("--bank-size", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-time", type=float, default=10.0, help="seconds for each number")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    network, device = filled_network(torch.device("cpu"), chosen.width, chosen.bank_size), torch.device("cpu")
    with TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "model.onnx"
        with torch.inference_mode(False):
            export_network(network, path)
        exported = backends(path, chosen.threads)
        for missing in (1, 2, 3):
            image = network_case(chosen.batch_size, chosen.image_size, missing, device)
            runs = {"eager": network, "eager, one scenario": network.for_scenario(scenario(missing)), **exported}
            for name, run in runs.items():
                seconds = median_seconds(lambda run=run, image=image: run(image), chosen.min_time, device)
                print(f"{missing} missing, {name}: {seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
