"""Compile every kernel for a GPU that need not be there, and read what it costs.

    python -m fastjepa_kernels.ahead_of_time --capability 90

prints a JSON list: kernel, registers and shared memory a thread block, and bytes spilled. Each
kernel.py lists its real signatures as `AHEAD_OF_TIME`.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One signature a kernel is launched with: argument types as Triton writes them, the
    constants, the first and last compute capability it is meant for, and the most registers of a
    thread, if they are bounded."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    divisible_by_16: tuple[str, ...] = ()
    capabilities: tuple[int, int] = (80, 999)
    registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, shared bytes a block, spilled bytes a
    thread."""

    op: str
    case: str
    capability: int
    registers: int
    shared_bytes: int
    spilled_bytes: int


def cases() -> Iterator[tuple[str, Case]]:
    """Every op's name with each of its signatures."""
    for op in sorted(path.parent.name for path in Path(__file__).parent.glob("*/kernel.py")):
        for case in importlib.import_module(f"{__package__}.{op}.kernel").AHEAD_OF_TIME:
            yield op, case


def compile_case(op: str, case: Case, capability: int) -> Resources:
    """Compile one signature for sm_<capability>; raises what Triton raises if it cannot be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {(case.kernel.arg_names.index(k),): v for k, v in case.constants.items()}
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    attributes = {
        (case.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in case.divisible_by_16
    }
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "maxnreg": case.registers},
    )
    return _resources(op, case.name, capability, compiled.asm["cubin"], compiled.metadata.shared)


def _resources(op: str, case: str, capability: int, cubin: bytes, shared: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"{op} {case}: cuobjdump printed no resources: {text!r}")
    registers, stack, _, local = (int(number) for number in found.groups())
    # What a thread keeps outside its registers lies on its stack or in local memory.
    return Resources(op, case, capability, registers, shared, stack + local)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Compile all.")
    parser.add_argument("--capability", type=int, default=90, help="80, 90, 100, ...")
    parser.add_argument("--once", action="store_true", help="one signature of each kernel alone")
    args = parser.parse_args()
    chosen = [
        (op, case)
        for op, case in cases()
        if case.capabilities[0] <= args.capability <= case.capabilities[1]
    ]
    if args.once:
        chosen = list({case.kernel.fn: (op, case) for op, case in chosen}.values())
    rows = [asdict(compile_case(op, case, args.capability)) for op, case in chosen]
    json.dump(rows, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
