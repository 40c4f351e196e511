"""The attentive probe: a class that one token of a clip tells is found wherever it is."""

import torch

from fastjepa.probes.attentive import SETTINGS, AttentiveHead, Clips, attentive_sweep, share_right
from fastjepa.probes.sweep import Samples, Setting


def clips(number: int, seed: int) -> Samples[Clips]:
    """Six tokens of noise, one of them, anywhere, marked by the class: the mean hides it well."""
    random = torch.Generator().manual_seed(seed)
    x_BND = 0.3 * torch.randn(number, 6, 16, generator=random)
    classes_B = torch.randint(3, (number,), generator=random)
    place = torch.randint(6, (number,), generator=random)
    x_BND[torch.arange(number), place] += 2.0 * torch.eye(16)[classes_B]
    return Samples(number, lambda index: Clips(x_BND[index], classes_B[index]))


def test_the_official_sweep_has_twenty_heads() -> None:
    assert len(SETTINGS) == len(set(SETTINGS)) == 20


def test_it_has_three_blocks_and_a_query_and_any_width() -> None:
    head = AttentiveHead(24, 5)
    assert len(head.blocks) == 3
    assert head(torch.randn(2, 7, 24)).shape == (2, 5)
    assert head.attention.num_heads == 8  # 16 do not divide 24


def test_the_place_of_a_token_does_not_matter() -> None:
    torch.manual_seed(0)
    head, x_BND = AttentiveHead(16, 3).eval(), torch.randn(2, 6, 16)
    torch.testing.assert_close(head(x_BND), head(x_BND.flip(1)))


def test_a_class_is_learnt_and_the_better_setting_known() -> None:
    fit, other = clips(192, 0), clips(64, 1)
    settings = [Setting(1e-6, 0.01), Setting(3e-3, 0.01)]
    sweep = attentive_sweep(16, 3, settings=settings, epochs=10, batch=24)
    sweep.train(fit)
    best, scores = sweep.best(lambda head: share_right(head, other))
    assert best == 1
    assert scores[1] > 0.9
