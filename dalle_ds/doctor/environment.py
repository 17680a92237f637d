"""What this machine and this installation are: `launchers/doctor.py env`, the first thing to paste into a bug report."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
"""Of processors, by their names in /proc/cpuinfo: what matrix products are fast by. The last three are those of ARM."""
PACKAGES = (
    "torch",
    "deepspeed",
    "triton",
    "numpy",
    "datasets",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
)
"""Whose versions are told, besides those of the extras."""
SECONDS = 0.3
"""What measuring a rate may take."""
LIMITS = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that hold a process back."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class EnvOptions:
    """Tell what this machine and this installation are, and how fast it computes in which precision; takes seconds. Paste it
    into a bug report."""


def describe_environment() -> RenderableType:
    """For a terminal; whatever is missing is said to be."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*_installation(), *_machine(), *_torch()):
        table.add_row(name, Text(value))  # brackets are no markup
    return table


def _installation() -> Iterator[tuple[str, str]]:
    from dalle_ds import __version__

    yield "dalle_ds", __version__
    system = f"{platform.system()} {platform.release()}, {platform.libc_ver()[1] or '?'}"
    yield "Python", f"{platform.python_version()}, {system}"
    yield "packages", ", ".join(f"{name} {version_of(name) or 'missing'}" for name in PACKAGES)
    try:
        requires = metadata.requires("dalle-ds") or []
    except metadata.PackageNotFoundError:
        yield "extras", "unknown, since dalle_ds is not installed (pip install --editable .)"
        return
    for extra, missing in missing_of_extras(requires).items():
        lacking = f"lacks {', '.join(missing)}: pip install 'dalle-ds[{extra}]'"
        yield f"extra {extra}", lacking if missing else "installed"


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_of_extras(requires: list[str]) -> dict[str, list[str]]:
    """Extra → packages of it that are not installed, of requirements as a package's metadata lists them."""
    found: dict[str, list[str]] = {}
    for requirement in requires:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra is not None and extra[1] != "dev" and name is not None:
            missing = found.setdefault(extra[1], [])
            if version_of(name[0]) is None:
                missing.append(name[0])
    return found


def _machine() -> Iterator[tuple[str, str]]:
    compilers = [name for name in ("cc", "gcc", "clang", "g++", "nvcc") if shutil.which(name)]
    # On GPUs, flex attention is compiled by Triton, which needs a C compiler.
    yield "compiler", ", ".join(compilers) or "none, which flex attention needs on a GPU (not on a CPU)"
    yield "processor", f"{processor_name()}, {_cores()} cores for this process"
    flags = (said(CPUINFO, r"(?:flags|Features)\s*:\s*(.+)") or "").split()
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    has = [feature for feature in FEATURES if feature in flags]
    yield "features", ", ".join([*has, *limits]) if flags else "unknown here"
    kilobytes = (said(Path("/proc/meminfo"), rf"{name}:\s+(\d+) kB") for name in ("MemTotal", "MemAvailable"))
    total, free = (f"{int(count) * 1024 / 1e9:.1f} GB" if count else "unknown" for count in kilobytes)
    yield "memory", f"{total}, {free} available"
    try:
        folder = Path.cwd()
        usage = shutil.disk_usage(folder)
        yield "disk", f"{folder}: {usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB free"
    except OSError as error:
        yield "disk", f"cannot be looked at: {error.strerror}"


def processor_name() -> str:
    """As its maker calls it, where the system says so."""
    return said(CPUINFO, r"model name\s*:\s*(.+)") or platform.machine()


def said(file: Path, pattern: str) -> str | None:
    """What a system's file says; None where it says nothing of the kind."""
    try:
        found = re.search(pattern, file.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch() -> Iterator[tuple[str, str]]:
    """GPUs, and rates of matrix products by precision."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "torch", f"cannot be imported: {error}"
        return
    from dalle_ds.precision.choice import DTYPES, choose, matmul_rate, rate_text

    yield "kernels", f"PyTorch's are those for {torch.backends.cpu.get_cpu_capability()}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        yield "CUDA", f"{torch.version.cuda}, NCCL {nccl_version()}"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    else:
        yield "GPUs", f"none (torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'})"
    threads = torch.get_num_threads()
    for count in sorted({1, _cores()}):
        torch.set_num_threads(count)
        rates = {name: matmul_rate(dtype, torch.device("cpu"), SECONDS) for name, dtype in DTYPES.items()}
        words = ", ".join(rate_text(name, rate) for name, rate in rates.items())
        yield f"{count} thread{'s' if count > 1 else ''}", words
    torch.set_num_threads(threads)
    yield "auto chooses", str(choose(torch.device(device)))


def nccl_version() -> str:
    """Of a torch that is built for CUDA."""
    import torch

    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
