"""The released V-JEPA 2 and 2.1 weights by file name: what each holds and where it comes from.

Facts of the official repository and its issues; nothing is fetched from here. No checksum of any of
these files is published, so none is known.
"""

from dataclasses import dataclass

from fastjepa.presets import Generation

URL = "https://dl.fbaipublicfiles.com/vjepa2/"


@dataclass(frozen=True)
class Released:
    """One file: `part` is the encoder to use in it, `size` the side in pixels it was made for."""

    file: str
    generation: Generation
    preset: str
    part: str
    predictor_depth: int
    size: int
    sha256: str | None = None
    hub: str | None = None

    @property
    def url(self) -> str:
        return URL + self.file


RELEASED = (
    Released("vjepa2_1_vitb_dist_vitG_384.pt", "2.1", "vit_base", "ema_encoder", 12, 384),
    Released("vjepa2_1_vitl_dist_vitG_384.pt", "2.1", "vit_large", "ema_encoder", 12, 384),
    Released("vjepa2_1_vitg_384.pt", "2.1", "vit_giant", "target_encoder", 24, 384),
    Released("vjepa2_1_vitG_384.pt", "2.1", "vit_gigantic", "target_encoder", 24, 384),
    Released(
        "vitl.pt", "2", "vit_large", "target_encoder", 12, 256,
        hub="facebook/vjepa2-vitl-fpc64-256",
    ),
    Released(
        "vith.pt", "2", "vit_huge", "target_encoder", 12, 256,
        hub="facebook/vjepa2-vith-fpc64-256",
    ),
    Released(
        "vitg.pt", "2", "vit_giant", "target_encoder", 12, 256,
        hub="facebook/vjepa2-vitg-fpc64-256",
    ),
    Released(
        "vitg-384.pt", "2", "vit_giant", "target_encoder", 12, 384,
        hub="facebook/vjepa2-vitg-fpc64-384",
    ),
)  # fmt: skip


def as_text() -> str:
    """The catalogue as a table for a terminal."""
    rows = [("file", "V-JEPA", "encoder", "its key", "predictor", "px", "sha256", "hub")]
    rows += [
        (
            one.file, one.generation, one.preset, one.part, f"{one.predictor_depth} blocks",
            str(one.size), one.sha256 or "unknown", one.hub or "",
        )
        for one in RELEASED
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"from {URL}FILE; nothing is downloaded from there by itself"])


def released(file: str) -> Released | None:
    """The released file of this name, None for another."""
    return next((one for one in RELEASED if one.file == file), None)
