"""Where kernels run in these tests: on the GPU if there is one, else in Triton's interpreter.

Memory that was never written reads as NaN, and an op that is not deterministic raises.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa_kernels.backend import interpreted
from fastjepa_kernels.block_passes import avx512
from fastjepa_kernels.dense_l1 import op

Function = Callable[..., Any]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="package", autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="package", autouse=True)
def _halves_are_rounded() -> Iterator[None]:
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest, and
    multiplies matrices of the bits of bfloat16 numbers; in float8 it halves what rounds up to the
    next power of two."""
    with pytest.MonkeyPatch.context() as patch:
        if interpreted():
            from triton import language as tl
            from triton.runtime import interpreter

            convert = interpreter._convert_float

            def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
                if source != tl.float32 or target not in (tl.bfloat16, tl.float8e4nv):
                    return convert(data, source, target, mode)
                wide = torch.from_numpy(np.array(data, np.float32))
                if target == tl.bfloat16:
                    return wide.bfloat16().view(torch.uint16).numpy()
                return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

            builder = interpreter.InterpreterBuilder
            product = builder.create_dot

            def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
                return product(self, *(_in_float32(x) for x in (a, b)), *rest)

            def _in_float32(x: Any) -> Any:
                if x.dtype.scalar != tl.bfloat16:
                    return x
                bits = torch.from_numpy(np.array(x.data, np.uint16))
                numbers = bits.view(torch.bfloat16).float().numpy()
                return interpreter.TensorHandle(numbers, tl.float32)

            patch.setattr(interpreter, "_convert_float", rounded)
            patch.setattr(builder, "create_dot", widened)
        yield


@pytest.fixture
def _threads() -> Iterator[None]:
    """A test may change how many PyTorch takes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Watch(TorchDispatchMode):
    """The names of the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="package", params=["triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["triton", "reference", "avx512"])
def loss_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The losses have C++ for a CPU with AVX-512, too, which `auto` takes where nothing asks for
    Triton's interpreter."""
    if request.param != "avx512":
        yield str(request.param)
        return
    refusal = avx512.refusal(torch.device("cpu"), torch.float32, torch.bfloat16)
    if torch.cuda.is_available() or refusal is not None:
        pytest.skip(refusal or "kernels run on the GPU here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "use_triton", lambda *_: False)
        yield "auto"


@pytest.fixture(scope="package", params=["eager", "compiled"])
def called(request: pytest.FixtureRequest) -> Callable[[Function], Function]:
    """Takes a function and returns it as it is, or compiled as one graph without breaks."""

    def compiled(function: Function) -> Function:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)

    return compiled if request.param == "compiled" else lambda function: function
