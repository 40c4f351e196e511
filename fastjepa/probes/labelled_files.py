"""Which files a probe reads and what is known of them: classes, or a label picture beside each.

read_classes("train/")          # train/CLASS/anything.mp4, or a CSV `path,label`
read_pairs("train/", "masks")   # train/images/a.jpg with train/masks/a.png, or a CSV of pairs
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastjepa.data.files import kind_of, local_path


class ClassFiles(NamedTuple):
    """Files and the place of each one's class in `classes`."""

    paths: list[str]
    labels: list[int]
    classes: list[str]


class Pairs(NamedTuple):
    """Pictures and the label picture of each."""

    paths: list[str]
    labels: list[str]


def read_classes(source: str, classes: Sequence[str] | None = None) -> ClassFiles:
    """Read a folder with one folder a class, or a CSV: `path,label`, or official `path label`.

    Relative paths start at the CSV's folder. `classes` are those that may occur; without them
    those found, numbers in their order, other names by the alphabet. Raises ValueError naming the
    source, and the row or folder, that does not fit.
    """
    place = local_path(source)
    if place.is_dir():
        found = [
            (str(file), folder.name)
            for folder in sorted(place.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for file in sorted(folder.rglob("*"))
            if kind_of(file) is not None and not file.name.startswith(".")
        ]
        if not found:
            raise ValueError(f"{source}: no CLASS/FILE with a video or an image in it")
    else:
        found = _rows(place, ("path", "label"))
    names = {label for _, label in found}
    if classes is None:
        numbers = all(name.isdecimal() for name in names)
        classes = sorted(names, key=int) if numbers else sorted(names)
    unknown = sorted(names - set(classes))
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]!r} is no class of the training files, which have "
            f"{', '.join(classes[:8])}{' ...' if len(classes) > 8 else ''}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return ClassFiles(
        [path for path, _ in found], [number[label] for _, label in found], list(classes)
    )


def read_pairs(source: str, kind: str) -> Pairs:
    """Read a folder with `images/` and `KIND/`, files of one stem belonging together, or a CSV with
    the columns `image` and `label`. Raises ValueError naming what is missing."""
    place = local_path(source)
    if not place.is_dir():
        rows = _rows(place, ("image", "label"))
        return Pairs([image for image, _ in rows], [str(place.parent / label) for _, label in rows])
    images, labels = place / "images", place / kind
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{source}: expected the folders images and {kind}, no {folder.name}")
    by_stem = {file.stem: file for file in labels.iterdir() if not file.name.startswith(".")}
    found = [file for file in sorted(images.iterdir()) if kind_of(file) == "image"]
    alone = [file.name for file in found if file.stem not in by_stem]
    if alone or not found:
        what = f"{alone[0]} has no label in {kind}" if alone else "images holds no image"
        raise ValueError(f"{source}: {what}")
    return Pairs([str(file) for file in found], [str(by_stem[file.stem]) for file in found])


def _rows(place: Path, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """Two columns of a CSV, the first one's paths completed."""
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: neither a folder nor a CSV that can be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    rows: list[tuple[str, str]] = []
    if set(columns) <= set(header):
        for number, row in enumerate(csv.DictReader(lines, fieldnames=header), 1):
            if number > 1:
                first, second = row[columns[0]], row[columns[1]]
                if not first or not second:
                    raise ValueError(f"{place}: row {number} lacks {' or '.join(columns)}")
                rows.append((first, second))
    else:
        for number, line in enumerate(lines, 1):
            first, _, second = line.rpartition(" ")
            if not first:
                raise ValueError(
                    f"{place}: row {number}: expected `{columns[0]} {columns[1]}`, or a header "
                    f"with these columns; found {line!r}"
                )
            rows.append((first, second))
    if not rows:
        raise ValueError(f"{place}: no rows")
    return [(str(place.parent / first.strip()), second.strip()) for first, second in rows]


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers 0..count-1 in two parts: the larger to fit on, about `share` to choose settings on.

    Each has at least one; ValueError when that cannot be, or for a share outside of (0, 1).
    """
    import torch

    if not 0.0 < share < 1.0 or count < 2:
        raise ValueError(
            f"holdout: expected a share between 0 and 1 of at least 2 files, found {share:g} of "
            f"{count}"
        )
    size = min(count - 1, max(1, round(share * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[size:]), sorted(order[:size])
