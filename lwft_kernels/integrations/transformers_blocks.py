"""The blocks of transformers that end in LayerNorm(residual + dropout(sublayer)), by class swap.

`BertSelfOutput`, `BertOutput` and their copies in some forty families are one and the same code under as many names.
So they are known by the fingerprint of their forward, not by name. Each class gets a subclass of its own, which keeps
its name: FSDP and device maps look layers up by it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import apply_chunking_to_forward

from lwft_kernels.integrations import drift
from lwft_kernels.integrations.add_and_norm import add_and_norm
from lwft_kernels.integrations.class_swap import difference, swapped
from lwft_kernels.integrations.report import Change


class Form(nn.Module):
    """What the blocks of one form have in common: the parts by which they are recognised, and their forward.

    Attributes:
        parts: the names of the children.
        known: the fingerprints of the forwards that ours was written against.
        others: those of forwards that are known to compute something else with the same parts.
    """

    parts: frozenset[str]
    known: frozenset[str]
    others: frozenset[str] = frozenset()
    theirs: type[nn.Module]  # set in the subclass that `_class` makes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: a pickle names what it is made of
        reduced: Any = super().__reduce_ex__(2)
        return _instance, (_form_of(type(self)), self.theirs), *reduced[2:]


class OutputBlock(Form):
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor): `BertSelfOutput`, `BertOutput` and the like."""

    parts = frozenset({"dense", "dropout", "LayerNorm"})
    known = frozenset({
        "152b7ca1fb922451",  # BERT and most others; transformers 4.57.6, 5.23, 5.24
        "6cc349f86b83ef14",  # DeBERTa, LXMERT, SEW-D
        "39af35722c3e4ca8", "c6a55298683c3d5d", "d07e2afb51dcb264", "e80386bbb55c17b2",  # CANINE
    })  # fmt: skip
    others = frozenset({"6b5fd82323913836"})  # X-MOD's, whose norm comes first
    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """As transformers'."""
        return add_and_norm(self, input_tensor, self.dense(hidden_states), self.dropout, self.LayerNorm)


class DistilBertBlock(Form):
    """DistilBERT's `TransformerBlock`: attention and feed-forward network, each with its sum and norm."""

    parts = frozenset({"attention", "sa_layer_norm", "ffn", "output_layer_norm"})
    known = frozenset({"01f4272f5a42b3f8"})
    attention: nn.Module
    ffn: nn.Module
    sa_layer_norm: nn.Module
    output_layer_norm: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As transformers'."""
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x = add_and_norm(self, hidden_states, attended, None, self.sa_layer_norm)
        return add_and_norm(self, x, self.ffn(x), None, self.output_layer_norm)


class AlbertBlock(Form):
    """`AlbertLayer`: the sum and norm after its feed-forward network; those of its attention are inside that."""

    parts = frozenset({"full_layer_layer_norm", "attention", "ffn", "ffn_output", "activation", "dropout"})
    known = frozenset({"b6db890bf60259d5"})
    attention: nn.Module
    full_layer_layer_norm: nn.Module
    ff_chunk: Callable[[Tensor], Tensor]
    chunk_size_feed_forward: int
    seq_len_dim: int

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As transformers'."""
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        out = apply_chunking_to_forward(self.ff_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attended)
        return add_and_norm(self, attended, out, None, self.full_layer_layer_norm)


_FORMS = (OutputBlock, DistilBertBlock, AlbertBlock)


_classes: dict[tuple[type[Form], type[nn.Module]], type[nn.Module]] = {}


def _class(form: type[Form], theirs: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `theirs` with the forward of `form`: the same one each time."""
    if (form, theirs) not in _classes:
        _classes[form, theirs] = type(theirs.__name__, (form, theirs), {"__module__": __name__, "theirs": theirs})
    return _classes[form, theirs]


def _instance(form: type[Form], theirs: type[nn.Module]) -> nn.Module:
    kind = _class(form, theirs)
    return kind.__new__(kind)


def _form_of(ours: type) -> type[Form]:
    return next(form for form in _FORMS if issubclass(ours, form))


def plan(model: nn.Module, *, strict: bool = False) -> list[Change]:
    """A change per block of transformers in `model` that has the parts of one of the forms."""
    changes = []
    for name, module in model.named_modules():
        form = _recognised(module)
        if form is None:
            continue
        kind = type(module)
        if isinstance(module, Form):
            changes.append(Change(name, kind.__name__, reason="replaced already"))
            continue
        reason = _why_not(module, form, strict)
        if reason is None:
            changes.append(swapped(name, module, _class(form, kind), "add_layer_norm"))
        else:
            changes.append(Change(name, kind.__name__, reason=reason))
    return changes


def _recognised(module: nn.Module) -> type[Form] | None:
    """The form whose parts `module` has, if transformers wrote its forward."""
    forward = type(module).theirs.forward if isinstance(module, Form) else type(module).forward
    if getattr(forward, "__module__", "").partition(".")[0] != "transformers":
        return None
    return next((form for form in _FORMS if form.parts == module._modules.keys()), None)


def _why_not(module: nn.Module, form: type[Form], strict: bool) -> str | None:
    if "forward" in module.__dict__:
        return "somebody else has replaced its forward"
    for name, part in module.named_children():
        if "norm" in name.lower() and type(part) is not nn.LayerNorm:
            return f"its {name} is a {type(part).__name__}"
    forward = type(module).forward
    parameters = [list(inspect.signature(f).parameters) for f in (forward, form.forward)]
    if parameters[0] != parameters[1] or drift.fingerprint(forward) in form.others:
        return "its forward is of another form"
    return drift.why_not(
        drift.Upstream(
            f"{forward.__module__}.{forward.__qualname__}",
            (forward,),
            form.known,
            lambda: _self_test(module, form),
        ),
        strict,
    )


def _self_test(module: nn.Module, form: type[Form]) -> str | None:
    """On a copy of the very module: what its constructor wants differs from family to family."""
    module = copy.deepcopy(module).double().eval().requires_grad_()
    widths = [next(part for part in module.modules() if isinstance(part, nn.LayerNorm)).normalized_shape[0]]
    if form is OutputBlock:
        widths.insert(0, next(part for part in module.modules() if isinstance(part, nn.Linear)).in_features)
    inputs = [torch.randn(2, 3, width, dtype=torch.float64) for width in widths]
    return difference(module, _class(form, type(module)), lambda block: {"out": block(*inputs)})
