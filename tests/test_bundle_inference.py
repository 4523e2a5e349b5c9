# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Inference through the bundle: configs, metadata, export and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import bundle_workflow, run_bundle, run_python
from conftest import BUNDLE_ROOT, REPOSITORY
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.transforms import Compose
from studies import PREPROCESSING, TINY, load, write_study

from scripts.contrasts import CONTRASTS, TUMOR_CLASSES, StudyError
from scripts.inference.synthesize import synthesize_study
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import (
    _compare_with_metadata,
    load_weights,
    network_from_weights,
    read_settings,
    read_state,
    save_weights,
)

CONFIG = BUNDLE_ROOT / "configs" / "inference.json"
META = BUNDLE_ROOT / "configs" / "metadata.json"


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    return tmp_path / "model.pt"


def workflow(**override) -> ConfigWorkflow:
    return bundle_workflow("inference", **{"handlers": [], "page": False, **override})


def test_workflow_properties_and_run(tmp_path, weights):
    for name, keys in (("A1", ["flair", "t1"]), ("B2", ["flair", "t1", "t1ce", "t2"])):
        write_study(tmp_path / "in" / name, keys, name)
    made = workflow(dataset_dir=tmp_path / "in", output_dir=tmp_path / "out", ckpt_path=weights)
    assert made.check_properties() == []
    assert isinstance(made.preprocessing, Compose) and isinstance(made.network_def, SSCFNet)
    made.run()
    made.finalize()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "B2"]
    assert sorted(os.listdir(tmp_path / "out" / "A1")) == [
        "A1_seg.nii.gz",
        "A1_synthesis.json",
        "A1_t1ce_synthetic.nii.gz",
        "A1_t2_synthetic.nii.gz",
    ]
    assert sorted(os.listdir(tmp_path / "out" / "B2")) == ["B2_seg.nii.gz", "B2_synthesis.json"]


def test_worker_processes_pass_failures_on(tmp_path, weights):
    for name in ("A1", "B2", "C3"):
        write_study(tmp_path / "in" / name, ["flair"], name)
    (tmp_path / "in" / "B2" / "B2_flair.nii.gz").write_bytes(b"damaged")
    made = workflow(
        dataset_dir=tmp_path / "in", output_dir=tmp_path / "out", ckpt_path=weights, num_workers=2, num_writers=3,
        sw_batch_size=5,
    )  # fmt: skip
    assert (made.evaluator.num_writers, made.evaluator.inferer.sw_batch_size) == (3, 5)
    with pytest.raises(StudyError, match="1 of 3 studies failed: B2"):
        made.run()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "C3", "failures.json"]


@pytest.mark.parametrize("wrong", ["empty folder", "no input", "no weights", "other weights"])
def test_mistakes_end_with_one_sentence(tmp_path, weights, wrong):
    write_study(tmp_path / "in", ["flair"])
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    override, words = {
        "empty folder": ({"dataset_dir": tmp_path / "empty"}, "No study was found"),
        "no input": ({"dataset_dir": None}, "No input is given"),
        "no weights": ({"ckpt_path": tmp_path / "none.pt"}, "There are no weights"),
        "other weights": ({"ckpt_path": tmp_path / "other.pt"}, "holds no settings"),
    }[wrong]
    made = workflow(
        **{"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "ckpt_path": weights, **override}
    )
    with pytest.raises(StudyError, match=words) as caught:
        made.run()
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_platform_ids(weights):
    """What MONAI Label asks of the config: it sets these ids and instantiates these objects, and never runs it."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser.update({"bundle_root": str(BUNDLE_ROOT), "device": "cpu", "ckpt_path": str(weights)})
    for name in ("network_def", "preprocessing", "inferer", "postprocessing"):
        assert parser.get_parsed_content(name, instantiate=True) is not None
    assert parser.get_parsed_content("displayable_configs") == {"target": "seg"}
    assert callable(parser.get_parsed_content("preprocessing").transforms[0])


# ------------------------------------------------------------------------------------------------------------- metadata
def test_metadata_says_what_the_network_does():
    meta = json.loads(META.read_text())
    inputs = list(meta["network_data_format"]["inputs"]["image"]["channel_def"].values())
    outputs = list(meta["network_data_format"]["outputs"]["pred"]["channel_def"].values())
    assert inputs == [*CONTRASTS, *(f"{name} is available" for name in CONTRASTS)]
    assert outputs == [*CONTRASTS, *TUMOR_CLASSES]
    assert meta["version"] in meta["changelog"]


def test_metadata_schema(tmp_path):
    known = (BUNDLE_ROOT / "eval" / "schema.json", *REPOSITORY.parent.glob("shared/schema/meta_schema_*.json"))
    schema = next((path for path in known if path.is_file()), None)
    if schema is None:
        pytest.skip("no schema at hand: put the Model Zoo's meta_schema_20240725.json at sscf_bundle/eval/schema.json")
    verify_metadata(meta_file=str(META), filepath=str(schema))


def test_network_input_and_output(monkeypatch, weights):
    monkeypatch.chdir(BUNDLE_ROOT)
    verify_net_in_out(
        "network_def", meta_file=str(META), config_file=str(CONFIG), device="cpu", n=2, ckpt_path=str(weights)
    )


def test_export_to_torchscript(tmp_path, weights):
    exported = tmp_path / "model.ts"
    ckpt_export(
        "network_def",
        filepath=str(exported),
        ckpt_file=str(weights),
        meta_file=str(META),
        config_file=str(CONFIG),
        ckpt_path=str(weights),
    )
    network = network_from_weights(weights)
    image = torch.rand(2, 8, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(exported)(image), network(image), atol=1e-5, rtol=0)
        # the export alone is enough to build and to preprocess
        torch.testing.assert_close(network_from_weights(exported)(image), network(image), atol=0, rtol=0)
    assert read_settings(exported) == PREPROCESSING


@pytest.mark.slow
def test_monai_loads_every_tensor_from_any_folder(tmp_path, monkeypatch):
    """``monai.bundle.load`` gives the network of the weights, whatever the configs and wherever it is called."""
    bundle = tmp_path / "bundles" / "sscf_bundle"
    for part in ("configs", "scripts"):
        shutil.copytree(BUNDLE_ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    save_weights(bundle / "models" / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    script = (
        "import sys, torch, monai.bundle\n"
        f"network = monai.bundle.load('sscf_bundle', bundle_dir={str(bundle.parent)!r}, workflow_type=sys.argv[1])\n"
        f"saved = torch.load({str(bundle / 'models' / 'model.pt')!r})\n"
        "state = network.state_dict()\n"
        "assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)\n"
    )
    status, printed = run_python(["-c", script, "inference"], tmp_path / "log.txt", tmp_path)
    assert status == 0, printed
    # the config of training builds another network, which is said, not filled with random numbers
    status, printed = run_python(["-c", script, "train"], tmp_path / "log.txt", tmp_path)
    assert status == 1 and "do not fit this network: bank_size is 5, not 300" in printed


def test_weights(tmp_path, caplog):
    network = SSCFNet(**TINY)
    path = tmp_path / "model.pt"
    with pytest.raises(StudyError, match="train first"):
        load_weights(network, path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(StudyError, match="only points to the weights in Git LFS"):
        load_weights(network, path)
    save_weights(path, network)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StudyError, match="cannot be read as weights: it is damaged"):
        load_weights(network, path)
    torch.save({"model": network.state_dict(), "epoch": 3}, path)
    with pytest.raises(StudyError, match="no plain state_dict"):
        load_weights(network, path)
    norm = ("group", {"num_groups": 2})
    for changes in ({"channels": [8, 8, 8, 8, 8]}, {"bank_size": 6}, {"key_size": 2}, {"norm": norm}):
        torch.save(SSCFNet(**{**TINY, **changes}).state_dict(), path)
        with pytest.raises(StudyError, match=f"does not fit .{next(iter(changes))} is") as caught:
            load_weights(network, path)
        assert str(caught.value).count("\n") == 0
    with pytest.raises(RuntimeError, match="norm is "):
        SSCFNet(**TINY).load_state_dict(torch.load(path))
    other = SSCFNet(**TINY)
    torch.save(other.state_dict(), path)
    assert len(load_weights(network, path)) == 64 and "bank" in caplog.text
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_study_is_not_prepared_otherwise_than_those_of_the_training(tmp_path):
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    paths = {**write_study(tmp_path / "in", ["t1"]), "ckpt_path": tmp_path / "model.pt", "output_dir": tmp_path / "out"}
    for name, value in (("spacing", 0.5), ("scaling", "per_slice")):
        with pytest.raises(StudyError, match=rf"does not fit \({name} is .*, not {value!r}"):
            synthesize_study(**paths, **{name: value})
    assert not (tmp_path / "out").exists()
    synthesize_study(**paths, image_size=64)


def test_weights_that_did_not_come_with_the_bundle_are_noted_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("scripts.networks.weights._BUNDLE_ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    for folder in ("models", "elsewhere"):
        save_weights(tmp_path / folder / "model.pt", SSCFNet(**TINY))
    sha256 = hashlib.sha256((tmp_path / "models" / "model.pt").read_bytes()).hexdigest()
    for stated, words in ((sha256, []), ("0" * 64, ["is not what came with version 7: trained here, or changed."])):
        (tmp_path / "configs" / "metadata.json").write_text(json.dumps({"version": "7", "weights_sha256": stated}))
        _compare_with_metadata.cache_clear()
        caplog.clear()
        for folder in ("models", "models", "elsewhere"):
            assert read_state(tmp_path / folder / "model.pt")[2]
        assert [record.message.partition("model.pt ")[2] for record in caplog.records] == words


def test_metadata_names_the_weights_of_the_bundle():
    path = BUNDLE_ROOT / "models" / "model.pt"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(path)], cwd=REPOSITORY).returncode
    if changed or not path.is_file():
        pytest.skip("models/model.pt is not the file in the repository")
    assert json.loads(META.read_text())["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_changed_byte_and_numbers_that_are_none_are_found(tmp_path):
    network = SSCFNet(**TINY)
    path = tmp_path / "model.pt"
    save_weights(path, network, {"preprocessing": PREPROCESSING})
    content = bytearray(path.read_bytes())
    weight = max(network.parameters(), key=torch.Tensor.numel)
    content[content.index(weight.detach().numpy().tobytes()) + 7] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(StudyError, match="checksums do not fit"):
        load_weights(network, path)
    network.bank_key[0, 0] = float("nan")
    save_weights(path, network, {"preprocessing": PREPROCESSING})
    with pytest.raises(StudyError, match="NaN or infinite"):
        load_weights(network, path)


def test_weights_without_settings_are_refused(tmp_path):
    network = SSCFNet(**TINY)
    torch.save(
        {name: value for name, value in network.state_dict().items() if name != "settings"}, tmp_path / "model.pt"
    )
    with pytest.raises(StudyError, match=r"holds no settings, .* train anew"):
        read_settings(tmp_path / "model.pt")


# --------------------------------------------------------------------------------------------------------- command line
def test_command_for_a_folder_from_the_repository(tmp_path, weights):
    for name in ("A1", "B2"):
        write_study(tmp_path / "in" / name, ["t1", "t2"], name)
    (tmp_path / "in" / "B2" / "B2_t1.nii.gz").write_bytes(b"damaged")
    settings = {"bundle_root": BUNDLE_ROOT.name, "ckpt_path": weights}
    settings |= {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out"}
    config = str(CONFIG.relative_to(REPOSITORY))
    status, printed = run_bundle("inference", [config], settings, tmp_path / "log.txt", REPOSITORY)
    assert status == 1 and "Traceback" not in printed, printed
    assert printed.strip().splitlines()[-1].startswith("1 of 2 studies failed: B2")
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "failures.json", "index.html", "summary.csv"]


def test_command_for_one_study_from_the_bundle(tmp_path, weights):
    paths = write_study(tmp_path / "in", ["flair", "t1ce"])
    settings = {"ckpt_path": weights, "output_dir": tmp_path / "out", **paths}
    status, printed = run_bundle("inference", ["configs/inference.json"], settings, tmp_path / "log.txt")
    assert status == 0, printed
    made = nib.load(tmp_path / "out" / "S1" / "S1_t1_synthetic.nii.gz")
    np.testing.assert_array_equal(made.affine, nib.load(paths["flair"]).affine)
    assert load(tmp_path / "out" / "S1" / "S1_seg.nii.gz").dtype == np.uint8
