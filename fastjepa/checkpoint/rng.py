"""The global random generators of PyTorch, Python and NumPy as named tensors, no pickle."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastjepa.checkpoint.strict import check_fit

_CUDA = "torch.cuda."


def pack_rng() -> dict[str, Tensor]:
    """The state of every global generator of this process.

    `torch.cpu`, `torch.cuda.<device>` uint8; `python` int64 `[625]`, `numpy` int64 `[625]` (words
    and position); `python.gauss`, `numpy.gauss` float64 `[2]` (whether a second normal draw waits,
    and that draw).
    """
    _, words, gauss = random.getstate()
    _, key, position, waits, second = np.random.get_state()
    packed = {
        "torch.cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor(
            [gauss is not None, 0.0 if gauss is None else gauss], dtype=torch.float64
        ),
        "numpy": torch.tensor([*np.asarray(key).tolist(), position], dtype=torch.int64),
        "numpy.gauss": torch.tensor([waits, second], dtype=torch.float64),
    }
    return packed | {
        f"{_CUDA}{device}": torch.cuda.get_rng_state(device)
        for device in range(torch.cuda.device_count())
    }


def unpack_rng(tensors: Mapping[str, Tensor], what: str = "rng") -> tuple[str, ...]:
    """Set every global generator to a state from `pack_rng`.

    Returns the CUDA devices that only one side knows (`torch.cuda.1`): the run goes on there with
    other draws. Raises CheckpointError that names each missing, extra or mis-shaped tensor; the
    generators are then untouched.
    """
    here = pack_rng()
    unshared = tuple(
        sorted(name for name in here.keys() ^ tensors.keys() if name.startswith(_CUDA))
    )
    found = {name: tensor for name, tensor in tensors.items() if name not in unshared}
    wanted = {name: tensor for name, tensor in here.items() if name not in unshared}
    check_fit(wanted, found, what)
    waits, gauss = found["python.gauss"].tolist()
    random.setstate((3, tuple(found["python"].tolist()), gauss if waits else None))
    *key, position = found["numpy"].tolist()
    waits, second = found["numpy.gauss"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(waits), second))
    torch.set_rng_state(found["torch.cpu"])
    for name, state in found.items():
        if name.startswith(_CUDA):
            torch.cuda.set_rng_state(state, int(name.removeprefix(_CUDA)))
    return unshared
