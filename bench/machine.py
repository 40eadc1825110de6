"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from bench.results import Machine

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile", "bf16", "asimd")


def describe_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    fields = cpu_fields(cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        features=[name for name in FEATURES if name in flags],
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def cpu_fields(text: str) -> dict[str, str]:
    """Of the first processor that `text`, in the format of /proc/cpuinfo, lists."""
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at the most) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
