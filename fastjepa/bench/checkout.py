"""An official V-JEPA 2 checkout on the import path, without the packages that it imports and a step
never needs."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

# timm's drop path runs at rate 0; nothing of the others is called.
NEEDLESS = ("timm.models.layers", "einops", "torchvision")
# Of the data set, with lists in NumPy files and the augmentation of the released recipes.
NEEDLESS_FOR_DATA = ("torchvision.io", "torchvision.transforms.functional", "pandas", "cv2")


def make_importable(path: Path, *, data: bool = False) -> None:
    """Let `app.vjepa_2_1` and `src` be imported from a checkout; packages of `NEEDLESS`, and with
    `data` of `NEEDLESS_FOR_DATA`, that cannot be imported are stood in for.

    Raises ValueError if `path` is no official checkout with V-JEPA 2.1.
    """
    if not (path / "app" / "vjepa_2_1" / "models" / "vision_transformer.py").is_file():
        raise ValueError(
            f"--reference {path}: expected an official V-JEPA 2 checkout with app/vjepa_2_1"
        )
    for name in (*NEEDLESS, *(NEEDLESS_FOR_DATA if data else ())):
        _stand_in(name)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))


def _stand_in(name: str) -> None:
    try:
        importlib.import_module(name)
        return
    except (ImportError, RuntimeError):
        pass
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        dotted = ".".join(parts[:depth])
        sys.modules.setdefault(dotted, ModuleType(dotted))
    module = sys.modules[name]
    module.drop_path = lambda x, *_: x  # type: ignore[attr-defined]
    module.rearrange = None  # type: ignore[attr-defined]
