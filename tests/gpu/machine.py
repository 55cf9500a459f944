"""The GPU of a machine and what it needs: driver, a torch that can use it, and kernels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from tempfile import TemporaryDirectory

import torch

from ssmttm.model.kernels import chosen
from tests.gpu.report import note, verdict
from tests.gpu.sizes import DEVICE, Size

QUERY = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


def machine(_: Size) -> None:
    """Say which GPU torch can use, or what is missing; before the kernels are installed."""
    if (program := shutil.which("nvidia-smi")) is None:
        verdict(False, "no nvidia-smi: install the GPU's NVIDIA driver")
    else:
        done = subprocess.run([program, *QUERY], capture_output=True, text=True, check=False)
        verdict(done.returncode == 0, f"driver: {(done.stdout or done.stderr).strip()}")
    built = torch.version.cuda
    remedy = "the CPU: install one with CUDA into this environment"
    verdict(
        built is not None, f"torch {torch.__version__} is built for {f'CUDA {built}' if built else remedy}"
    )
    if DEVICE == "cuda":
        facts = torch.cuda.get_device_properties(0)
        memory = f"{facts.total_memory / 2**30:.1f} GiB"
        verdict(True, f"torch uses {facts.name}, sm_{facts.major}{facts.minor}, {memory}")
    else:
        verdict(False, "torch can use no GPU: see above, CUDA_VISIBLE_DEVICES and the driver's CUDA version")


def doctor(_: Size) -> None:
    """Report what `ssmscale doctor` finds of the GPU, and hold the kernels to be complete."""
    with TemporaryDirectory() as root:
        command = [sys.executable, "-m", "harness", "doctor", "--root", root, "--json"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for check in json.loads(said)["checks"]:
        if any(word in check["name"].lower() for word in ("hardware", "gpu", "torch", "kernels")):
            note(f"doctor: {check['name']}: {check['found']}; {check['remedy'] or 'works'}")
    if DEVICE == "cuda":
        kernels = chosen()
        verdict(kernels.mixer is not None, f"kernels: {kernels.name}; missing: {kernels.reason or 'none'}")
