"""Models of libraries whose own code is not the one that was tested. As a program: one process, one kind of change.

The change is made before anything of ours is imported, as a new release or another package would make it.
"""

from __future__ import annotations

import inspect
import json
import linecache
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners import lora
from torch import nn
from transformers.integrations import sdpa_attention

# By room: where the function is, its name there, what is replaced in its source, and by what
EDITS: dict[str, tuple[Any, str, str, dict[str, str]]] = {
    "peft": (
        lora.Linear,
        "forward",
        "lora_B(lora_A(dropout(x))) * scaling",
        {"same": "scaling * lora_B(lora_A(dropout(x)))", "other": "lora_B(lora_A(dropout(x))) * scaling * 2"},
    ),
    "torch_nn": (
        nn.MultiheadAttention,
        "forward",
        "return attn_output, attn_output_weights",
        {"same": "return 1 * attn_output, attn_output_weights", "other": "return 2 * attn_output, attn_output_weights"},
    ),
    "transformers": (
        sdpa_attention,
        "sdpa_attention_forward",
        "return attn_output, None",
        {"same": "return 1 * attn_output, None", "other": "return 2 * attn_output, None"},
    ),
}


def run(kind: str) -> dict[str, dict[str, Any]]:
    """By room, what became of a model after a change: "same", "other" or "foreign"."""
    import lwft_kernels

    parent = str(Path(lwft_kernels.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": parent, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, kind], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    outcomes: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return outcomes


def edited(function: Callable[..., Any], owner: Any, old: str, new: str) -> Callable[..., Any]:
    """`function` as its library would have written it, in its own module and with its source to be read."""
    source = inspect.getsource(function)
    assert old in source
    body = textwrap.indent(textwrap.dedent(source.replace(old, new)), "    ")
    text = f"def make(__class__):\n{body}\n    return {function.__name__}\n"
    name = f"<{function.__qualname__}, {new}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(text, name, "exec"), function.__globals__, namespace)
    made: Callable[..., Any] = namespace["make"](owner)
    return made


def foreign(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of another package, whatever it does."""

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return theirs


def change(kind: str) -> None:
    for owner, name, old, new in EDITS.values():
        function = getattr(owner, name)
        setattr(owner, name, foreign(function) if kind == "foreign" else edited(function, owner, old, new[kind]))
    transformers.AttentionInterface.register("sdpa", sdpa_attention.sdpa_attention_forward)


def models() -> dict[str, tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]:
    """By room, a tiny model in float64 and a call of it."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    ids = torch.arange(10).reshape(2, 5)
    llama = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    made: dict[str, tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]] = {
        "peft": (peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config), lambda model: model(x)),
        "torch_nn": (nn.MultiheadAttention(8, 2), lambda model: model(x, x, x, need_weights=False)[0]),
        "transformers": (transformers.LlamaForCausalLM(llama), lambda model: model(input_ids=ids).logits),
    }
    return {room: (model.double(), call) for room, (model, call) in made.items()}


def main(kind: str) -> None:
    change(kind)
    import lwft_kernels

    made = models()
    expected = {room: call(model) for room, (model, call) in made.items()}
    outcomes: dict[str, dict[str, Any]] = {}
    warned = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for room, (model, call) in made.items():
                strict = lwft_kernels.explain(model, strict=True)
                with lwft_kernels.accelerated(model) as report:
                    equal = torch.allclose(call(model), expected[room], rtol=1e-9, atol=1e-12)
                outcomes[room] = {
                    "equal": equal,
                    "replaced": len(report.replaced),
                    "reasons": [change.reason for change in report.declined],
                    "unreached": len(report.unreached()),
                    "strict": [len(strict.replaced), [change.reason for change in strict.declined]],
                }
        warned.append([str(w.message) for w in caught if w.category.__name__ == "DriftWarning"])
    for room, library in (("peft", "peft"), ("torch_nn", "torch"), ("transformers", "transformers")):
        outcomes[room]["warnings"] = [message for message in warned[0] if f" of {library} " in message]
    assert not warned[1], "warned twice"
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
