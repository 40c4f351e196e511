"""Where kernels run in these tests: on the GPU if there is one, else in Triton's interpreter.

Memory that was never written reads as NaN, and an op that is not deterministic raises.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="package", params=["triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="package", params=["eager", "compiled"])
def called(request: pytest.FixtureRequest) -> Callable[[Function], Function]:
    """Takes a function and returns it as it is, or compiled as one graph without breaks."""

    def compiled(function: Function) -> Function:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)

    return compiled if request.param == "compiled" else lambda function: function
