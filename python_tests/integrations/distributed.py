"""Accelerated models in several processes. As a program: one of the two processes, through every scenario.

Starting a process costs more than a scenario, so two go through all of them, each with its own outcome.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from oracle import assert_accurate
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lwft_kernels

WORLD, ROWS, LENGTH, VOCABULARY = 2, 4, 10, 61


def run_all(store: Path) -> dict[str, list[str | None]]:
    """By scenario, what went wrong in each process, or None. `store`: a directory for this run."""
    python_tests = str(Path(__file__).resolve().parent.parent)
    package_parent = str(Path(lwft_kernels.__file__).resolve().parent.parent)
    path = os.pathsep.join((package_parent, python_tests))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LWFT_BACKEND": "native"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, printed, strict=True):
        assert process.returncode == 0, output
    outcomes = [json.loads((store / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the branch
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def batch() -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def mine(ids: Tensor) -> Tensor:
    """The rows of this process."""
    return ids.chunk(WORLD)[dist.get_rank()]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The loss over the rows of all processes, and the gradients in one vector, in whatever wrapping."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    gradients = {
        name.removeprefix("module."): whole(parameter.grad).double().flatten()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {"loss": loss, "gradients": torch.cat([gradients[name] for name in sorted(gradients)])}


def compare(
    parallel: Callable[[nn.Module], nn.Module],
    *,
    fast: tuple[str, ...] = ("lora_linear", "attention"),
    declines: bool = False,
    accelerate_first: bool = True,
    rows: Callable[[Tensor], Tensor] = mine,
) -> None:
    """A step under `parallel`, accelerated, against one without us, and against one process in float64.

    Args:
        parallel: wraps the model.
        fast: ops that must have served calls.
        declines: whether the LoRA layers must leave their calls to PEFT, with a reason.
        accelerate_first: accelerate before or after `parallel`.
        rows: the part of the batch that this process sees.
    """
    oracle = step(build(torch.float64), batch())
    theirs = step(parallel(build(torch.float32)), rows(batch()))
    lwft_kernels.reset_stats()
    model = build(torch.float32)
    if accelerate_first:
        report = lwft_kernels.accelerate(model)
        model = parallel(model)
    else:
        model = parallel(model)
        report = lwft_kernels.accelerate(model)
    ours = step(model, rows(batch()))
    assert_accurate(ours, theirs, oracle)
    stats = lwft_kernels.stats()
    for op in fast:
        assert op in stats and stats[op]["fast"] > 0, stats
    reasons = {reason for counts in stats.values() for reason in counts["declined"]}
    assert report.replaced and bool(reasons) == declines, (stats, str(report))
    assert bool(report.unreached()) == declines, str(report)


# ---- scenarios ----


def ddp() -> None:
    compare(DistributedDataParallel)


def ddp_accelerated_after_wrapping() -> None:
    compare(DistributedDataParallel, accelerate_first=False)


def ddp_checkpointing() -> None:
    def parallel(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return DistributedDataParallel(model.train())

    compare(parallel)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def sharded(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2() -> None:
    """The weights are gathered when a layer is called: whole at call time, and fused."""
    compare(sharded)


def fsdp2_accelerated_after_sharding() -> None:
    compare(sharded, accelerate_first=False)


def fsdp2_checkpointing() -> None:
    def parallel(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return sharded(model.train())

    compare(parallel)


def fsdp2_bfloat16() -> None:
    """FSDP casts what it gathers."""
    compare(lambda model: sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)))


def fsdp2_units_inside_a_layer() -> None:
    """An adapter's weight that is a unit of its own is a shard when the LoRA layer is called: left to PEFT."""

    def parallel(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (WORLD,))
        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(parallel, fast=("attention",), declines=True)


def fsdp2_base_is_a_unit() -> None:
    """A frozen weight that is a unit of its own: its layer is called, and the branch added in one op."""

    def parallel(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (WORLD,))
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(parallel, fast=("attention", "lora_delta_"))


def tensor_parallel() -> None:
    """Weights are DTensors that are never gathered. The branch of a column-parallel layer is column-parallel too."""

    def parallel(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in layers_of(model):
            columns = ["self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"]
            for name in ("self_attn.q_proj", "self_attn.v_proj"):
                columns += [f"{name}.base_layer", f"{name}.lora_B.default"]
            plan = {
                **{name: ColwiseParallel() for name in columns},
                "self_attn.o_proj": RowwiseParallel(),
                "mlp.down_proj.base_layer": RowwiseParallel(),
                "mlp.down_proj.lora_A.default": RowwiseParallel(),
            }
            parallelize_module(layer, mesh, plan)
        return model

    compare(parallel, fast=("attention",), declines=True, rows=lambda ids: ids)


SCENARIOS = (
    ddp,
    ddp_accelerated_after_wrapping,
    ddp_checkpointing,
    fsdp2,
    fsdp2_accelerated_after_sharding,
    fsdp2_checkpointing,
    fsdp2_bfloat16,
    fsdp2_units_inside_a_layer,
    fsdp2_base_is_a_unit,
    tensor_parallel,
)


def main(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store / 'rendezvous'}", rank=rank, world_size=WORLD)
    outcomes: dict[str, str | None] = {}
    for scenario in SCENARIOS:
        lwft_kernels.reset_stats()
        try:
            scenario()
            outcomes[scenario.__name__] = None
        except Exception:
            outcomes[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    (store / f"{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # not through the interpreter's end, where gloo's threads now and then abort: see ddp.py
