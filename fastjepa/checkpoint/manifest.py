"""The manifest of a checkpoint: every file's size and SHA-256, where every tensor lies, a seal.

It is written last and read first. Checkpoints of format 1 hold whole tensors, one file for each
part, and their manifests know of no tensors.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.checkpoint.pieces import Placed, Shares, StoredTensors
from fastjepa.checkpoint.tensor_file import CheckpointError, read_layout, write_tensors
from fastjepa.durable import sync

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
_SUFFIX = ".safetensors"
# By part and tensor.
Tables = Mapping[str, Mapping[str, Placed]]


@dataclass(frozen=True)
class Written:
    """What one rank has written: sizes and SHA-256 by file, and its pieces."""

    files: Mapping[str, tuple[int, str]]
    tables: Tables


@dataclass(frozen=True)
class Manifest:
    """`files`: size and SHA-256 by name. `tables` is None in format 1."""

    files: Mapping[str, tuple[int, str]]
    tables: Tables | None

    def tensors(self, path: Path, part: str) -> StoredTensors:
        """The tensors of a part of the checkpoint at `path`, to be read as they are asked for."""
        if self.tables is not None:
            return StoredTensors(path, self.tables[part])
        file = f"{part}{_SUFFIX}"
        layout = read_layout(path / file)
        whole = {
            name: Placed(dtype, tuple(shape), [(file, 0, torch.Size(shape).numel())])
            for name, (dtype, shape, _) in layout.items()
        }
        return StoredTensors(path, whole)

    def parts(self) -> list[str]:
        if self.tables is not None:
            return list(self.tables)
        return [name.removesuffix(_SUFFIX) for name in self.files if name.endswith(_SUFFIX)]

    def files_of(self, parts: Collection[str]) -> list[str]:
        """The files that hold these parts, and the state."""
        if self.tables is None:
            return [STATE, *(f"{part}{_SUFFIX}" for part in parts)]
        pieces = (
            piece for part in parts for one in self.tables[part].values() for piece in one.pieces
        )
        return sorted({STATE, *(file for file, _, _ in pieces)})


def write_shares(folder: Path, shares: Shares, rank: int = 0, ranks: int = 1) -> Written:
    """Write one rank's pieces, a file for each part, and bring them to the disk. Raises OSError."""
    files: dict[str, tuple[int, str]] = {}
    tables: dict[str, dict[str, Placed]] = {}
    for part, pieces in shares.items():
        number = f"-{rank + 1:05}-of-{ranks:05}" if ranks > 1 else ""
        path = folder / f"{part}{number}{_SUFFIX}"
        digest = write_tensors(path, {name: piece.data for name, piece in pieces.items()})
        sync(path)
        files[path.name] = (path.stat().st_size, digest)
        tables[part] = {
            name: Placed(
                piece.data.dtype, piece.shape, [(path.name, piece.start, piece.data.numel())]
            )
            for name, piece in pieces.items()
        }
    return Written(files, tables)


def write_manifest(folder: Path, written: Collection[Written], state: str) -> None:
    """Write the state and, last, the manifest of what the ranks have written. Raises OSError."""
    path = folder / STATE
    path.write_text(state, encoding="utf-8")
    files = {name: entry for one in written for name, entry in one.files.items()}
    content = state.encode()
    files[STATE] = (len(content), hashlib.sha256(content).hexdigest())
    tables: dict[str, dict[str, Placed]] = {}
    for one in written:
        for part, table in one.tables.items():
            together = tables.setdefault(part, {})
            for name, placed in table.items():
                before = together[name].pieces if name in together else []
                together[name] = Placed(placed.dtype, placed.shape, [*before, *placed.pieces])
    for part, together in tables.items():
        for name, placed in together.items():
            held = sum(count for _, _, count in placed.pieces)
            assert held == torch.Size(placed.shape).numel(), f"{part}: {name} is not whole"
    sealed = {
        "format": FORMAT,
        "files": {
            name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(files.items())
        },
        "tensors": {
            part: {
                name: {
                    "dtype": str(placed.dtype).removeprefix("torch."),
                    "shape": placed.shape,
                    "pieces": placed.pieces,
                }
                for name, placed in together.items()
            }
            for part, together in tables.items()
        },
    }
    text = json.dumps({**sealed, "sha256": _seal(sealed)})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for file in (path, folder / MANIFEST, folder):
        sync(file)


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError for a manifest that is missing, damaged or of a later version."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest.get("format", 1)
        sealed = {key: value for key, value in manifest.items() if key != "sha256"}
        # Format 1 seals its files alone.
        if _seal(sealed if version > 1 else manifest["files"]) != manifest["sha256"]:
            raise CheckpointError(f"{file}: damaged, its contents do not match its own SHA-256")
        if version > FORMAT:
            raise CheckpointError(
                f"{file}: format {version}, of a later fastjepa; this one reads up to {FORMAT}"
            )
        files = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        return Manifest(files, _tables(manifest["tensors"]) if version > 1 else None)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, so {path} is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged, not a manifest: {error!r}") from error


def check_size(file: Path, size: int) -> None:
    """Raises CheckpointError for a file that is missing or has another size."""
    try:
        found = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: missing ({error.strerror})") from error
    if found != size:
        kind = "truncated" if found < size else "too long"
        raise CheckpointError(f"{file}: {kind}, {found} bytes where the manifest says {size}")


def check_content(file: Path, size: int, digest: str) -> None:
    """Compare a file with its entry, byte for byte. Raises CheckpointError with both SHA-256."""
    check_size(file, size)
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if found != digest:
        raise CheckpointError(
            f"{file}: damaged, its SHA-256 is {found} where the manifest says {digest}"
        )


def _tables(tensors: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Tables:
    return {
        part: {
            name: Placed(
                getattr(torch, str(one["dtype"])),
                tuple(one["shape"]),  # type: ignore[arg-type]
                [tuple(piece) for piece in one["pieces"]],  # type: ignore[attr-defined]
            )
            for name, one in table.items()
        }
        for part, table in tensors.items()
    }


def _seal(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
