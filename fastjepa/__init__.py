"""fastjepa: fast, trustworthy pretraining of V-JEPA 2.1 (arXiv 2603.14482).

Reading order: `config/schema.py` (what a recipe says), `build.py` (recipe to objects),
`train/step.py` (the method on one screen), `model/`, `objective/`, `masking/`, `data/`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastjepa.pretrained import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`fastjepa.load`, imported when it is first asked for: PyTorch takes its time."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastjepa.pretrained import load

    return load
