"""The official V-JEPA 2.1 losses, distances and moving average through the drop-in, from the golden
steps; and, with a checkout at VJEPA2_CHECKOUT, inside the official modules themselves."""

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastjepa_kernels
from fastjepa.golden import GoldenStep, read_golden
from fastjepa_kernels.integrations import jepa, vjepa2

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
PAGES = [Path(__file__).parents[2] / page for page in ("docs/fused-ops.md", "kernels/README.md")]
NEAR = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, device: torch.device) -> GoldenStep:
    return read_golden(request.param, device, torch.float32)


def groups(golden: GoldenStep, name: str) -> list[list[Tensor]]:
    """A tensor a mask, in the official nesting: clips of one length here."""
    return [[tensor.clone() for _, tensor in sorted(golden.under(f"{name}.").items())]]


def test_golden_losses(golden: GoldenStep, backend: str) -> None:
    masks_pred, masks_enc = groups(golden, "predict_index"), groups(golden, "context_index")
    z_pred, z_context = groups(golden, "z_pred"), groups(golden, "z_context")
    h = [golden["target_features"]]
    options: dict[str, Any] = {"levels": golden.count("levels"), "backend": backend}
    side = golden["clip"].shape[-1] // 16
    distances = vjepa2.compute_mask_distance(masks_pred, masks_enc, side, golden.flag("offset"))
    loss_pred = vjepa2.dense_loss(z_pred, h, masks_pred, False, None, **options)
    loss_context = vjepa2.dense_loss(z_context, h, masks_enc, False, distances, **options)
    unweighted = vjepa2.dense_loss(z_context, h, masks_enc, **options)
    for name, loss in (
        ("loss_pred", loss_pred),
        ("loss_context", loss_context),
        ("loss_context_unweighted", unweighted),
        ("loss", loss_pred + golden.number("lambda") * loss_context),
    ):
        torch.testing.assert_close(loss, golden[name].squeeze(), **NEAR)


def test_golden_loss_of_normalised_targets(golden: GoldenStep) -> None:
    found = vjepa2.dense_loss(
        groups(golden, "z_pred"), [golden["targets_normalised"]], groups(golden, "predict_index"),
        levels=golden.count("levels"), normalize_target=False,
    )  # fmt: skip
    torch.testing.assert_close(found, golden["loss_pred"].squeeze(), **NEAR)


def test_golden_distances(golden: GoldenStep) -> None:
    found = vjepa2.compute_mask_distance(
        groups(golden, "predict_index"), groups(golden, "context_index"),
        golden["clip"].shape[-1] // 16, golden.flag("offset"),
    )  # fmt: skip
    torch.testing.assert_close(found, groups(golden, "distance_sqrt"), **NEAR)


def test_golden_moving_average(golden: GoldenStep, backend: str) -> None:
    names = list(golden.under("after_adamw.encoder."))
    if golden.distilled:
        pytest.skip("a frozen teacher does not move")
    encoder, target = nn.Module(), nn.Module()
    for name in names:
        key = name.replace(".", "_")
        encoder.register_parameter(key, nn.Parameter(golden[f"after_adamw.encoder.{name}"]))
        target.register_parameter(key, nn.Parameter(golden[f"target.{name}"].clone()))
    assert not vjepa2.update_target(encoder, target, 0.99925, backend=backend)
    for name, moved in zip(names, target.parameters(), strict=True):
        torch.testing.assert_close(moved.data, golden[f"after_ema.target.{name}"], **NEAR)


def official_way(
    z: list[list[Tensor]], h: list[Tensor], masks: list[list[Tensor]], levels: int,
    distances: list[list[Tensor]] | None, exponent: float,
) -> Tensor:  # fmt: skip
    """The same loss as the paper writes it: normalise all, gather, compare."""
    parts = []
    for i, target in enumerate(h):
        y = torch.cat([F.layer_norm(t, t.shape[-1:]) for t in target.chunk(levels, -1)], -1)
        for j, mask in enumerate(masks[i]):
            loss = (z[i][j] - y.take_along_dim(mask[..., None], 1)).abs() ** exponent
            if distances is not None:
                loss = loss / distances[i][j][..., None]
            parts.append(loss.mean() / exponent)
    return torch.stack(parts).mean()


def drawn(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Any, Any, Any]:
    """Two clip lengths with two masks each: h, z, masks, distances."""
    h = [torch.randn(2, n, 24, device=device).to(dtype) for n in (12, 30)]
    masks = [
        [torch.stack([torch.randperm(n)[:k] for _ in range(2)]).to(device) for k in kept]
        for n, kept in ((12, (3, 7)), (30, (11, 1)))
    ]
    z = [
        [torch.randn(*m.shape, 24, device=device).to(dtype).requires_grad_() for m in group]
        for group in masks
    ]
    distances = [[torch.rand(m.shape, device=device) + 0.5 for m in group] for group in masks]
    return h, z, masks, distances


@pytest.mark.parametrize("exponent", [1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_clips_of_several_lengths_and_their_gradients(
    exponent: float, weighted: bool, overwrite: bool, backend: str, device: torch.device
) -> None:
    h, z, masks, distances = drawn(device, torch.float32)
    used = distances if weighted else None
    leaves = [leaf for group in z for leaf in group]
    expected = official_way(z, h, masks, 3, used, exponent)
    grads = torch.autograd.grad(expected, leaves)
    predicted = [[leaf * 1.0 for leaf in group] for group in z]
    found = vjepa2.dense_loss(
        predicted, h, masks, False, used, levels=3, loss_exp=exponent,
        overwrite_prediction=overwrite, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), grads, **NEAR)


def test_as_one_graph(backend: str, device: torch.device, called: Callable[[Any], Any]) -> None:
    h, z, masks, distances = drawn(device, torch.float32)
    leaves = [leaf for group in z for leaf in group]
    loss = partial(vjepa2.dense_loss, levels=3, backend=backend)
    found = called(lambda: loss(z, h, masks, False, distances))()
    expected = official_way(z, h, masks, 3, distances, 1.0)
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), **NEAR
    )


def test_a_class_token_in_front(backend: str, device: torch.device) -> None:
    h, _, masks, _ = drawn(device, torch.float32)
    first = [[torch.zeros_like(m[:, :1]) for m in group] for group in masks]
    with_class = [
        [torch.cat([c, m + 1], 1) for c, m in zip(*pair, strict=True)]
        for pair in zip(first, masks, strict=True)
    ]
    longer = [torch.cat([torch.randn(2, 1, 24, device=device), target], 1) for target in h]
    zs = [[torch.randn(*m.shape, 24, device=device) for m in group] for group in with_class]
    found = vjepa2.dense_loss(zs, longer, masks, True, levels=1, backend=backend)
    torch.testing.assert_close(found, official_way(zs, longer, with_class, 1, None, 1.0), **NEAR)


def test_targets_of_half_precision(backend: str, device: torch.device) -> None:
    h, z, masks, _ = drawn(device, torch.bfloat16)
    found = vjepa2.dense_loss(z, h, masks, levels=3, backend=backend)
    wide = [[leaf.float() for leaf in group] for group in z]
    expected = official_way(wide, [t.float() for t in h], masks, 3, None, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("side", [5, 32])
def test_distances_with_an_offset(side: int, device: torch.device) -> None:
    enc, pred = torch.tensor([[0, 1]], device=device), torch.tensor([[side * side + 3]])
    ((found,),) = vjepa2.compute_mask_distance([[pred.to(device)]], [[enc]], side, True)
    distance = torch.tensor([[10.0, 5.0]], device=device).sqrt() / max(1, side // 16)
    torch.testing.assert_close(found, distance.sqrt())


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    h, z, masks, distances = drawn(device, torch.float32)
    for arguments, words in (
        ((z[:1], h, masks), r"z: expected one entry a mask, \[2, 2\].* got \[2\]"),
        ((z, h[:1], masks), r"h: expected one tensor a clip length, 2, got 1"),
        ((z, h, masks, False, distances[:1]), "weights: expected one entry"),
        (([z[0], z[0]], h, masks), r"z\[1\]\[0\]: expected \[B, K, E\] for a mask \(2, 11\)"),
        ((z, [h[0][:1], h[1]], masks), r"masks\[0\]\[0\]: expected 1 clips like h\[0\], got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            vjepa2.dense_loss(*arguments, levels=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"h\[0\]: expected \[B, N, channels of 5 levels\]"):
        vjepa2.dense_loss(z, h, masks, levels=5)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules under the official names that bind what the official ones do."""

    def apply_masks(x: Any, masks: Any, concat: bool = True) -> str:
        return "theirs"

    def compute_mask_distance(
        masks_pred: Any, masks_enc: Any, grid_size: Any, offset_context_loss: Any
    ) -> str:
        return "theirs"

    modules = {}
    for name, bound in (
        ("src.masks.utils", [apply_masks]),
        ("app.vjepa_2_1.models.utils.masks_dist", [compute_mask_distance]),
        ("app.vjepa_2_1.models.vision_transformer", [apply_masks]),
        ("app.vjepa_2_1.train", [apply_masks, compute_mask_distance]),
    ):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, path, modules.setdefault(path, ModuleType(path)))
        for function in bound:
            setattr(modules[name], function.__name__, function)
    return modules


def bindings(modules: dict[str, ModuleType]) -> dict[tuple[str, str], Any]:
    names = ("apply_masks", "compute_mask_distance")
    return {
        (path, name): getattr(module, name)
        for path, module in modules.items()
        for name in names
        if hasattr(module, name)
    }


def test_every_binding_is_replaced_and_put_back(stand_ins: dict[str, ModuleType]) -> None:
    before = bindings(stand_ins)
    with vjepa2.patch():
        during = bindings(stand_ins)
        assert all(during[key] is not before[key] for key in before)
        x, mask = torch.randn(1, 4, 2), torch.tensor([[3, 1]])
        vit = stand_ins["app.vjepa_2_1.models.vision_transformer"]
        assert torch.equal(vit.apply_masks(x, [mask]), x[:, [3, 1]])
        # A module that is loaded meanwhile binds the replacement, and gives it back too.
        late = sys.modules["late"] = ModuleType("late")
        late.apply_masks = stand_ins["src.masks.utils"].apply_masks  # type: ignore[attr-defined]
    assert bindings(stand_ins) == before
    assert late.apply_masks is before["src.masks.utils", "apply_masks"]
    del sys.modules["late"]
    assert vjepa2.apply_masks.__module__.startswith("fastjepa_kernels")


def test_patching_twice_is_patching_once(stand_ins: dict[str, ModuleType]) -> None:
    before = bindings(stand_ins)
    first = vjepa2.patch()
    during = bindings(stand_ins)
    second = vjepa2.patch()
    assert bindings(stand_ins) == during
    second.undo()
    assert bindings(stand_ins) == before
    first.undo()
    assert bindings(stand_ins) == before
    with vjepa2.patch():
        assert bindings(stand_ins) != before
    assert bindings(stand_ins) == before


def test_code_that_looks_otherwise_is_refused_untouched(
    stand_ins: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = stand_ins["app.vjepa_2_1.models.utils.masks_dist"]
    monkeypatch.setattr(distances, "compute_mask_distance", lambda masks, grid: None)
    before = bindings(stand_ins)
    with pytest.raises(ValueError, match=r"compute_mask_distance: expected parameters masks_pred"):
        vjepa2.patch()
    monkeypatch.delattr(distances, "compute_mask_distance")
    with pytest.raises(ValueError, match="expected a function compute_mask_distance, found None"):
        vjepa2.patch()
    monkeypatch.delitem(sys.modules, "src.masks.utils")
    monkeypatch.delitem(sys.modules, "src.masks")
    monkeypatch.setattr(stand_ins["src"], "__path__", [], raising=False)
    with pytest.raises(ValueError, match=r"src\.masks\.utils: no such module; expected the"):
        vjepa2.patch()
    now = bindings(stand_ins)
    assert all(now[key] is before[key] for key in now)


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = os.environ.get("VJEPA2_CHECKOUT")
    if path is None:
        pytest.skip("VJEPA2_CHECKOUT names no checkout of the official code")
    # Imported by the checkout, needless for what is called here.
    for name in ("torchvision", "timm", "timm.models", "timm.models.layers", "einops"):
        stand_in = ModuleType(name)
        stand_in.drop_path = stand_in.rearrange = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.syspath_prepend(path)
    known = set(sys.modules)
    yield Path(path)
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("app", "src"):
            del sys.modules[name]


def closure(checkout: Path, name: str, **variables: Any) -> Any:
    """A function that the official trainer defines inside `main`, with the variables it sees."""
    tree = ast.parse((checkout / "app/vjepa_2_1/train.py").read_text())
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    seen = {"torch": torch, "F": F, **variables}
    exec(compile(ast.Module([found], []), name, "exec"), seen)
    return seen[name]


@pytest.mark.parametrize("levels", [1, 4])
def test_the_official_loss_function(checkout: Path, levels: int, device: torch.device) -> None:
    apply_masks = importlib.import_module("src.masks.utils").apply_masks
    distance = importlib.import_module("app.vjepa_2_1.models.utils.masks_dist")
    h, z, masks, _ = drawn(device, torch.float32)
    width = 24 // levels
    forward_target = closure(
        checkout, "forward_target", target_encoder=lambda c, **_: c, levels_predictor=levels,
        embed_dim_encoder=width,
    )  # fmt: skip
    loss_fn = closure(checkout, "loss_fn", apply_masks=apply_masks, loss_exp=1.0)
    other = [[m.flip(1) for m in group] for group in masks]
    expected_distance = distance.compute_mask_distance(other, masks, 3, False)
    expected_distance = [
        [d.view(m.shape) for d, m in zip(*pair, strict=True)]
        for pair in zip(expected_distance, masks, strict=True)
    ]
    moved = [[d + 1.0 for d in group] for group in expected_distance]
    found_distance = vjepa2.compute_mask_distance(other, masks, 3, False)
    torch.testing.assert_close(found_distance, expected_distance)
    leaves = [leaf for group in z for leaf in group]
    for weights in (None, moved):
        expected = loss_fn(z, forward_target(h), masks, False, weights)
        found = vjepa2.dense_loss(z, h, masks, False, weights, levels=levels)
        torch.testing.assert_close(found, expected, **NEAR)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), **NEAR
        )


def test_the_official_modules_patched_and_restored(checkout: Path, device: torch.device) -> None:
    vit = importlib.import_module("app.vjepa_2_1.models.vision_transformer")
    predictor = importlib.import_module("app.vjepa_2_1.models.predictor")
    distance = importlib.import_module("app.vjepa_2_1.models.utils.masks_dist")
    utils = importlib.import_module("src.masks.utils")
    modules = {m.__name__: m for m in (vit, predictor, distance, utils)}
    before = bindings(modules)
    sizes: dict[str, Any] = {
        "img_size": 32, "num_frames": 4, "depth": 12, "num_heads": 2, "use_rope": True,
        "img_temporal_dim_size": 1, "modality_embedding": True, "interpolate_rope": True,
    }  # fmt: skip
    encoder = vit.VisionTransformer(embed_dim=24, use_sdpa=True, **sizes).to(device)
    heads = predictor.vit_predictor(
        embed_dim=24, predictor_embed_dim=24, use_mask_tokens=True, num_mask_tokens=1,
        return_all_tokens=True, **{**sizes, "depth": 4},
    ).to(device)  # fmt: skip
    clip = torch.randn(2, 3, 4, 32, 32, device=device)
    enc = torch.tensor([[0, 2, 5], [1, 4, 7]], device=device)
    pred = torch.tensor([[1, 3], [2, 6]], device=device)

    def step() -> list[Tensor]:
        z = encoder(clip, masks=[enc], training=True)
        both = heads(z, [enc], [pred])
        loss = sum(part.square().mean() for part in both)
        assert isinstance(loss, Tensor)
        weights = [p for n in (encoder, heads) for p in n.parameters()]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        distances = distance.compute_mask_distance([[pred]], [[enc]], 2, False)
        return [*both, *distances[0], *(g for g in grads if g is not None)]

    expected = step()
    with vjepa2.patch():
        assert all(now is not before[key] for key, now in bindings(modules).items())
        found = step()
    torch.testing.assert_close(found, expected, **NEAR)
    after = bindings(modules)
    assert all(after[key] is before[key] for key in before)
    torch.testing.assert_close(step(), expected, rtol=0, atol=0)


def test_the_pages_name_every_op() -> None:
    ops = [n for n in fastjepa_kernels.__all__ if inspect.isfunction(getattr(fastjepa_kernels, n))]
    assert "gather_tokens" in ops
    for page, beside in zip(PAGES, ((), ("packed_rows", "mask_distance_jagged")), strict=True):
        for op in ops:
            assert op in beside or f"`{op}`" in page.read_text("utf-8"), f"{page.name}: {op}"


def test_the_pages_call_what_exists() -> None:
    """Every call of ours in the documents binds to the function's parameters."""
    known = {"vjepa2": vjepa2, "jepa": jepa}
    bound = set()
    for page in PAGES:
        for text in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                function, arguments = node.func, node.args
                if isinstance(function, ast.Name) and function.id == "partial":
                    function, arguments = arguments[0], []
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                    ours = getattr(known.get(function.value.id), function.attr, None)
                    assert ours or function.value.id not in known, ast.unparse(node)
                else:
                    ours = getattr(fastjepa_kernels, getattr(function, "id", ""), None)
                if ours is None:
                    continue
                options = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(ours).bind_partial(*arguments, **options)  # type: ignore[arg-type]
                bound.add(ours.__name__)
    assert {"patch", "dense_loss", "update_target", "smooth_l1_loss", "l1_loss"} <= bound
    assert {"ema_update", "dense_l1"} <= bound


def test_the_example_for_one_op_runs() -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGES[1].read_text("utf-8"), re.DOTALL)
    seen: dict[str, Any] = {}
    exec(text, seen)
    assert seen["terms"].shape == (2, 2)
    assert seen["z"].grad.abs().sum() > 0
