"""Attention by our kernels for AVX-512 against the formula in float64: values, gradients, any
lengths and strides, any threads; and the library that they are compiled to."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastjepa_kernels import native
from fastjepa_kernels.packed_attention import avx512
from fastjepa_kernels.rope3d import reference

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(avx512.__file__).with_suffix(".cpp")


def able(dtype: torch.dtype) -> None:
    refusal = avx512.refusal(CPU, dtype, 64)
    if refusal is not None:
        pytest.skip(refusal)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(shape: tuple[int, ...], deviation: float = 1.0) -> list[Tensor]:
    """q, k, v and what comes from above; `deviation` is the scores'."""
    factors = deviation**0.5, deviation**0.5, 1.0, 1.0
    return [normal(*shape, seed=seed) * factor for seed, factor in enumerate(factors)]


def run(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    out, lse = avx512.forward(q, k, v)
    return [out, *avx512.backward(upstream, q, k, v, out, lse)]


def by(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, upstream: Tensor
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    length=st.one_of(
        st.integers(1, 300),
        st.sampled_from([1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 290]),
    ),
    channels=st.sampled_from(avx512.CHANNELS),
    deviation=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_values_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, batch: int, heads: int, length: int, channels: int, deviation: float
) -> None:
    able(dtype)
    narrow = [t.to(dtype) for t in inputs((batch, heads, length, channels), deviation)]
    exact = by(formula, *(t.double() for t in narrow))
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2e-2}[dtype]
    for ours, truth in zip(run(*narrow), exact, strict=True):
        assert ours.dtype == dtype
        # Of few tokens gradients are differences of nearly equal numbers.
        scale = truth.norm().clamp_min((truth.numel() / length) ** 0.5 / 2)
        assert (ours.double() - truth).norm() <= tolerance * scale


def rotary_inputs(
    batch: int, heads: int, length: int, channels: int, tables: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k and v, a table, and what comes from above."""
    angle = 3 * normal(tables, length, channels // 2, seed=1)
    return (
        normal(batch, length, 3, heads, channels, seed=0),
        torch.stack([angle.cos(), angle.sin()], -1),
        normal(batch, length, heads, channels, seed=2),
    )


def run_rotary(qkv: Tensor, table: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, the packed gradient and its sum."""
    out, grad = torch.empty_like(upstream), torch.empty_like(qkv)
    lse = avx512.rotary_forward(qkv, table, out)
    return out, lse, grad, avx512.rotary_backward(upstream, qkv, table, out, lse, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    length=st.one_of(st.integers(1, 120), st.sampled_from([191, 192, 193, 250])),
    channels=st.sampled_from(avx512.CHANNELS),
    shared=st.booleans(),
)
def test_packed_heads_are_turned_there_and_back(
    dtype: torch.dtype, batch: int, heads: int, length: int, channels: int, shared: bool
) -> None:
    """The table may be one for all sequences."""
    able(dtype)
    tables = 1 if shared else batch
    qkv, table, upstream = rotary_inputs(batch, heads, length, channels, tables)
    qkv, upstream, table = qkv.to(dtype), upstream.to(dtype), table.float()
    leaf = qkv.double().requires_grad_()
    q, k, v = reference.rope3d(leaf, table.double()).permute(2, 0, 3, 1, 4)
    exact = formula(q, k, v).transpose(1, 2)
    (exact_grad,) = torch.autograd.grad(exact, leaf, upstream.double())
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2e-2}[dtype]

    out, lse, grad, total = run_rotary(qkv, table, upstream)
    assert (out - exact).norm() <= tolerance * exact.norm()
    bound = {torch.float32: 4e-6, torch.bfloat16: 1e-1}[dtype]
    assert bool(((lse - (q @ k.mT * channels**-0.5).logsumexp(-1)).abs() <= bound).all())
    scale = exact_grad.norm().clamp_min((grad.numel() / length) ** 0.5 / 2)
    assert (grad - exact_grad).norm() <= tolerance * scale
    # Where all gradients of keys cancel, what is left is their roundings.
    assert total.dtype == torch.float32
    assert (total - exact_grad.sum((0, 1))).norm() <= tolerance * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_heads_may_be_parts_of_wider_rows(dtype: torch.dtype) -> None:
    able(dtype)
    qkv, table, upstream = rotary_inputs(2, 3, 70, 32, 2)
    qkv, upstream, table = qkv.to(dtype), upstream.to(dtype), table.float()

    def apart(x: Tensor) -> Tensor:
        wide = x.new_empty(2 * len(x), x.shape[1] + 1, *x.shape[2:-1], x.shape[-1] + 8)
        return wide[::2, 1:, ..., 3 : 3 + x.shape[-1]].copy_(x)

    wide_table = torch.cat([table, table], 1)[:, :70]
    plain, strided = (
        run_rotary(qkv, table, upstream),
        run_rotary(apart(qkv), wide_table, apart(upstream)),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
def test_it_is_as_exact_as_pytorchs_flash_attention(
    deviation: float, channels: int, dtype: torch.dtype
) -> None:
    able(dtype)
    wide = inputs((2, 3, 1451, channels), deviation)
    narrow = [t.to(dtype) for t in wide]
    exact = by(formula, *(t.double() for t in narrow))
    flash = by(F.scaled_dot_product_attention, *narrow)
    for ours, theirs, truth in zip(run(*narrow), flash, exact, strict=True):
        error, error_ref = ((t.double() - truth).norm() for t in (ours, theirs))
        assert error <= 2 * error_ref


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exps_are_exact_in_either_dtype(dtype: torch.dtype) -> None:
    able(dtype)
    q, k, v, _ = (t.to(dtype) for t in inputs((1, 2, 500, 64), 4.0))
    _, lse = avx512.forward(q, k, v)
    exact = (q.double() @ k.double().mT / 8).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert (lse - exact).abs().max() <= 4e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_taken_as_they_come(dtype: torch.dtype) -> None:
    """Tokens before heads, parts of a wider row, an odd offset, channels apart."""
    able(dtype)
    batch, heads, length, channels = 2, 3, 70, 32
    packed = normal(batch, length, 4, heads, channels, seed=0).to(dtype)
    q, k, v, upstream = packed.permute(2, 0, 3, 1, 4)
    odd = normal(batch, heads, length, channels + 1, seed=1).to(dtype)[..., 1:]
    apart = normal(batch, heads, channels, length, seed=2).to(dtype).mT
    for given_ in ([q, k, v, upstream], [odd, k, v, upstream], [apart, apart, apart, apart]):
        plain = [t.contiguous() for t in given_]
        for ours, theirs in zip(run(*given_), run(*plain), strict=True):
            assert torch.equal(ours, theirs)
    out, _ = avx512.forward(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_threads")
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    able(dtype)
    narrow = [t.to(dtype) for t in inputs((1, 3, 200, 64))]
    qkv, table, upstream = rotary_inputs(2, 3, 200, 64, 1)

    def both() -> list[Tensor]:
        return [*run(*narrow), *run_rotary(qkv.to(dtype), table.float(), upstream.to(dtype))]

    torch.set_num_threads(1)
    alone = both()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(both(), alone, strict=True))


def test_nothing_is_attended_to_by_nobody() -> None:
    able(torch.float32)
    empty = torch.empty(2, 3, 0, 32)
    out, lse = avx512.forward(empty, empty, empty)
    grads = avx512.backward(empty, empty, empty, empty, out, lse)
    assert all(t.shape == empty.shape for t in (out, *grads))


def test_too_little_memory_is_an_error() -> None:
    """Not the end of the process: a run that does not fit says so and what would."""
    able(torch.float32)
    program = (
        "import resource, torch; from fastjepa_kernels.packed_attention import avx512; "
        "avx512.forward(*torch.zeros(3, 1, 2, 8, 32)); x = torch.zeros(3, 1, 64, 2048, 64); "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 50 * 2**20, -1)); avx512.forward(*x)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "MemoryError: packed_attention, forward: not enough memory" in done.stderr


def test_what_does_not_fit_is_an_error() -> None:
    """Not a read or a write beside it."""
    able(torch.float32)
    q = torch.zeros(2, 3, 9, 32)
    lse = torch.zeros(2, 3, 9)
    with pytest.raises(
        ValueError, match=r"v: expected torch.float32 \[2, 3, 9, 32\].*\[2, 3, 8, 32"
    ):
        avx512.forward(q, q, q[:, :, :8])
    with pytest.raises(ValueError, match=r"out: expected torch.float32.*got torch.bfloat16"):
        avx512.backward(q, q, q, q, q.bfloat16(), lse)
    with pytest.raises(ValueError, match=r"attention by avx512: it takes heads of 32, 64 or 128"):
        avx512.forward(q[..., :16], q[..., :16], q[..., :16])
    qkv, table, out = (
        torch.zeros(2, 9, 3, 3, 32),
        torch.zeros(1, 9, 16, 2),
        torch.zeros(2, 9, 3, 32),
    )
    with pytest.raises(ValueError, match=r"out: expected .*\[2, 9, 3, 32\].*\[2, 8, 3, 32\]"):
        avx512.rotary_forward(qkv, table, out[:, :8])
    with pytest.raises(
        ValueError, match=r"table: expected \[2 or 1, 9, 16, 2\], got \[3, 9, 16, 2"
    ):
        avx512.rotary_forward(qkv, table.expand(3, -1, -1, -1), out)
    with pytest.raises(ValueError, match=r"table: expected float32 pairs side by side"):
        avx512.rotary_forward(qkv, table.double(), out)
    with pytest.raises(ValueError, match=r"expected channels side by side"):
        avx512.rotary_forward(qkv, table, out.mT.contiguous().mT)
    with pytest.raises(
        ValueError, match=r"dqkv: expected .*\[2, 9, 3, 3, 32\].*\[1, 9, 3, 3, 32\]"
    ):
        avx512.rotary_backward(out, qkv, table, out, lse, qkv[:1])


def test_a_refusal_says_why() -> None:
    assert avx512.refusal(torch.device("cuda"), torch.float32, 64) == "it needs a CPU, not cuda"
    assert "float64" in str(avx512.refusal(CPU, torch.float64, 64))
    assert "not 24" in str(avx512.refusal(CPU, torch.float32, 24))


def test_a_processor_without_avx512_is_told_apart() -> None:
    """PyTorch is asked, which takes a ceiling from its environment."""
    program = (
        "import torch; from fastjepa_kernels.packed_attention import avx512; "
        "print(avx512.refusal(torch.device('cpu'), torch.float32, 64))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert "no AVX-512" in done.stdout


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SMALL = 'extern "C" int answer() { return ANSWER; }'


@pytest.fixture
def small(tmp_path: Path) -> Path:
    try:
        native._compiler()
    except native.CannotCompileError as error:
        pytest.skip(str(error))
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    return source


@pytest.mark.usefixtures("_elsewhere")
def test_a_source_is_compiled_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load(small, ["-DANSWER=42"]).answer() == 42
    (kept,) = native._cache().iterdir()
    kept.write_bytes(b"cut short")
    assert native.load(small, ["-DANSWER=42"]).answer() == 42
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
        assert native.load(small, ["-DANSWER=42"]).answer() == 42
    assert native.load(small, ["-DANSWER=43"]).answer() == 43
    small.write_text(SMALL.replace("ANSWER;", "-ANSWER;"))
    assert native.load(small, ["-DANSWER=43"]).answer() == -43
    header = small.with_suffix(".h")
    small.write_text(f'#include "{header.name}"\n{SMALL}')
    for answer in (44, 45):
        header.write_text(f"#define ANSWER {answer}\n")
        assert native.load(small, []).answer() == answer


def test_without_a_place_for_it_a_process_compiles_for_itself(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small.with_name("no folder")
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert native.load(small, ["-DANSWER=42"]).answer() == 42


@pytest.mark.usefixtures("_elsewhere")
def test_what_fails_says_how(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(native.CannotCompileError, match=r"error: .*ANSWER"):
        native.load(small, [])
    small.write_text('extern "C" int missing(); extern "C" int answer() { return missing(); }')
    with pytest.raises(native.CannotCompileError, match=r"does not load: .*missing"):
        native.load(small, [])
    assert not native._cache().exists() or not list(native._cache().iterdir())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.CannotCompileError, match=r"there is no C\+\+ compiler"):
        native.load(small, [])


def test_openmps_threads_are_pytorchs() -> None:
    """A second runtime would want the same cores."""
    able(torch.float32)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("what a process has loaded is told by /proc")
    program = (
        "import torch; from fastjepa_kernels.packed_attention import avx512; "
        "avx512.forward(*torch.zeros(3, 1, 2, 8, 32)); print(open('/proc/self/maps').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    files = {Path(line.split()[-1]).resolve() for line in done.stdout.splitlines() if "/" in line}
    assert len([f for f in files if f.name.startswith(("libgomp", "libomp", "libiomp"))]) == 1
