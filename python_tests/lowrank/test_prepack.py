"""Packed frozen weights: the numbers of lora_linear with one, what the layer keeps promising, and the decision."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from oracle import check_op
from torch import nn
from torch.utils.checkpoint import checkpoint

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.lowrank import autograd, prepack
from lwft_kernels.lowrank.packed_weight import PackedWeight, hold_packed, hold_plain
from lwft_kernels.nn import LoRALinear

pytestmark = pytest.mark.usefixtures("native")

WORTH_IT = {"16": 2.0, "64": 1.5, "128": 1.2, "1024": 0.9}
NOT_WORTH_IT = {"16": 1.0, "64": 1.1, "128": 0.9, "1024": 0.8}


@pytest.fixture(autouse=True)
def measures(monkeypatch, tmp_path):
    """What was measured, by key, in place of a measurement: none here depends on how fast the machine is."""
    calls = []

    def measure(d_out, d_in, dtype):
        calls.append((d_out, d_in, dtype))
        return dict(WORTH_IT)

    monkeypatch.setenv("LWFT_PREPACK_CACHE", str(tmp_path / "measured" / "prepack.json"))
    monkeypatch.setattr(prepack, "_measure", measure)
    monkeypatch.setattr(prepack, "_known", {})
    return calls


def packable(dtype):
    return torch.ops.lwft.packed_weight_bytes(torch.empty(2, 2, dtype=dtype)) > 0


DTYPES = [dtype for dtype in (torch.float32, torch.float64, torch.bfloat16) if packable(dtype)]


def packed_layer(bias=True, dtype=torch.float32, sizes=(24, 40), **options):
    """One whose branch does something, and the bits of its weight."""
    linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
    layer = LoRALinear.from_linear(linear, rank=4, lora_alpha=8, prepack=True, **options)
    nn.init.normal_(layer.lora_b, std=0.5)
    assert type(layer.weight) is PackedWeight
    return layer.eval(), layer.weight.unpack()


# ---- the numbers ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 33), (33, 24), (130, 600), (300, 70), (513, 257)], ids=str)
def test_accuracy(shape, dtype):
    d_in, d_out = shape
    for tokens in (0, 1, 7, 33, 130, 300):
        for dropout_p in (0.0, 0.3):
            arguments = {
                "x": torch.randn(tokens, d_in, dtype=torch.float64).requires_grad_(),
                "weight": torch.randn(d_out, d_in, dtype=torch.float64) / d_in**0.5,
                "bias": torch.randn(d_out, dtype=torch.float64).requires_grad_(),
                "lora_a": (torch.randn(4, d_in, dtype=torch.float64) / d_in**0.5).requires_grad_(),
                "lora_b": torch.randn(d_out, 4, dtype=torch.float64).requires_grad_(),
                "scale": 0.75,
                "dropout_p": dropout_p,
            }

            def ours(weight, **rest):
                torch.manual_seed(0)
                return LF.lora_linear(weight=PackedWeight.pack(weight), **rest)

            def reference(**rest):
                torch.manual_seed(0)
                with lwft_kernels.use_backend("reference"):
                    return LF.lora_linear(**rest)

            check_op(ours, reference, arguments, dtype, note=f"{tokens} tokens, dropout {dropout_p}")


def test_gradcheck():
    weight = PackedWeight.pack(torch.randn(7, 5, dtype=torch.float64))
    x, bias, a, b = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((9, 5), (7,), (2, 5), (7, 2))
    )
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: LF.lora_linear(x, weight, bias, a, b, scale=0.5), (x, bias, a, b)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    blocks = torch.ops.lwft.pack_weight(torch.randn(40, 24, dtype=dtype))
    x, a, b = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((5, 24), (4, 24), (40, 4)))
    for arguments in ((x, blocks, None, a, b, None, None, 0.5, 0.0),):
        torch.library.opcheck(torch.ops.lwft.lora_linear_forward.default, arguments)
    torch.library.opcheck(torch.ops.lwft.unpack_weight_.default, (torch.empty(40, 24, dtype=dtype), blocks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 70, 500])
def test_the_same_bits_for_any_number_of_threads(tokens, dtype):
    layer, _ = packed_layer(dtype=dtype, sizes=(600, 530))
    layer.to(dtype)
    x = torch.randn(tokens, 600, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            results.append((out, *torch.autograd.grad(out, (leaf, layer.lora_a, layer.lora_b), torch.ones_like(out))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.skipif(torch.ops.lwft.cpu_isa() == "baseline", reason="there is one level only")
def test_every_level_of_this_machine():
    """The test of accuracy again, in a process for each level below the one in use."""
    levels = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    for level in levels[: levels.index(torch.ops.lwft.cpu_isa())]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "accuracy or pickles", __file__]
        found = subprocess.run(command, env={**os.environ, "LWFT_CPU_ISA": level}, capture_output=True, text=True)
        assert found.returncode == 0, f"{level}: {found.stdout[-3000:]}"


def test_compile_checkpoint_and_autocast():
    layer, bits = packed_layer(sizes=(64, 48))
    x = torch.randn(5, 64, requires_grad=True)
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    torch.compiler.reset()
    for call in (torch.compile(layer, fullgraph=True), lambda x: checkpoint(layer, x, use_reentrant=False)):
        out = call(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], grad)
    lwft_kernels.reset_stats()
    plain = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16), lwft_kernels.use_backend("auto"):
        assert torch.equal(layer(x), plain.to(torch.float32)(x)) or packable(torch.bfloat16)
        assert layer(x).dtype == torch.bfloat16
    (reason,) = lwft_kernels.stats()["lora_linear"]["declined"]
    assert "unpacks and casts" in reason
    assert torch.equal(layer.weight.unpack(), bits)


# ---- the layer is the layer that it was ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_copies_and_pickles_are_plain(dtype):
    layer, bits = packed_layer(dtype=dtype)
    weight, x = layer.weight, torch.randn(30, 24, dtype=dtype)
    assert isinstance(weight, nn.Parameter) and weight.shape == (40, 24) and weight.dtype == dtype
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_a", "lora_b"]
    state = layer.state_dict()
    assert type(state["weight"]) is torch.Tensor and torch.equal(state["weight"], bits)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin.weight) is nn.Parameter and torch.equal(twin.weight, bits) and not twin.weight.requires_grad
        torch.testing.assert_close(twin(x), layer(x))
    assert "prepacked" in repr(layer) and "prepacked" not in repr(copy.deepcopy(layer))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other, _ = packed_layer(dtype=dtype)
    kept = other.weight
    other.load_state_dict(torch.load(file))
    assert other.weight is kept and type(kept) is PackedWeight and torch.equal(kept.unpack(), bits)
    assert torch.equal(other(x), layer(x))


def test_the_plain_memory_is_given_back():
    linear = nn.Linear(300, 200).requires_grad_(False)
    storage = torch.multiprocessing.reductions.StorageWeakRef(linear.weight.untyped_storage())
    hold_packed(linear)
    assert storage.expired()
    padding = 1.3  # 200 columns are padded to whole vectors
    assert linear.weight.blocks.nbytes <= padding * linear.weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_restores_the_object(dtype):
    linear = nn.Linear(33, 70, dtype=dtype)
    weight, bits = linear.weight, linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, prepack=True)
    assert layer.weight is weight and type(weight) is PackedWeight
    assert layer.prepack() == "its weight is packed already"
    for _ in range(2):
        layer.unpack()
        assert layer.weight is weight and type(weight) is nn.Parameter and torch.equal(weight, bits)


def test_unpack_while_a_graph_holds_the_weight():
    linear = nn.Linear(24, 40).requires_grad_(False)
    bits = linear.weight.clone()
    hold_packed(linear)
    kept = linear.weight.view_as(linear.weight), torch.nn.Parameter  # noqa: F841
    holder = [linear.weight.data]
    x = torch.randn(3, 24, requires_grad=True)
    out = linear(x)
    hold_plain(linear)
    assert type(linear.weight) is nn.Parameter and torch.equal(linear.weight, bits)
    assert torch.equal(holder[0].unpack(), bits)
    out.sum().backward()


def test_moves_and_casts():
    layer, bits = packed_layer()
    weight = layer.weight
    layer.to("cpu").float().cpu().train().requires_grad_(False)
    assert layer.weight is weight and type(weight) is PackedWeight
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer, bits = packed_layer()
        layer.to(dtype)
        assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, bits.to(dtype))
    layer, bits = packed_layer()
    assert layer.to("meta").weight.is_meta


def test_reads_and_writes_of_the_weight():
    layer, _ = packed_layer()
    weight = layer.weight
    with torch.no_grad():
        for name, write in {
            "add_": lambda w: w.add_(1.0),
            "copy_": lambda w: w.copy_(torch.ones(40, 24)),
            "data +=": lambda w: setattr(w, "data", w.data + 2.0),
            "data = ": lambda w: setattr(w, "data", torch.full((40, 24), 3.0)),
            "data.mul_": lambda w: w.data.mul_(2.0),
            "setitem": lambda w: w.__setitem__(3, 7.0),
            "data setitem": lambda w: w.data.__setitem__((slice(None), 2), 7.0),
            "init": lambda w: nn.init.constant_(w, 0.5),
        }.items():
            expected = nn.Parameter(weight.unpack(), requires_grad=False)
            write(expected)
            write(weight)
            assert layer.weight is weight and torch.equal(weight.unpack(), expected), name
    assert torch.equal(weight + 1, weight.unpack() + 1) and torch.equal(weight[2], weight.unpack()[2])
    assert weight.tolist() == weight.unpack().tolist() and (weight.numpy() == weight.unpack().numpy()).all()
    assert "PackedWeight(shape=(40, 24)" in repr(weight)
    plain = weight.unpack()
    assert layer.share_memory() is layer and torch.equal(layer.weight, plain) and layer.weight.is_shared()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unmerge(dtype):
    layer, bits = packed_layer(dtype=dtype)
    plain = copy.deepcopy(layer)
    weight, x, state = layer.weight, torch.randn(20, 24, dtype=dtype), layer.state_dict()
    before = layer(x)
    layer.merge()
    plain.merge()
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer(x), plain(x))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    layer.to("cpu")
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    layer.unmerge()
    assert torch.equal(layer.weight.unpack(), bits) and torch.equal(layer(x), before)
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    layer, bits = packed_layer(dtype=dtype)
    weight = layer.weight
    layer.merge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight.unpack(), bits)


def test_training_leaves_the_weight():
    layer, bits = packed_layer(lora_dropout=0.1)
    layer.train()
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    x, target = torch.randn(64, 24), torch.randint(0, 3, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and torch.equal(layer.weight.unpack(), bits) and layer.weight.grad is None
    assert lwft_kernels.stats()["lora_linear"] == {"fast": 30, "declined": {}}


def test_a_weight_that_is_unfrozen_later_trains():
    layer, bits = packed_layer()
    plain = copy.deepcopy(layer)
    x = torch.randn(10, 24)
    for each in (layer, plain):
        each.weight.requires_grad_(True)
        each(x).square().sum().backward()
        torch.optim.SGD([each.weight], lr=0.1).step()
    torch.testing.assert_close(layer.weight.unpack(), plain.weight.detach())
    assert not torch.equal(layer.weight.unpack(), bits)


def test_the_reference_reads_it_too():
    layer, _ = packed_layer()
    x = torch.randn(6, 24)
    with lwft_kernels.use_backend("reference"):
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


# ---- what is refused ----


def test_reasons():
    linear = nn.Linear(24, 40)
    assert "requires a gradient; only a frozen one" in prepack.prepack(linear)
    linear.requires_grad_(False)
    assert "level" in prepack.why_not(copy.deepcopy(linear).half())
    assert "on meta" in prepack.prepack(copy.deepcopy(linear).to("meta"))
    whole = torch.randn(80, 24)
    linear.weight = nn.Parameter(whole[:40], requires_grad=False)
    assert "shares its memory" in prepack.prepack(linear)
    assert type(linear.weight) is nn.Parameter
    with pytest.warns(UserWarning, match="leaves the weight as it is: its weight is on meta"):
        LoRALinear(24, 40, device="meta", prepack=True)


def test_ops_refuse_what_does_not_fit():
    blocks = torch.ops.lwft.pack_weight(torch.randn(40, 24))
    x, a, b = torch.randn(3, 24), torch.randn(2, 24), torch.randn(40, 2)
    with pytest.raises(RuntimeError, match="do not go together"):
        autograd.lora_linear(x, blocks[:-64], None, a, b, None, None, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="do not go together"):  # a flattened weight is no packed one
        autograd.lora_linear(x, torch.randn(40 * 24), None, a, b, None, None, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="do not go together"):
        torch.ops.lwft.unpack_weight_(torch.empty(40, 25), blocks)
    with pytest.raises(RuntimeError, match="no product with a packed weight"):
        torch.ops.lwft.pack_weight(torch.randn(4, 4).half())
    with pytest.raises(ValueError, match=r"weight must have shape \(d_out, d_in\)"):
        LF.lora_linear(x, PackedWeight.pack(torch.randn(40, 25)), None, a, b)


# ---- the decision ----


def test_measured_once_and_kept(measures, monkeypatch):
    assert prepack.prepack(nn.Linear(300, 1000).requires_grad_(False)) is None
    assert measures == [(1024, 256, torch.float32)]
    assert prepack.prepack(nn.Linear(250, 1030).requires_grad_(False)) is None, "the same band"
    monkeypatch.setattr(prepack, "_known", {})  # another process
    assert prepack.prepack(nn.Linear(300, 1000).requires_grad_(False)) is None
    assert len(measures) == 1
    (key,) = json.loads(prepack._file().read_text())
    for part in (torch.ops.lwft.cpu_isa(), f"{torch.get_num_threads()} threads", "torch.float32", "1024 x 256"):
        assert part in key
    assert prepack.prepack(nn.Linear(300, 1000, dtype=torch.float64).requires_grad_(False)) is None
    assert prepack.prepack(nn.Linear(600, 9000).requires_grad_(False)) is None
    assert measures[1:] == [(1024, 256, torch.float64), (4096, 512, torch.float32)]
    prepack.forget()
    assert not prepack._file().exists()
    assert prepack.prepack(nn.Linear(300, 1000).requires_grad_(False)) is None
    assert len(measures) == 4


def test_refused_where_it_is_not_faster(monkeypatch):
    monkeypatch.setattr(prepack, "_measure", lambda *_: dict(NOT_WORTH_IT))
    linear = nn.Linear(24, 40).requires_grad_(False)
    assert "it would be 1.00 times as fast here" in prepack.prepack(linear)
    assert type(linear.weight) is nn.Parameter
    with pytest.warns(UserWarning, match="leaves the weight as it is: packed it would be"):
        LoRALinear.from_linear(linear, prepack=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": {"16": "fast"}}'])
def test_a_cache_that_is_not_ours(content, measures):
    prepack._file().parent.mkdir(parents=True)
    prepack._file().write_text(content)
    assert prepack.prepack(nn.Linear(24, 40).requires_grad_(False)) is None
    assert len(measures) == 1 and len(json.loads(prepack._file().read_text())) == 1


def test_nowhere_to_keep_it(measures, monkeypatch):
    monkeypatch.setenv("LWFT_PREPACK_CACHE", "/dev/null/prepack.json")
    for _ in range(2):
        assert prepack.prepack(nn.Linear(24, 40).requires_grad_(False)) is None
    assert len(measures) == 1


def test_what_measures_is_the_op(monkeypatch):
    """With the real measurement, on a small weight: a ratio for each number of tokens, and no trace in the counts."""
    monkeypatch.undo()
    monkeypatch.setattr(prepack, "_TOKENS", (16,))
    monkeypatch.setattr(prepack, "_MANY_TOKENS", 32)
    gains = prepack._measure(256, 256, torch.float32)
    assert gains.keys() == {"16", "32"} and all(0 < gain < 1000 for gain in gains.values())
    assert "lora_linear" not in lwft_kernels.stats()
