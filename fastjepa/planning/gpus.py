"""What NVIDIA's data sheets say of the GPUs that the planner knows. Nothing here is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU: dense bf16 operations a second, bytes of memory, bytes a second of memory, and of
    NVLink and its share of the network in each direction."""

    name: str
    bf16_flops: float
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float
    source: str


# Sheets give bf16 with sparsity, twice the dense rate, and NVLink as both directions' sum: halved
# here. The network is the InfiniBand port that the vendor's own eight-GPU system has for each GPU.
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 300e9, 25e9,
        "A100 80GB SXM and DGX A100 data sheets",
    ),
    "h100": Gpu(
        "NVIDIA H100 SXM 80 GB", 989e12, 80e9, 3.35e12, 450e9, 50e9,
        "H100 SXM and DGX H100 data sheets",
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM 141 GB", 989e12, 141e9, 4.8e12, 450e9, 50e9,
        "H200 SXM and DGX H200 data sheets",
    ),
    "b200": Gpu(
        "NVIDIA B200 180 GB", 2250e12, 180e9, 8e12, 900e9, 50e9,
        "DGX B200 data sheet",
    ),
}  # fmt: skip


# How PyTorch names these boards. Others of a family (PCIe, NVL) have other rates.
_BOARDS = {
    "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}  # fmt: skip


def board_peak(device_name: str) -> float | None:
    """Dense bf16 operations a second of a board, by `torch.cuda.get_device_name`; None if it is
    none of those above."""
    known = _BOARDS.get(device_name)
    return None if known is None else GPUS[known].bf16_flops


def gpu_named(name: str) -> Gpu:
    """The GPU of that name in any case; ValueError that lists those known."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}") from None
