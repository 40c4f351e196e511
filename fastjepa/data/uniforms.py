"""Random numbers that are a pure function of a few whole numbers, the same on every machine."""

import numpy as np
from numpy.typing import NDArray


def uniforms(count: int, seed: int, stream: int, index: int, part: int) -> NDArray[np.float64]:
    """Draw float64 [count] in [0, 1); by raw words, as NumPy may change what a Generator draws."""
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, part, index, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
