"""What of the stack is here, which backend each part uses and why, and whether it works.

    findings = examine()
    print(as_text(findings)); sys.exit(0 if healthy(findings) else 1)

Every package that is installed is imported in a process of its own, so that a broken one is
reported and hurts nothing. The self-tests are in selftest.py.
"""

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fastjepa.model.attention_backends import ALL
from fastjepa.model.block_compiled import compile_refusal
from fastjepa.observe.processes import usable_cores
from fastjepa_kernels.backend import choose
from fastjepa_kernels.block_passes import avx512 as block_passes
from fastjepa_kernels.packed_attention import avx512 as packed_attention
from fastjepa_kernels.precision import wide_vectors

OLDEST_TORCH = (2, 11)
# An import that takes longer than this many seconds counts as broken.
_PATIENCE = 60.0
_VIDEO_CODECS = ("h264", "hevc", "vp9", "av1")
_STYLES = {"ok": "green", "absent": "dim", "problem": "bold red"}

_OPS = (
    "dense_l1", "linear_dense_l1", "mask_distance", "rope3d", "gather_tokens", "assemble_tokens",
    "ema_update",
)  # fmt: skip

State = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination, under the heading `group`."""

    name: str
    state: State
    detail: str
    group: str


@dataclass(frozen=True)
class Package:
    """A library, under the names of its distributions; what is not `needed` is for a part that can
    be done without."""

    name: str
    module: str
    distributions: tuple[str, ...]
    purpose: str
    install: str = ""
    needed: bool = False


_ATTENTION = "attention on a GPU may run by it (model.attention)"
_TRAIN = "pip install 'fastjepa[train]'"
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")

PACKAGES = (
    Package("PyAV", "av", ("av",), "decodes videos", "pip install av", needed=True),
    Package("Pillow", "PIL", ("pillow",), "decodes images", "pip install pillow", needed=True),
    Package(
        "safetensors", "safetensors", ("safetensors",), "holds weights",
        "pip install safetensors", needed=True,
    ),
    Package("tensorboard", "tensorboard", ("tensorboard",), "training needs it", install=_TRAIN),
    Package("psutil", "psutil", ("psutil",), "training needs it", install=_TRAIN),
    Package("matplotlib", "matplotlib", ("matplotlib",), "draws a run's curves", install=_TRAIN),
    Package("pyarrow", "pyarrow", ("pyarrow",), "reads Parquet manifests", install=_TRAIN),
    Package(
        "fsspec", "fsspec", ("fsspec",), "reads data from object stores",
        install="pip install 'fastjepa[store]'",
    ),
    Package(
        "wandb", "wandb", ("wandb",), "takes metrics where observe.wandb is true",
        install="pip install wandb",
    ),
    Package(
        "triton", "triton", ("triton", "triton-rocm", "triton-xpu"), "compiles the ops for a GPU",
        install="pip install triton",
    ),
    Package("flash-attn", "flash_attn", ("flash-attn",), _ATTENTION),
    Package("xformers", "xformers", ("xformers",), _ATTENTION),
    Package(
        "deepspeed", "deepspeed", ("deepspeed",), "trains on many ranks (engine.kind)",
        install="pip install 'fastjepa[zero]'",
    ),
    Package(
        "DALI", "nvidia.dali", _DALI, "decodes videos on a GPU",
        install="pip install 'fastjepa[dali]'",
    ),
)  # fmt: skip


def examine() -> list[Finding]:
    """Look at everything and run the self-tests; takes seconds and raises nothing."""
    imports = {package.name: _start_import(package) for package in PACKAGES}
    platform_found = list(_platform())
    packages = {package.name: _package(package, imports[package.name]) for package in PACKAGES}
    # A package is trusted in this process once it was imported in another.
    dali = packages["DALI"].state == "ok"
    return [
        *platform_found,
        *packages.values(),
        _codecs(),
        *_backends(dali),
        *_self_tests(dali),
    ]


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing is a problem; what is merely absent is none."""
    return all(finding.state != "problem" for finding in findings)


def as_table(findings: Sequence[Finding]) -> RenderableType:
    """For a terminal: a titled table for each group."""
    width = max((len(finding.name) for finding in findings), default=0)
    tables = []
    for group in dict.fromkeys(finding.group for finding in findings):
        table = Table(title=group, title_justify="left", show_header=False, box=None)
        table.add_column(style="cyan", min_width=width, no_wrap=True)
        table.add_column(min_width=len("problem"), no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.group == group:
                style = _STYLES[finding.state]
                state = f"[{style}]{finding.state}[/]"
                table.add_row(escape(finding.name), state, escape(finding.detail))
        tables.append(table)
    return Group(*tables)


def as_text(findings: Sequence[Finding]) -> str:
    """For a pipe or a file: one line a finding, never wrapped."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for group in dict.fromkeys(finding.group for finding in findings):
        lines += [group]
        lines += [
            f"  {finding.name:<{width}}  {finding.state:<7}  {finding.detail}"
            for finding in findings
            if finding.group == group
        ]
    return "\n".join(lines)


def _stack(name: str, state: State, detail: str) -> Finding:
    return Finding(name, state, detail, "stack")


def _platform() -> Iterator[Finding]:
    yield _stack("Python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield _torch()
    found = {
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
    }
    for name, here in found.items():
        detail = "built into this torch" if here else "not built into this torch: slower products"
        yield _stack(name, "ok" if here else "absent", detail)
    yield from _cuda()


def _torch() -> Finding:
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = "for CPUs only"
    if torch.version.cuda:
        build = f"for CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"for ROCm {torch.version.hip}"
    threads, cores = torch.get_num_threads(), usable_cores()
    about = (
        f"{torch.__version__}, built {build}; {threads} threads of {cores} logical cores, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    if number < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return _stack("torch", "problem", f"{about}; expected at least {oldest}")
    return _stack("torch", "ok", about)


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "no device is seen" if torch.version.cuda else "this torch is built without CUDA"
        yield _stack("CUDA", "absent", f"{why}: training runs on the CPU")
        return
    for device in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(device)
        yield _stack(
            f"CUDA device {device}",
            "ok",
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, "
            f"compute capability {facts.major}.{facts.minor}",
        )


def _start_import(package: Package) -> "subprocess.Popen[str] | None":
    """A process that imports `package`; None when nothing of it is installed."""
    if _version(package) is None and not _can_be_found(package.module):
        return None
    return subprocess.Popen(
        [sys.executable, "-c", f"import {package.module}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _package(package: Package, imported: "subprocess.Popen[str] | None") -> Finding:
    if imported is None:
        state: State = "problem" if package.needed else "absent"
        detail = f"{package.purpose}: {package.install}" if package.install else package.purpose
        return _stack(package.name, state, detail)
    number = _version(package) or "of unknown version"
    complaint = _complaint(imported)
    if complaint is None:
        return _stack(package.name, "ok", f"{number}; {package.purpose}")
    detail = f"{number} is installed but cannot be imported ({complaint}); {package.purpose}"
    return _stack(package.name, "problem", detail)


def _complaint(imported: "subprocess.Popen[str]") -> str | None:
    """Why the import failed, or None once it has succeeded."""
    try:
        _, errors = imported.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        imported.kill()
        imported.communicate()
        return f"more than {_PATIENCE:.0f} s"
    if imported.returncode == 0:
        return None
    return (errors.strip().splitlines() or [f"exit code {imported.returncode}"])[-1]


def _version(package: Package) -> str | None:
    for distribution in package.distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _codecs() -> Finding:
    try:
        import av
    except (ImportError, OSError) as error:
        return _stack("video codecs", "problem", f"PyAV cannot be imported: {error}")
    decoded = [name for name in _VIDEO_CODECS if _decodes(name)]
    missing = [name for name in _VIDEO_CODECS if name not in decoded]
    state: State = "problem" if "h264" in missing else "ok"
    lacks = f"; not decoded: {', '.join(missing)}" if missing else ""
    detail = f"FFmpeg {av.ffmpeg_version_info} decodes {', '.join(decoded) or 'none'}{lacks}"
    return _stack("video codecs", state, detail)


def _decodes(name: str) -> bool:
    import av

    try:
        av.Codec(name, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _backends(dali: bool) -> Iterator[Finding]:
    """What a run with `auto` everywhere uses, and why."""
    cuda = torch.cuda.is_available()
    if cuda:
        device = "the CUDA device, because one is seen (engine.device: auto)"
        attention = _attention(torch.device("cuda"))
        products = "cuBLAS, because the device is CUDA"
        choice = choose("auto", torch.device("cuda"))
        whose = "our Triton kernels" if choice.name == "triton" else "PyTorch's operations"
        passes = f"{whose}, because {choice.reason}"
    else:
        device = "the CPU, because no CUDA device is seen (engine.device: auto)"
        cpu = torch.device("cpu")
        attention = _on_a_cpu(
            partial(packed_attention.refusal, cpu, channels=64), "flash kernel in float32"
        )
        passes = _on_a_cpu(partial(block_passes.refusal, cpu), "operations")
        onednn = torch.backends.mkldnn.is_available()
        products = (
            "oneDNN, and MKL for the weights' gradients, because this torch has oneDNN"
            if onednn and wide_vectors()
            else "MKL, because it is faster than oneDNN without AVX-512"
            if onednn
            else "plain products, because this torch has no oneDNN"
        )
    chosen = {
        "device": device,
        "attention": attention,
        "matrix products": products,
        "passes between them": passes,
        "decoder": _decoder(torch.device("cuda" if cuda else "cpu"), dali),
        "compiled blocks": _compiled(torch.device("cuda" if cuda else "cpu")),
        "engine": "torch in one process, because engine.kind is so by default; deepspeed: many",
    }
    for name, detail in chosen.items():
        yield Finding(name, "ok", detail, "backends")
    yield from _ops(torch.device("cuda" if cuda else "cpu"))


def _decoder(device: torch.device, dali: bool) -> str:
    """What `data.decoder: auto` chooses."""
    pyav = "PyAV on the CPU, in worker processes, because"
    if device.type == "cuda" and not dali:
        return f"{pyav} DALI cannot be imported"
    try:
        from fastjepa.data.decode_dali import choose_decoder
    except (ImportError, OSError) as error:
        return f"none, because PyAV cannot be imported ({error})"
    choice = choose_decoder("auto", device)
    if choice.name == "pyav":
        return f"{pyav} {choice.reason} (data.decoder: auto)"
    return f"DALI on the device, because {choice.reason} (data.decoder: auto)"


def _compiled(device: torch.device) -> str:
    """What `engine.compile: blocks` would find."""
    refusal = compile_refusal(device)
    able = "engine.compile=blocks can be asked for" if refusal is None else f"not: {refusal}"
    return f"none, because engine.compile is null by default; {able}"


def _on_a_cpu(refuses: Callable[[torch.dtype], str | None], other: str) -> str:
    """Whose kernels run in a block by hand, by dtype: ours for AVX-512, or PyTorch's `other`."""
    refusals = {str(dtype)[6:]: refuses(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ours = [name for name, refusal in refusals.items() if refusal is None]
    why = "; ".join(dict.fromkeys(refusal for refusal in refusals.values() if refusal))
    if not ours:
        return f"PyTorch's {other} for CPUs, because {why}"
    rest = f"; PyTorch's {other} for bfloat16, because {why}" if why else ""
    return f"our own kernels (avx512) in {' and '.join(ours)}, because the CPU has AVX-512{rest}"


def _attention(device: torch.device) -> str:
    """What `model.attention: auto` chooses from for heads of 64 channels in bfloat16."""
    refusals = {b.name: b.refusal(device, torch.bfloat16, 64) for b in ALL}
    able = ", ".join(name for name, refusal in refusals.items() if refusal is None)
    unable = "".join(f"; not {n}: {refusal}" for n, refusal in refusals.items() if refusal)
    return (
        f"the fastest of {able}, measured once for each shape, because the device is CUDA{unable}"
    )


def _ops(device: torch.device) -> Iterator[Finding]:
    """What each op runs for tensors on `device`; masks are made in the data workers."""
    for name in _OPS:
        place = torch.device("cpu") if name == "mask_distance" else device
        choice = choose("auto", place)
        what = "the Triton kernel" if choice.name == "triton" else "the PyTorch twin"
        where = " (in the data workers)" if place != device else ""
        yield Finding(f"op {name}", "ok", f"{what}, because {choice.reason}{where}", "backends")


def _self_tests(dali: bool) -> Iterator[Finding]:
    try:
        from fastjepa.selftest import (
            SELF_TESTS,
            block_equals_formula,
            failure,
            frames_identical_by_dali,
            ops_equal_formulas,
        )
    except (ImportError, OSError) as error:
        yield Finding("self-tests", "problem", f"cannot be imported: {error}", "self-tests")
        return
    tests = dict(SELF_TESTS)
    if torch.cuda.is_available():
        tests["CUDA block"] = partial(block_equals_formula, "cuda")
        tests["CUDA ops"] = partial(ops_equal_formulas, "cuda")
    if dali:
        tests["DALI decoding"] = frames_identical_by_dali
    for name, test in tests.items():
        failed, detail = failure(test)
        yield Finding(name, "problem" if failed else "ok", detail, "self-tests")
