"""The engine: AdamW by hand, EMA, clipping, precision, and steps that must not count."""

import torch
from torch import Tensor, nn

from fastjepa.train.engine import TorchEngine


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2)


def make(**options: object) -> tuple[TorchEngine, tuple[nn.Module, nn.Module, nn.Module]]:
    parts = networks()
    encoder, predictor, target = parts
    engine = TorchEngine(encoder=encoder, predictor=predictor, target=target, **options)  # type: ignore[arg-type]
    return engine, parts


def backward(engine: TorchEngine, parts: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    encoder, predictor, _ = parts
    engine.backward(predictor(encoder(torch.ones(1, 3))).square().sum())


def step(engine: TorchEngine, *, veto: float = 0.0, lr: float = 1e-2) -> None:
    engine.step(lr=lr, weight_decay=0.1, momentum=0.9, veto=torch.tensor(veto))


def values(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def test_a_step_is_adamw_then_the_average_of_its_result() -> None:
    engine, parts = make(betas=(0.9, 0.99), eps=1e-8)
    weights, averages = values(*parts[:2]), values(parts[2])
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for number in range(1, 4):
        backward(engine, parts)
        for i, grad in enumerate(g.clone() for g in engine.gradients()):
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.99 * second[i] + 0.01 * grad**2
            if weights[i].ndim > 1:
                weights[i] = weights[i] * (1 - 1e-2 * 0.1)
            size = (second[i] / (1 - 0.99**number)).sqrt() + 1e-8
            weights[i] = weights[i] - 1e-2 * first[i] / (1 - 0.9**number) / size
        step(engine)
        averages = [0.9 * a + 0.1 * w for a, w in zip(averages, weights[:2], strict=True)]
        torch.testing.assert_close(values(*parts[:2]), weights)
        torch.testing.assert_close(values(parts[2]), averages)


def test_gradients_are_gone_after_a_step_and_add_up_before() -> None:
    engine, parts = make()
    backward(engine, parts)
    once = [g.clone() for g in engine.gradients()]
    backward(engine, parts)
    torch.testing.assert_close(engine.gradients(), [2 * g for g in once])
    step(engine)
    assert engine.gradients() == []


def test_a_vetoed_step_changes_no_bit() -> None:
    engine, parts = make()
    backward(engine, parts)
    step(engine)
    before = values(*parts)
    moments = {
        i: {k: v.clone() for k, v in state.items()}
        for i, state in engine.optimizer.state_dict()["state"].items()
    }
    backward(engine, parts)
    for gradient in engine.gradients():
        gradient.fill_(torch.nan)
    step(engine, veto=1.0)
    assert all(torch.equal(a, b) for a, b in zip(values(*parts), before, strict=True))
    for i, state in engine.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[i][k]) for k, v in state.items()), i
    assert engine.gradients() == []
    # The next good step is the one that would have come without it.
    other, others = make()
    for _ in range(2):
        backward(other, others)
        step(other)
    backward(engine, parts)
    step(engine)
    assert all(torch.equal(a, b) for a, b in zip(values(*parts), values(*others), strict=True))


def test_no_gradient_is_kept_for_the_target() -> None:
    _, parts = make()
    assert not any(p.requires_grad for p in parts[2].parameters())


def test_the_norm_is_that_of_all_gradients_and_clip_bounds_it() -> None:
    engine, parts = make()
    backward(engine, parts)
    plain = [g.clone() for g in engine.gradients()]
    expected = torch.cat([g.flatten() for g in plain]).norm()
    torch.testing.assert_close(engine.grad_norm(), expected)
    assert all(torch.equal(a, b) for a, b in zip(engine.gradients(), plain, strict=True))

    tight, others = make(clip=expected.item() / 4)
    backward(tight, others)
    torch.testing.assert_close(tight.grad_norm(), expected)
    torch.testing.assert_close(tight.gradients(), [g / 4 for g in plain], rtol=1e-4, atol=1e-6)

    loose, others = make(clip=expected.item() * 2)
    backward(loose, others)
    loose.grad_norm()
    assert all(torch.equal(a, b) for a, b in zip(loose.gradients(), plain, strict=True))


def test_lr_and_decay_are_those_of_the_call() -> None:
    engine, _ = make(weight_decay=0.04)
    engine.step(lr=0.5, weight_decay=0.3, momentum=1.0, veto=torch.tensor(0.0))
    for group in engine.optimizer.param_groups:
        assert group["lr"] == 0.5
        assert group["weight_decay"] == (0.3 if group["decay"] else 0.0)


def test_bfloat16_is_a_matter_of_products_alone() -> None:
    engine, parts = make(dtype=torch.bfloat16)
    with engine.autocast():
        assert parts[0](torch.ones(1, 3)).dtype == torch.bfloat16
        loss = parts[1](parts[0](torch.ones(1, 3))).float().sum()
    engine.backward(loss)
    assert {g.dtype for g in engine.gradients()} == {torch.float32}
    step(engine)
    assert {v.dtype for v in values(*parts)} == {torch.float32}
    assert {v.dtype for s in engine.optimizer.state.values() for v in s.values()} == {torch.float32}
    plain, parts = make()
    with plain.autocast():
        assert parts[0](torch.ones(1, 3)).dtype == torch.float32
