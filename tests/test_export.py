# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Exports compute what the network computes, for any scenario, batch and size, with bank and settings inside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import BUNDLE_ROOT, TINY_CHANNELS, config_files, tiny_step
from monai.bundle import ckpt_export, create_workflow

from scripts.contrasts import StudyError, scenario_table
from scripts.data.datalist import find_studies
from scripts.inference.postprocessing import CorrectPredictiond, read_correction
from scripts.inference.synthesize import synthesize_study
from scripts.networks import export as module
from scripts.networks.availability import network_input
from scripts.networks.export import export_network
from scripts.networks.mmgan import MMGANGenerator
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.settings import CORRECTION_KEY, decode_settings
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import network_from_weights, save_weights

#: Settings with a correction, of which one line leaves [-1, 1].
SCENARIOS = {"FLAIR+T2": {"t1": [0.5, 0.2, 1.0]}, "T2": {"flair": [9.0, 0.1, 0.3], "t1ce": [1.5, -0.1, 0.2]}}
CORRECTED = {CORRECTION_KEY: {"patients": 3, "scenarios": SCENARIOS}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a filled bank, of three scales: the other two would add time and no operation."""
    step = tiny_step(filled=6, channels=TINY_CHANNELS[:3])
    step.net.load_bank(step.net.compile_bank(step.bank.entries()))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(path, step.net, {"preprocessing": {"image_size": 48, "spacing": 2.0, "scaling": "brain"}})
    return path


def images(rows: int, columns: int) -> torch.Tensor:
    """All 14 scenarios, of other noise than the export checks."""
    drawn = torch.rand((14, 4, rows, columns), generator=torch.Generator().manual_seed(5)) * 2 - 1
    return network_input(drawn, scenario_table())


def network(weights: Path) -> SSCFNet:
    made = network_from_weights(weights)
    assert isinstance(made, SSCFNet) and bool(made.bank_present.all())
    return made


def run_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])


@pytest.mark.slow
def test_torch_export_by_the_config(weights: Path, tmp_path: Path) -> None:
    create_workflow(
        config_file=config_files("inference", "export"),
        workflow_type="inference",
        logging_file=False,
        ckpt_path=str(weights),
        output_dir=str(tmp_path),
        export_path=str(tmp_path / "model.pt2"),
    ).run()
    program = torch.export.load(tmp_path / "model.pt2")
    made, image = network(weights), images(80, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), made(image), atol=1e-6, rtol=0)
    assert decode_settings(program.state_dict["settings"]) == made.read_settings()
    assert torch.equal(program.state_dict["bank_key"], made.bank_key)


def test_onnx_of_any_size_is_the_network(weights: Path, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    made = network(weights)
    export_network(made, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    # rows that are added to the same one on several threads at once are where onnxruntime was seen to lose sums
    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operations & {"ScatterND", "ScatterElements"}
    for image in (images(32, 80), images(64, 48)[4:9]):
        with torch.no_grad():
            expected = made(image)
        (pred,) = session.run(["pred"], {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(pred), expected, atol=1e-4, rtol=0)
    assert json.loads(session.get_modelmeta().custom_metadata_map["settings"]) == made.read_settings()


def corrected_as_inference_does(path: Path, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        pred = network_from_weights(path)(image)
    items = [{"image": one, "pred": p} for one, p in zip(image[..., None], pred[..., None], strict=True)]
    done = torch.stack([CorrectPredictiond("pred", read_correction(str(path), True))(x)["pred"] for x in items])
    assert (done - pred[..., None]).abs().max() > 0.1
    return done[..., 0].clamp(-1, 1)


def test_missing_packages_of_onnx_are_named_before_the_network_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(StudyError, match="pip install onnx no_such_package"):
        export_network(PlainUNet(2, TINY_CHANNELS).eval(), tmp_path / "new" / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exports_apply_the_correction_of_the_weights_and_tell_each_stage(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the network that is exported in a second: the correction is the same code for all."""
    made, path, image = PlainUNet(2, TINY_CHANNELS).eval(), tmp_path / f"model{suffix}", images(32, 80)
    save_weights(tmp_path / "model.pt", made, CORRECTED)
    caplog.set_level("INFO")
    export_network(made, path)
    run = torch.export.load(path).module() if suffix == ".pt2" else run_onnx(path)
    expected = corrected_as_inference_does(tmp_path / "model.pt", image)
    with torch.no_grad():
        torch.testing.assert_close(run(image), expected, atol=1e-4, rtol=0)
        # where Python runs the network, inference corrects
        assert (made(image) - expected).abs().max() > 0.1
    told = [record.getMessage() for record in caplog.records if record.name == "scripts.networks.export"]
    stages = ["tracing", *["traced, "] * (suffix == ".onnx"), "exported, ", "(14, ", "(3, ", "written"]
    for line, words in zip(told, stages, strict=True):
        assert path.name in line and words in line


def test_torchscript_applies_the_correction_once_and_inference_from_it_too(
    weights: Path, tmp_path: Path, phantom_cohort: Path
) -> None:
    exported, corrected_weights = tmp_path / "model.ts", tmp_path / "corrected.pt"
    save_weights(corrected_weights, network(weights), CORRECTED)
    ckpt_export(
        "network_def",
        filepath=str(exported),
        ckpt_file=str(corrected_weights),
        config_file=config_files("inference"),
        bundle_root=str(BUNDLE_ROOT),
        ckpt_path=str(weights),  # builds the network only: the correction is that of ckpt_file
    )
    image, loaded = images(48, 32), torch.jit.load(exported)
    with torch.no_grad():
        expected = corrected_as_inference_does(corrected_weights, image)
        torch.testing.assert_close(loaded(image), expected, atol=1e-5, rtol=0)
    assert loaded.state_dict().keys() == network(corrected_weights).state_dict().keys()
    item = find_studies(phantom_cohort)[0]
    written = []
    for path in (corrected_weights, exported):
        made = synthesize_study(
            flair=item["flair"], t2=item["t2"], output_dir=tmp_path / path.suffix[1:], ckpt_path=str(path),
            device="cpu", trust=False, checks=False,
        )  # fmt: skip
        written.append(nib.load(made["t1"]).get_fdata())
    np.testing.assert_array_equal(*written)


def test_mmgan_exports_its_correction_too(tmp_path: Path) -> None:
    made, image = MMGANGenerator(2, (4, 4)).eval(), images(32, 48)
    save_weights(tmp_path / "model.pt", made, CORRECTED)
    with torch.no_grad():
        exported = torch.jit.script(made)(image)
    expected = corrected_as_inference_does(tmp_path / "model.pt", image)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=0)


def test_without_a_correction_the_network_itself_is_exported(weights: Path, tmp_path: Path) -> None:
    made = network(weights)
    assert made.exported() is made
    save_weights(tmp_path / "none.pt", made, {CORRECTION_KEY: {"patients": 3, "scenarios": {}}})
    assert made.exported() is made
    nodes = [node.kind() for node in torch.jit.script(made).inlined_graph.nodes()]
    assert nodes[-1] == "aten::cat"


def test_log_of_an_export_is_not_drowned_by_that_of_onnx() -> None:
    script = (
        "import logging, logging.config, sys\n"
        "logging.config.fileConfig(sys.argv[1])\n"
        "names = ('scripts.networks.export', 'onnx_ir.passes.common', 'onnxscript.rewriter')\n"
        "print([logging.getLogger(name).isEnabledFor(logging.INFO) for name in names])"
    )
    command = [sys.executable, "-c", script, str(BUNDLE_ROOT / "configs" / "logging.conf")]
    assert subprocess.check_output(command, text=True).strip() == "[True, False, False]"


def test_export_that_differs_leaves_no_file(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match=r"write \.pt2 or \.onnx"):
        export_network(network(weights), tmp_path / "model.zip")
    made, steps = network(weights), iter((0.0, 1e-3))
    monkeypatch.setattr(module.torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(module.torch.export, "save", lambda _, path: path.write_bytes(b"x"))
    monkeypatch.setattr(module.torch.export, "load", lambda _: type("", (), {"module": lambda _: drifting})())

    def drifting(image: torch.Tensor) -> torch.Tensor:
        return made(image) + next(steps)

    with pytest.raises(StudyError, match="would differ from the network by 1"):
        export_network(made, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_decompositions_for_onnx_are_the_operations() -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (5, 16), generator=draw)
    for descending in (False, True):
        ours, theirs = (f(bits, stable=True, dim=1, descending=descending) for f in (module._sort, torch.sort))
        assert torch.equal(ours[0], theirs[0])
        if not descending:
            assert torch.equal(ours[1], theirs[1])
    values = torch.rand(3, 4, 5, generator=draw)
    assert torch.equal(module._repeat(values, 3, 1), values.repeat_interleave(3, dim=1))
    index, source = torch.tensor([2, 0, 2, 2, 1]), torch.rand(5, 4, 5, generator=draw)
    torch.testing.assert_close(module._index_add(values, 0, index, source), values.index_add(0, index, source))
    for size in ((3, 4), (7, 5), (12, 2)):
        maps = torch.rand(2, 3, *size, generator=draw)
        expected = torch.nn.functional.adaptive_avg_pool2d(maps, [3, 2])
        torch.testing.assert_close(module._pool(maps, [3, 2]), expected, atol=1e-6, rtol=0)
