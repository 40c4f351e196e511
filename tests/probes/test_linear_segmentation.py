"""Linear segmentation: what a linear map can tell is told; pictures of any sizes; the best head."""

import torch

from fastjepa.probes.confusion import mean_iou
from fastjepa.probes.linear_segmentation import count, segmentation_loss, segmentation_sweep
from fastjepa.probes.patch_linear import Labelled, PatchLinear, in_memory
from fastjepa.probes.sweep import Samples, Setting


def quadrants(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [S, 8, 8, 6] and labels [S, 32, 32]: a class for each 16 x 16 pixels, told by one
    channel of the patches that lie there, behind noise."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (number, 2, 2), generator=random)

    def spread(times: int) -> torch.Tensor:
        return classes.repeat_interleave(times, 1).repeat_interleave(times, 2)

    signal = torch.nn.functional.one_hot(spread(4), 6).float()
    return signal + 0.3 * torch.randn(signal.shape, generator=random), spread(16)


def test_a_linear_map_is_found_and_the_best_setting_known() -> None:
    fit, other = in_memory(*quadrants(48, 0)), in_memory(*quadrants(16, 1))
    settings = [Setting(1e-6, 0.01), Setting(3e-2, 0.01)]
    sweep = segmentation_sweep(6, 3, settings=settings, epochs=6, batch=8)
    sweep.train(fit)
    best, scores = sweep.best(lambda head: mean_iou(count(head, other, 3)))
    # Edges are blurred: the patches' logits are enlarged.
    assert scores[1] > 0.85
    assert best == 1
    assert scores[0] < 0.6


def test_pictures_of_other_sizes_in_one_batch_count_by_their_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(*size, 6, generator=random) for size in ((2, 3), (4, 4), (2, 3))]
    labels = [torch.randint(3, size, generator=random) for size in ((9, 12), (16, 16), (8, 12))]
    labels[1][:8] = 255
    head = PatchLinear(6, 3).eval()
    whole = segmentation_loss(head, Labelled(features, labels))
    alone = [
        segmentation_loss(head, Labelled([x], [label]))
        for x, label in zip(features, labels, strict=True)
    ]
    pixels = torch.tensor([9 * 12, 8 * 16, 8 * 12])
    torch.testing.assert_close(whole, (torch.stack(alone) * pixels).sum() / pixels.sum())
    samples = Samples(3, lambda index: Labelled(
        [features[i] for i in index], [labels[i] for i in index]
    ))  # fmt: skip
    assert count(head, samples, 3, batch=2).sum() == pixels.sum()


def test_a_picture_without_any_label_costs_nothing() -> None:
    head = PatchLinear(6, 3).eval()
    none = Labelled([torch.randn(2, 2, 6)], [torch.full((8, 8), 255)])
    assert segmentation_loss(head, none).item() == 0.0
