"""What the machine is: device, versions, clocks. Reads settings, changes none.

python -m benchmarks.gpu.machine [--device cpu]    # prints one JSON object
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "memory_max_mhz": "clocks.max.mem",
    "temperature_c": "temperature.gpu",
    "power_limit_w": "power.limit",
}
SOURCE = "nvidia-smi --query-gpu (read only)"


def clocks(query: str | None = None) -> dict[str, float]:
    """Of the first GPU, as nvidia-smi reads them now; nothing where it can't. `query`: what it printed."""
    if query is None:
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return {}
        command = [tool, "-i", "0", f"--query-gpu={','.join(CLOCKS.values())}", "--format=csv,noheader,nounits"]
        try:
            query = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        except (subprocess.SubprocessError, OSError):
            return {}
    values = [value.strip() for value in query.strip().split(",")]
    if len(values) != len(CLOCKS):
        return {}
    return {name: float(value) for name, value in zip(CLOCKS, values, strict=True) if re.fullmatch(r"[0-9.]+", value)}


def versions() -> dict[str, str | None]:
    """Of everything that a time may depend on."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    for package in ("triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    text = (Path(__file__).parents[2] / "setemb_kernels/_version.py").read_text()
    found["setemb"] = re.search(r'"(.+)"', text[text.index("__version__") :])[1]  # type: ignore[index]
    found["nvcc"] = _nvcc()
    found["driver"] = _driver()
    return found


def _nvcc() -> str | None:
    tool = shutil.which("nvcc")
    if tool is None:
        return None
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([0-9.]+)", text)
    return release[1] if release else None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def describe(device: str) -> dict[str, Any]:
    """Name, size and versions; raises SystemExit where there is no such device."""
    import torch

    if device == "cpu":
        size: dict[str, Any] = {"device": f"cpu, {torch.get_num_threads()} threads", "capability": None}
    else:
        if not torch.cuda.is_available():
            raise SystemExit(
                "make gpu: this torch sees no CUDA device (--device cpu --quick tries the code without one)"
            )
        properties = torch.cuda.get_device_properties(0)
        size = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return size | {"versions": versions(), "clocks": {"source": SOURCE, "before": clocks()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    json.dump(describe(parser.parse_args().device), sys.stdout)
