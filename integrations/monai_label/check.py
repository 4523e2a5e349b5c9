# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Makes the environment of MONAI Label and holds what its server answers against what the bundle computes.

``python check.py FOLDER`` makes ``FOLDER/venv`` unless it is there, phantom studies and random weights, whose mask
holds every class (``--shipped`` takes those of the bundle); starts the server on the loopback address; asks for the
mask and a contrast in every way that the README names; stops the server. The exit status is 0 if every answer is right.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUNDLE = HERE.parents[1] / "sscf_bundle"
#: Seconds that the server may take to start, and to answer.
PATIENCE = 300


def make_environment(venv: Path) -> Path:
    """A virtual environment with MONAI Label; returns its Python."""
    python = venv / "bin" / "python"
    ready = venv / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-r", HERE / "requirements.txt"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--no-deps", "monailabel==0.8.5"], check=True)
        ready.touch()
    return python


def bundle_with_weights(folder: Path) -> Path:
    """A copy of the bundle with random weights."""
    import torch

    from scripts.networks.sscf import SSCFNet
    from scripts.networks.weights import save_weights

    copy = folder / "sscf_bundle"
    for part in ("configs", "scripts"):
        shutil.copytree(BUNDLE / part, copy / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    torch.manual_seed(0)
    network = SSCFNet(channels=(4, 8, 8, 8, 8), bank_size=4, key_size=2)
    head = network.get_parameter("segmentation_decoder.head.weight")
    with torch.no_grad():
        head.copy_(30 * torch.randn(head.shape))  # so that the mask holds every class
    settings = {"image_size": 48, "spacing": 4.0, "scaling": "brain"}
    save_weights(copy / "models" / "model.pt", network, {"preprocessing": settings})
    return copy


def write_studies(folder: Path) -> dict[str, dict[str, Path]]:
    """Studies without T1ce side by side in ``folder``, one of them oblique, and one in a folder of its own."""
    import nibabel as nib
    import numpy as np

    from scripts.demo.phantom import write_phantom_cohort

    source = folder.with_name("phantom")
    write_phantom_cohort(source, 2, seed=0, shape=(60, 60, 40), num_workers=1)
    straight, turned = sorted(path for path in source.iterdir() if path.is_dir())
    folder.mkdir(exist_ok=True)
    studies: dict[str, dict[str, Path]] = {}
    for name, study, angle in (("case_1", straight, 0.0), ("case_2", turned, 0.3), ("own/case_3", turned, 0.0)):
        (folder / name).parent.mkdir(exist_ok=True)
        rotation = np.eye(4)
        rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        studies[name] = {}
        for key in ("flair", "t1", "t2"):
            image = nib.load(study / f"{study.name}_{key}.nii.gz")
            studies[name][key] = folder / f"{name}_{key}.nii.gz"
            nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), rotation @ image.affine), studies[name][key])
    return studies


class Check:
    """Asks the server and remembers what was wrong.

    Args:
        url: of the server.
        studies: files of each study.
        bundle: folder of the bundle that is served.
        folder: for what the bundle computes itself.
    """

    def __init__(self, url: str, studies: dict[str, dict[str, Path]], bundle: Path, folder: Path) -> None:
        self.url, self.studies, self.bundle, self.folder = url, studies, bundle, folder
        self.empty = folder / "empty"
        self.empty.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []

    def expect(self, what: str, holds: bool, seen: Any = "") -> None:
        print(f"{'ok  ' if holds else 'FAIL'} {what} {seen}", flush=True)
        if not holds:
            self.failed.append(what)

    def infer(self, model: str, params: dict[str, Any], upload: Path | None = None, **query: str) -> Any:
        import requests

        with open(upload or os.devnull, "rb") as file:
            return requests.post(
                f"{self.url}/infer/{model}",
                params={**query, "output": "image"},
                data={"params": json.dumps(params)},
                files={"file": file} if upload else None,
                timeout=PATIENCE,
            )

    def truth(self, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
        """What the bundle itself makes of a study, of which only some contrasts are given."""
        import nibabel as nib

        from scripts.inference.synthesize import synthesize_study

        files = {key: self.studies[name][key] for key in keys}
        made = synthesize_study(
            **files, output_dir=self.folder / "+".join(keys), study=Path(name).name, device="cpu",
            ckpt_path=self.bundle / "models" / "model.pt", mask_labels={"NET": 1, "ED": 2, "ET": 3},
            amp=False,  # the server computes in float32
        )  # fmt: skip
        return {key: nib.load(path) for key, path in made.items()}

    def compare(self, what: str, answer: Any, truth: Any) -> None:
        """Holds a served volume against the one that the bundle wrote: values, geometry, data type."""
        import nibabel as nib
        import numpy as np

        if answer.status_code != 200:
            self.expect(what, False, f"{answer.status_code} {answer.text[:300]}")
            return
        served = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
        ours, theirs = truth.get_fdata(), served.get_fdata()
        if ours.shape != theirs.shape:
            self.expect(what, False, f"shape {theirs.shape}, not {ours.shape}")
            return
        apart = float(np.abs(ours - theirs).max())
        moved = float(np.abs(truth.affine - served.affine).max())
        holds = apart < 1e-5 and moved < 1e-4 and truth.get_data_dtype() == served.get_data_dtype()
        holds = holds and (ours.any() or self.bundle == BUNDLE)  # little training may find no tumor in a phantom
        self.expect(what, holds, f"{served.get_data_dtype()} {ours.shape}, apart {apart:.1e}, affine {moved:.1e}")

    def run(self) -> None:
        """All questions."""
        import requests

        info = requests.get(f"{self.url}/info/", timeout=PATIENCE).json()["models"]
        labels = {name: model["labels"] for name, model in info.items()}
        self.expect("models and labels", labels == {"sscf_tumor": {"NET": 1, "ED": 2, "ET": 3}, "sscf_contrast": {}})

        for name in self.studies:
            truth = self.truth(name, ("flair", "t1", "t2"))
            values = sorted(set(truth["seg"].get_fdata().ravel().astype(int).tolist()))
            if self.bundle != BUNDLE:
                self.expect(f"{name}, every class is in the mask", values == [0, 1, 2, 3], values)
            files = self.studies[name]
            by_path = {key: str(path) for key, path in files.items()}
            with_session = requests.put(
                f"{self.url}/session/",
                files=[("files", (p.name, p.read_bytes())) for p in files.values()],
                timeout=PATIENCE,
            ).json()
            ways: dict[str, dict[str, Any]] = {
                "params": {"params": by_path, "image": "case_1_t1"},
                "session": {"session_id": with_session["session_id"]},
            }
            if "/" in name:
                ways["folder"] = {"image": str(files["t1"].parent)}
            else:
                ways["image id"] = {"image": f"{name}_t1"}
            for way, request in ways.items():
                params = request.pop("params", {})
                self.compare(f"{name}, mask by {way}", self.infer("sscf_tumor", params, **request), truth["seg"])
                asked = {**params, "target": "t1ce"}
                self.compare(f"{name}, T1ce by {way}", self.infer("sscf_contrast", asked, **request), truth["t1ce"])
            requests.delete(f"{self.url}/session/{with_session['session_id']}", timeout=PATIENCE)

        truth, t1 = self.truth("case_2", ("t1",)), self.studies["case_2"]["t1"]
        self.compare("case_2, mask by upload", self.infer("sscf_tumor", {"contrast": "t1"}, t1), truth["seg"])
        asked = {"contrast": "t1", "target": "t2"}
        self.compare("case_2, T2 by upload", self.infer("sscf_contrast", asked, t1), truth["t2"])
        self.slicer()
        for what, model, params, query, words in (
            ("given contrast", "sscf_contrast", {"target": "t1"}, {"image": "case_1_t1"}, "t1 is in the study"),
            ("unknown target", "sscf_contrast", {"target": "dwi"}, {"image": "case_1_t1"}, "is not served"),
            ("no study", "sscf_tumor", {}, {"image": str(self.empty)}, "No study was found"),
            ("upload without contrast", "sscf_tumor", {}, {"upload": t1}, "say what it is"),
        ):
            answer = self.infer(model, params, **query)
            self.expect(f"refused: {what}", answer.status_code == 400 and words in answer.text, answer.text[:160])

    def slicer(self) -> None:
        """The calls that 3D Slicer makes, by the client that its extension has."""
        import numpy as np
        import SimpleITK as sitk  # noqa: N813
        from monailabel.client import MONAILabelClient

        # a folder of its own: the server removes its file of the same name
        client = MONAILabelClient(self.url, tmpdir=str(self.folder))
        truth = self.truth("case_1", ("flair", "t1", "t2"))
        for model, params, key in (("sscf_tumor", {}, "seg"), ("sscf_contrast", {"target": "t1ce"}, "t1ce")):
            path, answer = client.infer(model, "case_1_t1", params)
            apart = np.abs(sitk.GetArrayFromImage(sitk.ReadImage(path)).T - truth[key].get_fdata()).max()
            names = {"NET": 1, "ED": 2, "ET": 3} if key == "seg" else {}
            self.expect(f"client of 3D Slicer, {key}", apart < 1e-5 and answer["label_names"] == names, path)


def serve_and_check(folder: Path, shipped: bool) -> int:
    """Everything after the environment is there; returns the exit status."""
    sys.path.insert(0, str(BUNDLE))
    import requests

    bundle, studies = BUNDLE if shipped else bundle_with_weights(folder), write_studies(folder / "studies")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
    }
    command = [binaries / "monailabel", "start_server", "--app", HERE, "--studies", folder / "studies"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "bundle", bundle]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                requests.get(f"{url}/info/", timeout=PATIENCE).raise_for_status()
                break
            except requests.RequestException as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    print(f"The server did not start ({error}): {folder / 'server.log'} tells why.")
                    return 1
                time.sleep(1)
        check = Check(url, studies, bundle, folder / "computed")
        check.run()
    finally:
        server.terminate()
        server.wait()
    print(f"{len(check.failed)} of the answers are wrong" if check.failed else "Every answer is right.")
    return 1 if check.failed else 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the environment, studies, logs; made if needed")
    parser.add_argument("--shipped", action="store_true", help="take models/model.pt of the bundle: slower")
    chosen = parser.parse_args()
    folder = chosen.folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(folder / "venv")
    if Path(sys.prefix).resolve() != (folder / "venv").resolve():
        raise SystemExit(subprocess.run([python, *sys.argv]).returncode)
    raise SystemExit(serve_and_check(folder, chosen.shipped))


if __name__ == "__main__":
    main()
