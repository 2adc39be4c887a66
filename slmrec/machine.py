"""The machine a measurement was made on; a time without it says little."""

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil

from slmrec.versions import library_versions

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY")
CPUINFO = Path("/proc/cpuinfo")
INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "avx512_bf16", "asimddp", "i8mm")
"""Processor features that decide how fast 8-bit (and bfloat16) arithmetic is."""


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, GPU where one is in use, load and library versions."""
    cpuinfo = _read(CPUINFO)
    return {
        "cpu": _first(r"^model name\s*:\s*(.*)$", cpuinfo) or platform.processor() or platform.machine(),
        "cpu_flags": cpu_flags(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": _threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _gpu(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "versions": library_versions(),
    }


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the cgroup's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text(encoding="ascii").split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def cpu_flags() -> list[str]:
    """Features of the processor that decide how it computes, see `INT8_FLAGS`."""
    flags = _flags()
    return [flag for flag in INT8_FLAGS if flag in flags]


def has_vnni() -> bool:
    """Whether products of 8-bit numbers are summed in 32 bits at once; so they are on every processor but older x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(_flags() & {"avx_vnni", "avx512_vnni", "avx512vnni", "amx_int8"})


def _flags() -> set[str]:
    """Features of the processor, as Linux names them."""
    return set(_first(r"^(?:flags|Features)\s*:\s*(.*)$", _read(CPUINFO)).split())


def _threads() -> dict[str, str | int]:
    threads: dict[str, str | int] = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    torch = sys.modules.get("torch")
    if torch is not None:
        threads["torch"] = int(torch.get_num_threads())
    return threads


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found.group(1).strip() if found else ""
