"""How a decoded picture is put upright: the display matrix of its file, as a quarter turn."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
from av.buffer import Buffer
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame

from fastjepa.data.decoder import Frame


class Turn(NamedTuple):
    """Rows become columns first, if at all; then rows and columns are flipped."""

    transposed: bool = False
    up_down: bool = False
    left_right: bool = False


def turn_of(frame: VideoFrame) -> Turn:
    """Read the display matrix, to the nearest quarter turn, mirrored or not.

    The matrix maps a decoded pixel to its place on screen: x' = a x + c y, y' = b x + d y.
    """
    data = cast(Mapping[Type, Buffer], frame.side_data).get(Type.DISPLAYMATRIX)
    if data is None:
        return Turn()
    matrix = np.frombuffer(bytes(data), np.int32)
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(b) > abs(a):
        return Turn(True, up_down=b < 0, left_right=c < 0)
    return Turn(False, up_down=d < 0, left_right=a < 0)


def upright(picture: Frame, turn: Turn) -> Frame:
    """Turn a picture uint8 [H, W, 3]."""
    if turn.transposed:
        picture = picture.transpose(1, 0, 2)
    rows, columns = -1 if turn.up_down else 1, -1 if turn.left_right else 1
    return np.ascontiguousarray(picture[::rows, ::columns])
