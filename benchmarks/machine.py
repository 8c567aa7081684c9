"""A description of the machine, which measured numbers need."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import dvi


def describe() -> dict[str, Any]:
    """CPU, cores, versions, graphics card."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dvi": dvi.__version__,
        "commit": _commit(),
        "gpu": gpu,
    }
    found["words"] = (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread; torch {found['torch']}; "
        f"dvi {found['dvi']} ({found['commit'] or 'no checkout'}); "
        f"{gpu or 'no GPU'}; load at the start {found['load']:.1f}."
    )
    return found


def _commit() -> str | None:
    """The commit of the measured checkout, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().split("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    flags = fields.get("flags", "").split()
    return f"{name} (family {fields.get('cpu family', '?')}, {'AVX-512' if 'avx512f' in flags else 'AVX2'})"
