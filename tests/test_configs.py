# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The configs: they parse alone and as overlays, refer to what exists, and have the values of the paper."""

from __future__ import annotations

import hashlib
import json
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import BUNDLE_ROOT, config_files, tiny_run
from monai.apps.utils import HashCheckError
from monai.bundle import ComponentLocator, ConfigComponent, ConfigParser, ConfigWorkflow, download_large_files
from monai.bundle.reference_resolver import ReferenceResolver

from scripts.networks.weights import PREPROCESSING_SETTINGS

CONFIGS = BUNDLE_ROOT / "configs"
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.json"))
#: Files that are no configs: metadata, numbers of the paper, what MonaiAlgo reads by itself, limits of the checks.
TABLES = {"metadata", "paper_values", "federated_filters", "input_statistics"}
#: Every config with what it is laid over.
RUNS = [
    ["train"],
    ["train", "demo_train"],
    ["train", "evaluate"],
    ["train", "evaluate", "from_weights"],
    ["train", "paper_literal", "evaluate"],
    ["train", "finetune"],
    ["train", "multi_gpu_train"],
    ["train", "federated"],
    ["train", "build_bank"],
    ["train", "calibrate"],
    ["train", "recipe/common", "recipe/1_backbone"],
    ["train", "recipe/common", "recipe/2_whole"],
    ["train", "recipe/common", "recipe/3_full_size"],
    ["train", "diagnosis"],
    ["train", "baselines/unet"],
    ["train", "baselines/mmgan"],
    ["train", "downstream_train"],
    ["train", "evaluate", "downstream"],
    *(["train", name] for name in FILES if name.startswith("ablations/")),
    ["inference"],
    ["inference", "demo"],
    ["inference", "demo_inference"],
    ["inference", "export"],
    ["inference", "inference_trt"],
    ["inference", "dicom"],
    ["inference", "reliability"],
    ["report"],
    ["experiments"],
    ["experiments", "experiments_small"],
    ["experiments", "recipe"],
]
#: What ``monai.bundle run`` is asked for by name.
ENTRY_POINTS = {
    "fitting",
    "imports",
    "initialize",
    "run",
    "finalize",
    "diagnosis",
    "training",
    "evaluating",
    "inference",
    "building",
    "exporting",
    "calibrating",
    "correcting",
    "joining",
    "measuring",
    "measuring_reliability",
    "summarizing",
    "picture",
    "reporting",
    "experimenting",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((BUNDLE_ROOT / "configs" / f"{name}.json").read_text())


def combined(run: list[str]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(config_files(*run))
    parser.parse()
    return parser


def walk(config: Any) -> Iterator[Any]:
    """A config and everything in it."""
    yield config
    children = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for child in children:
        yield from walk(child)


def references(config: Any) -> set[str]:
    """Ids that the texts of a config refer to."""
    texts = [text for text in walk(config) if isinstance(text, str)]
    found = {ref for text in texts for ref in ReferenceResolver.match_refs_pattern(text)}
    return found | {ref for text in texts for ref in re.findall(r"^%(\w[\w#]*)$", text)}


def test_every_config_is_part_of_a_run() -> None:
    assert {name for run in RUNS for name in run} == set(FILES) - TABLES


@pytest.mark.parametrize("run", RUNS, ids="+".join)
def test_config_parses_and_refers_to_what_exists(run: list[str]) -> None:
    parser = combined(run)
    assert references(parser.config)
    missing = [ref for ref in references(parser.config) if ref not in parser]
    assert not missing


@pytest.mark.parametrize("run", [run for run in RUNS if len(run) > 1], ids="+".join)
def test_overlay_changes_only_what_its_base_has_or_its_run_reads(run: list[str]) -> None:
    base, overlay = combined(run[:-1]), read(run[-1])
    used = references(combined(run).config)
    for name in overlay:
        # "a#b#c" replaces c of an existing a#b
        parent = name.rpartition("#")[0]
        read_by_run = any(ref == name or ref.startswith(f"{name}{ReferenceResolver.sep}") for ref in used)
        known = parent in base if parent else name in base or read_by_run or name in ENTRY_POINTS
        assert known, f"{name} of {run[-1]}.json changes nothing"


@pytest.mark.parametrize("name", [name for name in FILES if name not in TABLES])
def test_every_target_exists(name: str) -> None:
    locator = ComponentLocator()
    for part in walk(read(name)):
        if isinstance(part, dict) and "_target_" in part:
            target = ConfigComponent(part, locator=locator).resolve_module_name()
            found = target if callable(target) else pydoc.locate(str(target))
            assert callable(found), part["_target_"]


@pytest.mark.parametrize("name", FILES)
def test_config_holds_no_path_of_a_machine(name: str) -> None:
    texts = [text for text in walk(read(name)) if isinstance(text, str)]
    pattern = r"^(/|~|[A-Za-z]:\\)|/(root|home|Users|mnt|media|tmp|scratch)/"
    found = [text for text in texts if re.search(pattern, text)]
    # the place that the bundles of the Model Zoo take for data
    assert [text for text in found if not text.startswith("/workspace/data/")] == []


def test_training_has_the_values_of_the_paper() -> None:
    config = read("train")
    expected = {
        "alpha": 0.5,
        # beta_3 is 50 in the paper, of a loss that is not relative to the variance of its target
        "beta": [100.0, 30.0, 5.0, 50.0, 1.0],
        "learning_rate": 2e-4,
        "adam_betas": [0.5, 0.999],
        "max_epochs": 600,
        "decay_start": 300,
        "batch_size": 2,
        "accumulation_steps": 1,
        "bank_size": 300,
        "image_size": 192,
        "slice_choice": "largest_tumor",
        "slice_count": 20,
    }
    assert {key: config[key] for key in expected} == expected
    for name in ("optimizer", "discriminator_optimizer"):
        assert config[name]["_target_"] == "torch.optim.Adam" and config[name]["betas"] == "@adam_betas"


def test_training_and_inference_can_be_asked_for_by_name() -> None:
    for name, alias in (("train", "training"), ("inference", "inference")):
        config = read(name)
        assert isinstance(config["run"], list) and config[alias] == "%run"
        parser = combined([name])
        assert parser[alias] == parser["run"]
    assert read("evaluate")["evaluating"] == "%run"


@pytest.mark.parametrize("overlay", [[], ["finetune"], ["recipe/common", "recipe/3_full_size"], ["demo_train"]])
def test_training_leaves_the_weights_that_ship_alone(overlay: list[str]) -> None:
    parser = combined(["train", *overlay])
    parser["output_dir"] = "somewhere"
    written = [parser.get_parsed_content(name) for name in ("ckpt_path", "last_ckpt_path", "ckpt_dir")]
    assert written == ["somewhere/model.pt", "somewhere/model_last.pt", "somewhere/checkpoints"]


@pytest.mark.parametrize("synthesis", [True, False])
def test_loss_of_the_images_needs_images(synthesis: bool) -> None:
    parser = combined(["train", "recipe/common", "recipe/3_full_size"])
    parser["synthesis"] = synthesis
    weights = parser.get_parsed_content("loss").weights
    assert (weights["ssim"] > 0) is synthesis
    assert parser.get_parsed_content("perceptual#_disabled_") is not synthesis


def test_training_writes_the_preprocessing_that_inference_reads() -> None:
    train, inference = read("train"), read("inference")
    arguments = {name: f"@{name}" for name in PREPROCESSING_SETTINGS}
    assert train["settings"] == {"preprocessing": arguments}
    arguments |= {"resample": "@resample"}  # how files become one grid is no matter of the network
    assert train["preprocessing"] == {
        "_target_": "scripts.data.transforms.study_transforms",
        "clip": False,  # what is clipped for the network is scored as it is
        "mask_values": "@mask_values",  # inference reads no mask
        **arguments,
    }
    assert arguments.items() <= inference["preprocessing"].items()
    assert all(inference[name] == f"$@settings['{name}']" for name in PREPROCESSING_SETTINGS)


def test_only_the_first_process_writes_and_shows() -> None:
    train = combined(["train"])
    alone = {
        "StatsHandler",
        "TensorBoardStatsHandler",
        "scripts.evaluation.panels.board",
        "scripts.evaluation.panels.ScenarioPanels",
        "scripts.evaluation.panels.ScoreLog",
        "ignite.handlers.ProgressBar",
    }
    quiet = [part for part in walk(train.config) if isinstance(part, dict) and part.get("_disabled_") == "@quiet"]
    assert {part["_target_"] for part in quiet} == alone
    loud = [part for part in walk(train.config) if isinstance(part, dict) and part not in quiet]
    assert not alone & {part.get("_target_") for part in loud}


def test_workflow_has_the_properties_that_monai_asks_for(tmp_path: Path, phantom_cohort: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=config_files("train"),
        meta_file=str(BUNDLE_ROOT / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        **tiny_run(phantom_cohort, tmp_path),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert workflow.max_epochs == 4 and len(workflow.train_dataset) == 3 * 20
    assert workflow.train_preprocessing is workflow.val_preprocessing is workflow.train_dataset_data.transform
    assert workflow.val_dataset_data is workflow.parser.get_parsed_content("validate#slices")
    assert workflow.val_interval == 2 and workflow.evaluator is workflow.parser.get_parsed_content("validate#evaluator")
    workflow.finalize()


def test_large_files_are_named_as_monai_reads_them(tmp_path: Path) -> None:
    """The entry that the comment of ``large_files.yml`` shows, filled in for a file that is there already."""
    download_large_files(str(BUNDLE_ROOT))
    text = (BUNDLE_ROOT / "large_files.yml").read_text()
    assert text.endswith("large_files: []\n")
    entry = re.sub(r"^.*\n", "", text, count=1).replace("#  ", " ").removesuffix("large_files: []\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_bytes(b"weights")
    for digest, fits in ((hashlib.sha256(b"weights").hexdigest(), True), ("0" * 64, False)):
        filled = entry.replace("what sha256sum says", f"'{digest}'")
        (tmp_path / "large_files.yml").write_text(f"large_files:\n{filled}")
        if fits:
            download_large_files(str(tmp_path))
        else:
            with pytest.raises(HashCheckError):
                download_large_files(str(tmp_path))


def test_overlays_keep_what_the_training_config_guards() -> None:
    for name in ("recipe/2_whole", "recipe/3_full_size", "ablations/two_stage"):
        network = combined(["train", name])["network"]  # channels_last is for every phase
        assert network["_target_"].endswith("in_memory_format") and "with_shared" in network["network"]["_target_"]
    segmenter = combined(["train", "downstream_train"])
    assert {"split", "seed", "preprocessing"} <= set(segmenter["checkpoint#settings"])
    assert "@cohort" in segmenter["train#trainer#train_handlers"]
    assert "UnseenPatients" in combined(["train", "diagnosis"])["validate#handlers"][0]["_target_"]


def test_one_strength_of_the_augmentation_can_be_set_alone() -> None:
    parser = combined(["train"])
    parser["augmentation#gamma"] = 0.2
    augmentation = parser.get_parsed_content("augmentation")
    assert augmentation.gamma == 0.2 and augmentation.rotation == augmentation.flip == 0
