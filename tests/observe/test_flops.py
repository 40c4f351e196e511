"""Parameters equal the released models'; operations equal PyTorch's own count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.model import Encoder as RealEncoder
from fastjepa.model import Predictor as RealPredictor
from fastjepa.model import build_encoder
from fastjepa.observe.flops import (
    EncoderNumbers,
    PredictorNumbers,
    TokenNumbers,
    block_flops,
    block_parameters,
    encoder_flops,
    encoder_parameters,
    predictor_flops,
    predictor_parameters,
    step_flops,
)
from fastjepa.presets import PRESETS


def encoder(name: str) -> EncoderNumbers:
    size = PRESETS[name]
    return EncoderNumbers(size.width, size.depth, size.heads, size.mlp_width, len(size.levels))


def predictor(of: EncoderNumbers, *, depth: int, levels: int, out_width: int) -> PredictorNumbers:
    return PredictorNumbers(384, depth, 12, 1536, of.width, levels, out_width)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_base", 86_833_152),
        ("vit_large", 304_680_960),
        ("vit_giant", 1_013_267_968),
        ("vit_gigantic", 1_845_216_768),
    ],
)
def test_encoders_have_the_released_number_of_parameters(name: str, parameters: int) -> None:
    assert encoder_parameters(encoder(name)) == parameters


@pytest.mark.parametrize(
    ("name", "depth", "levels", "out", "millions"),
    [
        ("vit_base", 12, 4, None, 26.3),
        ("vit_large", 24, 4, None, 50.3),
        ("vit_giant", 24, 4, None, 55.4),
        ("vit_gigantic", 24, 4, None, 59.4),
        ("vit_base", 12, 1, 1664, 22.9),
        ("vit_large", 12, 1, 1664, 23.0),
    ],
)
def test_predictors_have_the_released_number_of_parameters(
    name: str, depth: int, levels: int, out: int | None, millions: float
) -> None:
    size = encoder(name)
    numbers = predictor(size, depth=depth, levels=levels, out_width=out or levels * size.width)
    assert round(predictor_parameters(numbers) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "depth", "batch", "context", "predicted", "tera"),
    [
        ("vit_base", 12, 96, (429, 104), (895, 1430), 164),
        ("vit_large", 24, 48, (464, 114), (919, 1430), 231),
        ("vit_giant", 24, 48, (464, 114), (919, 1430), 559),
        ("vit_gigantic", 24, 24, (506, 128), (956, 1430), 488),
    ],
)
def test_a_released_step_costs_what_was_counted_on_the_official_code(
    name: str,
    depth: int,
    batch: int,
    context: tuple[int, int],
    predicted: tuple[int, int],
    tera: float,
) -> None:
    size = encoder(name)
    cost = step_flops(
        size,
        predictor(size, depth=depth, levels=4, out_width=4 * size.width),
        TokenNumbers(2048, context, predicted),
        batch=batch,
        checkpointing=True,
    )
    assert cost.total / 1e12 == pytest.approx(tera, rel=0.03)
    assert cost.target.backward == cost.target.recompute == 0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("levels", "out"), [(4, None), (1, 1664)])
def test_parameters_are_those_of_the_modules(name: str, levels: int, out: int | None) -> None:
    numbers = encoder(name)
    with torch.device("meta"):
        built = build_encoder(name)
        guesser = RealPredictor(
            encoder_width=numbers.width, num_levels=levels, depth=12, out_width=out
        )
    assert sum(p.numel() for p in built.parameters()) == encoder_parameters(numbers)
    expected = predictor(numbers, depth=12, levels=levels, out_width=out or levels * numbers.width)
    assert sum(p.numel() for p in guesser.parameters()) == predictor_parameters(expected)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self, n: EncoderNumbers) -> None:
        super().__init__()
        self.video = nn.Linear(3 * n.tubelet * n.patch**2, n.width)
        self.image = nn.Linear(3 * n.patch**2, n.width)
        self.modality = nn.Parameter(torch.zeros(2, n.width))
        self.blocks = nn.ModuleList(Block(n.width, n.heads, n.mlp_width) for _ in range(n.depth))
        self.norms = nn.ModuleList(nn.LayerNorm(n.width) for _ in range(n.levels))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.video(patches) + self.modality[0]
        outputs = []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = block(x)
            outputs.append(norm(x))
        return torch.cat(outputs, -1)


class Predictor(nn.Module):
    def __init__(self, n: PredictorNumbers) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(n.in_levels * n.in_width, n.in_width),
            nn.GELU(),
            nn.Linear(n.in_width, n.width),
        )
        self.mask = nn.Parameter(torch.zeros(n.mask_tokens, 1, 1, n.width))
        self.modality = nn.Parameter(torch.zeros(2, n.width))
        self.blocks = nn.ModuleList(Block(n.width, n.heads, n.mlp_width) for _ in range(n.depth))
        self.norm = nn.LayerNorm(n.width)
        self.head, self.context = (nn.Linear(n.width, n.out_width) for _ in range(2))

    def forward(self, x: Tensor, predicted: int) -> tuple[Tensor, Tensor]:
        kept = x.shape[1]
        masks = self.mask[0].expand(len(x), predicted, -1)
        x = torch.cat([self.embed(x), masks], 1) + self.modality[0]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, kept:]), self.context(x[:, :kept])


ENCODER = EncoderNumbers(32, 2, 2, 80, 2, patch=4)
PREDICTOR = PredictorNumbers(24, 3, 2, 96, 32, 2, 64, mask_tokens=3)


def test_numbers_agree_with_modules_built_by_hand() -> None:
    encoder, predictor = Encoder(ENCODER), Predictor(PREDICTOR)
    assert sum(p.numel() for p in encoder.parameters()) == encoder_parameters(ENCODER)
    assert sum(p.numel() for p in predictor.parameters()) == predictor_parameters(PREDICTOR)
    block = Block(24, 2, 96)
    assert sum(p.numel() for p in block.parameters()) == block_parameters(24, 96)
    assert block_flops(24, 96, 10) == 2 * 10 * (4 * 24**2 + 2 * 24 * 96) + 4 * 100 * 24


def test_products_of_a_step_equal_pytorchs_own_count() -> None:
    batch, grid, kept, guessed = 2, 24, 7, 12
    encoder, predictor = Encoder(ENCODER), Predictor(PREDICTOR)
    patches = torch.randn(batch, grid, 96)
    numbers = step_flops(ENCODER, PREDICTOR, TokenNumbers(grid, (kept,), (guessed,)), batch=batch)

    def count(work: object) -> int:
        with FlopCounterMode(display=False) as counter:
            assert callable(work)
            work()
        return counter.get_total_flops()

    # The counter knows attention only as its two products, so let it see them.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with torch.no_grad():
            assert count(lambda: encoder(patches)) == numbers.target.forward
        assert count(lambda: encoder(patches[:, :kept])) == numbers.context.forward
        features = encoder(patches[:, :kept]).detach().requires_grad_()
        assert count(lambda: predictor(features, guessed)) == numbers.predictor.forward

        outputs = predictor(features, guessed)
        assert count(lambda: sum(o.sum() for o in outputs).backward()) == (  # type: ignore[union-attr]
            numbers.predictor.backward
        )
        context = encoder(patches[:, :kept]).sum()
        assert count(lambda: context.backward()) == numbers.context.backward


def test_products_of_the_real_encoder_and_predictor() -> None:
    size = EncoderNumbers(32, 2, 2, 80, 2, patch=8)
    encoder = RealEncoder(
        width=32, depth=2, heads=2, mlp_width=80, levels=(0, 1), patch=8, attention="math"
    )
    guesser = RealPredictor(
        encoder_width=32, num_levels=2, width=24, depth=3, heads=2, patch=8, attention="math"
    )
    clip = torch.randn(2, 3, 4, 32, 24)
    kept, guessed = [torch.arange(7).repeat(2, 1)], [torch.arange(7, 19).repeat(2, 1)]
    numbers = step_flops(size, PREDICTOR, TokenNumbers(24, (7,), (12,)), batch=2)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            encoder(clip)
        assert counter.get_total_flops() == numbers.target.forward
        with FlopCounterMode(display=False) as counter:
            levels = encoder(clip, kept)
        assert counter.get_total_flops() == numbers.context.forward
        with FlopCounterMode(display=False) as counter:
            rows = guesser(levels, kept, guessed, (2, 4, 3), image=False)
            guesser.predictor_proj(rows[0])
            guesser.predictor_proj_context(rows[1])
        assert counter.get_total_flops() == numbers.predictor.forward


def test_the_parts_add_up_and_groups_add() -> None:
    def step(*groups: tuple[int, int], **more: bool) -> int:
        tokens = TokenNumbers(24, tuple(g[0] for g in groups), tuple(g[1] for g in groups))
        return step_flops(ENCODER, PREDICTOR, tokens, batch=3, **more).total

    target = 3 * encoder_flops(ENCODER, 24)
    assert step((7, 12), (3, 20)) - target == step((7, 12)) + step((3, 20)) - 2 * target
    assert step((7, 12), checkpointing=True) > step((7, 12))
    tokens = TokenNumbers(24, (7,), (12,))
    every, encoder = (
        step_flops(ENCODER, PREDICTOR, tokens, batch=3, checkpointing=blocks)
        for blocks in (True, "encoder")
    )
    assert encoder.recompute == every.context.recompute == encoder.context.recompute
    assert predictor_flops(PREDICTOR, 7, 12) < predictor_flops(PREDICTOR, 7, 13)


def test_an_image_is_cheaper_to_tokenize_and_a_wider_teacher_dearer() -> None:
    tokens = TokenNumbers(24, (7,), (12,))
    image = step_flops(ENCODER, PREDICTOR, TokenNumbers(24, (7,), (12,), image=True), batch=1)
    video = step_flops(ENCODER, PREDICTOR, tokens, batch=1)
    assert video.target.forward - image.target.forward == 2 * 24 * 3 * 16 * 32
    teacher = EncoderNumbers(64, 2, 2, 160, 2, patch=4)
    distilled = step_flops(ENCODER, PREDICTOR, tokens, batch=1, target=teacher)
    assert distilled.target.forward == encoder_flops(teacher, 24) > video.target.forward
    assert distilled.context == video.context


@pytest.mark.parametrize(
    ("context", "predicted", "words"),
    [
        ((7,), (12, 3), "1 context groups for 2"),
        ((20,), (12,), "grid of 24"),
        ((0,), (12,), "0 con"),
    ],
)
def test_token_counts_that_cannot_be_are_refused(
    context: tuple[int, ...], predicted: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        TokenNumbers(24, context, predicted)
