"""Whole numbers of a launch."""

from hypothesis import given
from hypothesis import strategies as st

from fastjepa_kernels.grid import cdiv, next_power_of_2


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_so_many_parts_hold_the_number_and_one_less_do_not(number: int, parts: int) -> None:
    times = cdiv(number, parts)
    assert times * parts >= number > (times - 1) * parts


@given(st.integers(1, 2**40))
def test_the_next_power_of_two_is_the_smallest_that_is_enough(number: int) -> None:
    power = next_power_of_2(number)
    assert power & (power - 1) == 0
    assert power >= number > power // 2
