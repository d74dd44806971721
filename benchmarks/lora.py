"""A frozen linear layer with a LoRA branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwft_kernels import functional as LF
from lwft_kernels.lowrank.packed_weight import PackedWeight

from .case import Arguments, Case, Family, NotOffered, Run, compiled, normal, overhead
from .lora_chain import AddmmChain

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)
SCALE = 2.0


def _case(
    preset: str, tokens: int, width: int, rank: int, *, width_out: int = 0, dropout_p: float = 0.0,
    float32_adapter: bool = False, prepacked: bool = False, dtypes: tuple[str, ...] = ("float32",),
    curve: tuple[str, str] | None = None, in_a_row: bool = False,
) -> Case:  # fmt: skip
    width_out = width_out or width
    sizes: dict[str, Any] = {"T": tokens, "d_in": width, "d_out": width_out, "r": rank}
    name = f"T={tokens} d={width}" + (f"->{width_out}" if width_out != width else "") + f" r={rank}"
    if dropout_p:
        sizes["dropout_p"] = dropout_p
        name += f" dropout {dropout_p}"
    if float32_adapter:
        sizes["float32_adapter"] = True
        name += " f32 adapter"
    if prepacked:
        sizes["prepacked"] = True
        name += " prepacked"
    return Case(name, sizes, preset, dtypes, curve, beside=overhead(tokens * width), in_a_row=in_a_row)


def _serving(
    preset: str, batch: int, tokens: int, width: int, rank: int, adapters: int, dtypes: tuple[str, ...] = ("float32",)
) -> Case:
    """A batch of requests, each with an adapter of its own; some with none."""
    sizes = {"B": batch, "T": batch * tokens, "d_in": width, "d_out": width, "r": rank, "n": adapters}
    name = f"{adapters} adapters, B={batch} T={batch * tokens} d={width} r={rank}"
    return Case(name, sizes, preset, dtypes, trains=False)


def _gpu(
    preset: str, tokens: int, few: int, widths: tuple[int, int, int], ranks: tuple[int, int], adapters: int
) -> tuple[Case, ...]:
    """Many tokens at widths where the base product leaves less and less to gain; few, where launches are the cost."""
    rank, wide = ranks[0], widths[-1]
    options = ((0.1, False), (0.0, False), (0.1, True))
    return (
        *(
            _case(preset, tokens, d, rank, dropout_p=p, float32_adapter=wide_adapter, dtypes=HALF)
            for d in reversed(widths)
            for p, wide_adapter in options
        ),
        _case(preset, tokens, wide, ranks[1], dropout_p=0.1, dtypes=HALF),
        *(_case(preset, few, d, rank, dropout_p=0.1, dtypes=HALF, in_a_row=True) for d in (widths[0], wide)),
        _case(preset, few, wide, rank, dtypes=HALF),
        _serving(preset, adapters, few, wide, rank, adapters, HALF),
    )


CASES = (
    _case("smoke", 5, 24, 4, width_out=16),
    _case("smoke", 5, 24, 4, dropout_p=0.5),
    _case("smoke", 5, 24, 4, width_out=16, prepacked=True),
    _serving("smoke", 4, 3, 24, 4, 3),
    _case("quick", 1, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 128, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 1024, 768, 16, curve=("d=768 r=16", "T")),
    _case("quick", 1024, 768, 16, dropout_p=0.1, dtypes=BOTH),
    *(_case("full", t, 768, 16, curve=("d=768 r=16", "T")) for t in (4, 16, 4096)),
    *(_case("full", 1024, 768, r) for r in (4, 64)),
    *(_case("full", t, 768, 16, dtypes=("bfloat16",)) for t in (128, 1024)),
    *(_case("full", t, 4096, 16, dtypes=BOTH) for t in (1, 16, 128)),
    *(_case("full", t, 4096, 16, prepacked=True, dtypes=BOTH) for t in (16, 64, 128)),
    *(_case("full", t, 768, 16, dropout_p=0.1, dtypes=BOTH) for t in (16, 128, 4096)),
    _case("full", 128, 4096, 16, dropout_p=0.1, dtypes=BOTH),
    _case("full", 1024, 768, 16, dropout_p=0.1, float32_adapter=True, dtypes=("bfloat16",)),  # PEFT's default
    _case("full", 77, 1000, 7, width_out=333, dropout_p=0.1, dtypes=BOTH),
    _serving("full", 8, 1, 768, 16, 8),
    _serving("full", 8, 128, 768, 16, 8),
    _case("full", 1, 64, 4),
    *_gpu("gpu", 8192, 128, (1024, 2048, 4096), (16, 64), 8),
    *_gpu("gpu-smoke", 33, 3, (16, 24, 40), (4, 8), 3),
)  # fmt: skip


def arguments(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
    s = case.sizes
    d_in, d_out, r = s["d_in"], s["d_out"], s["r"]
    stack = (s["n"],) if "n" in s else ()
    adapter_dtype = torch.float32 if s.get("float32_adapter") and dtype.itemsize == 2 else dtype
    x = normal(generator, dtype, s["T"], d_in, grad=case.trains)
    if stack:
        x = x.view(s["B"], -1, d_in)
    result: Arguments = {
        "x": x,
        "weight": normal(generator, dtype, d_out, d_in, scale=d_in**-0.5),
        "bias": normal(generator, dtype, d_out),
        "lora_a": normal(generator, adapter_dtype, *stack, r, d_in, grad=case.trains, scale=d_in**-0.5),
        "lora_b": normal(generator, adapter_dtype, *stack, d_out, r, grad=case.trains, scale=r**-0.5),
        "scale": SCALE,
    }
    if stack:
        result["adapter_index"] = torch.arange(s["B"], device=generator.device) % (s["n"] + 1) - 1
    if "dropout_p" in s:
        result["dropout_p"] = s["dropout_p"]
    return result


def flops(case: Case, a: Arguments, backward: bool) -> float:
    """Backward of the frozen base is one product (no gradient of W), of the branch twice its forward."""
    s = case.sizes
    served = s["T"] if "adapter_index" not in a else s["T"] / s["B"] * int((a["adapter_index"] >= 0).sum())
    base, branch = 2.0 * s["T"] * s["d_in"] * s["d_out"], 2.0 * served * s["r"] * (s["d_in"] + s["d_out"])
    return float(2 * base + 3 * branch if backward else base + branch)


_NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


def _stacked(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of the batch that have an adapter, and the adapter of each, gathered."""
    rows = (a["adapter_index"] >= 0).nonzero()[:, 0]
    index = a["adapter_index"][rows]
    return a["x"][rows], rows, a["lora_a"][index], a["lora_b"][index]


def _eager_function(a: Arguments) -> Callable[..., Tensor]:
    p = a.get("dropout_p", 0.0)

    def lora(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        dropped = (F.dropout(x, p) if p else x).to(lora_a.dtype)
        return (F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_a), lora_b) * SCALE).to(x.dtype)

    return lora


def _eager(_: Case, a: Arguments) -> Run:
    if "adapter_index" in a:

        def serve() -> Tensor:  # two batched products over gathered adapters
            x, rows, lora_a, lora_b = _stacked(a)
            delta = x @ lora_a.transpose(1, 2) @ lora_b.transpose(1, 2)
            return F.linear(a["x"], a["weight"], a["bias"]).index_add_(0, rows, delta, alpha=SCALE)

        return serve
    function, values = _eager_function(a), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _compile(_: Case, a: Arguments) -> Run:
    if "adapter_index" in a:
        raise NotOffered("which rows have an adapter is data, on which compiled code would depend")
    function, values = compiled(_eager_function(a)), [a[name] for name in _NAMES]
    return lambda: function(*values)


def _addmm(_: Case, a: Arguments) -> Run:
    """The branch added in place to the base result, which is legal under autograd too: nothing saves it."""
    x, weight, bias, lora_a, lora_b = (a[name] for name in _NAMES)
    if "adapter_index" in a:

        def serve() -> Tensor:
            rows_x, rows, gathered_a, gathered_b = _stacked(a)
            base = F.linear(x, weight, bias)
            middle = torch.bmm(rows_x, gathered_a.transpose(1, 2))
            base[rows] = torch.baddbmm(base[rows], middle, gathered_b.transpose(1, 2), alpha=SCALE)
            return base

        return serve
    p = a.get("dropout_p", 0.0)

    def chain() -> Tensor:
        dropped = F.dropout(x, p) if p else x
        base = torch.addmm(bias, x, weight.T)
        middle = dropped.to(lora_a.dtype) @ lora_a.T
        if middle.dtype == base.dtype:
            return base.addmm_(middle, lora_b.T, alpha=SCALE)
        return base.add_(middle @ lora_b.T, alpha=SCALE)

    return chain


def _peft(case: Case, a: Arguments) -> Run:
    """PEFT's own module, holding the tensors of the other providers, so that all differentiate the same leaves."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        raise NotOffered("PEFT is not installed") from None
    s = case.sizes
    base = nn.Linear(s["d_in"], s["d_out"], device="meta").requires_grad_(False)
    base.weight, base.bias = (nn.Parameter(a[name], requires_grad=False) for name in ("weight", "bias"))
    options = {"r": s["r"], "lora_alpha": int(SCALE * s["r"])}
    config = LoraConfig(lora_dropout=a.get("dropout_p", 0.0), **options)

    def hold(name: str, lora_a: Tensor, lora_b: Tensor) -> None:
        for part, tensor in ((layer.lora_A[name], lora_a), (layer.lora_B[name], lora_b)):
            del part.weight
            part.weight = tensor

    if "adapter_index" not in a:
        layer = Linear(base, "default", config, **options)
        hold("default", a["lora_a"], a["lora_b"])
        return lambda: layer(a["x"])
    layer = Linear(base, "0", config, **options)
    for n in range(s["n"]):
        if n:
            layer.update_layer(str(n), config=config, **options)
        hold(str(n), a["lora_a"][n], a["lora_b"][n])
    names = ["__base__" if n < 0 else str(n) for n in a["adapter_index"].tolist()]
    layer.eval()
    return lambda: layer(a["x"], adapter_names=names)


def _peft_autocast(case: Case, a: Arguments) -> Run:
    """PEFT's layer as most train with it: adapters in float32, autocast to 16 bits."""
    if a["lora_a"].dtype == a["x"].dtype:
        raise NotOffered("autocast does nothing where the adapter has the dtype of x")
    layer, device, dtype = _peft(case, a), a["x"].device.type, a["x"].dtype

    def call() -> Tensor:
        with torch.autocast(device, dtype):
            return layer()

    return call


def _chain(_: Case, a: Arguments) -> Run:
    if "adapter_index" in a:
        raise NotOffered("`addmm` has what there is of it for serving")
    values, p = [a[name] for name in _NAMES], a.get("dropout_p", 0.0)

    def chain() -> Tensor:
        out: Tensor = AddmmChain.apply(*values, SCALE, p)
        return out

    return chain


def _lorafusion(_: Case, a: Arguments) -> Run:
    """LoRAFusion's function; it takes three dimensions only, and one dtype."""
    if "adapter_index" in a or a["lora_a"].dtype != a["x"].dtype:
        raise NotOffered("LoRAFusion's function has one adapter, of the dtype of x")
    try:
        from lorafusion.ops.lora_v1 import fused_linear_lora
    except ImportError:
        raise NotOffered("LoRAFusion is not installed") from None
    x, weight, bias, lora_a, lora_b = (a[name] for name in _NAMES)
    p = a.get("dropout_p", 0.0)

    def lora() -> Tensor:
        out: Tensor = fused_linear_lora(x[None], weight, lora_a, lora_b, SCALE, dropout_p=p, linear_bias=bias)
        return out[0]

    return lora


def _ours(case: Case, a: Arguments) -> Run:
    """A prepacked weight is packed here whether or not `prepack` would find it worth it: the table shows that."""
    if "prepacked" in case.sizes:
        if torch.ops.lwft.packed_weight_bytes(a["weight"]) == 0:
            raise NotOffered(f"{torch.ops.lwft.cpu_isa()} has no product with a packed weight of {a['weight'].dtype}")
        a = {**a, "weight": PackedWeight.pack(a["weight"])}
    return lambda: LF.lora_linear(**a)


FAMILY = Family(
    "lora_linear",
    CASES,
    arguments,
    flops,
    {
        "eager": _eager,
        "addmm": _addmm,
        "peft": _peft,
        "chain": _chain,
        "peft_autocast": _peft_autocast,
        "lorafusion": _lorafusion,
        "compile": _compile,
        "lwft": _ours,
    },
    ours=LF.lora_linear,
)
