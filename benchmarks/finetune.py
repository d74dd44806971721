"""`lwft-bench finetune`: a real fine-tune of a pretrained BERT, with and without the kernels, step by step in turn."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import lwft_kernels

VARIANTS = ("baseline", "accelerated")
MODEL_NAMES = ("minilm", "small")
METHOD_NAMES = ("lora", "adapter", "prefix", "lowrank")  # finetune_models.METHODS, without its imports
WORDS_PER_TOKEN = 0.5  # docstrings are full of names, which the tokenizer cuts in pieces
MEMORY_STEPS = 2


@dataclass
class Options:
    """The command line, and what is recorded of it."""

    model: str = "minilm"
    method: str = "lora"
    steps: int = 40
    check_steps: int = 8
    batch: int = 32
    seq_len: int = 128
    learning_rate: float = 1e-3
    held_out: int = 12  # texts per package
    threads: int = 0
    seed: int = 0
    memory: bool = True


@dataclass
class Run:
    """What one variant did."""

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy_before: float = 0.0
    accuracy_after: float = 0.0
    peak_memory: int | None = None  # bytes above what the process held before its first step


class Trainer:
    """One variant: its own copy of the model and its own optimizer."""

    def __init__(self, options: Options, classes: int, *, ours: bool, dropout: bool) -> None:
        from . import finetune_models

        self.model, self.report = finetune_models.build(
            options.model, options.method, classes, ours=ours, dropout=dropout, seed=options.seed
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained_parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)

    def step(self, inputs: dict[str, Tensor], labels: Tensor) -> float:
        loss = F.cross_entropy(self.model(**inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def accuracy(self, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float:
        self.model.eval()
        right = sum(int((self.model(**inputs).argmax(-1) == labels).sum()) for inputs, labels in batches)
        self.model.train()
        return right / sum(len(labels) for _, labels in batches)


class Batches:
    """The task, tokenised and padded to one length."""

    def __init__(self, options: Options) -> None:
        from . import finetune_data, finetune_models

        self.task = finetune_data.Task(int(options.seq_len * WORDS_PER_TOKEN), options.seed)
        self.tokenizer = finetune_models.tokenizer()
        self.options = options

    def encode(self, texts: list[str], labels: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        from . import finetune_models

        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.options.seq_len, return_tensors="pt"
        )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if self.options.model == "small":  # its vocabulary is smaller than the tokenizer's
            inputs["input_ids"] %= finetune_models.SMALL["vocab_size"]
        return inputs, torch.tensor(labels)

    def train(self) -> tuple[dict[str, Tensor], Tensor]:
        return self.encode(*self.task.batch(self.options.batch))

    def held_out(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        texts, labels = self.task.held_out(self.options.held_out)
        size = self.options.batch
        return [self.encode(texts[i : i + size], labels[i : i + size]) for i in range(0, len(texts), size)]


def alternate(
    options: Options, batches: Batches, steps: int, *, dropout: bool, progress: Progress, title: str
) -> tuple[dict[str, Run], dict[str, Trainer]]:
    """Train both variants on the same batches, a step each in turn; who goes first changes from step to step."""
    classes = len(batches.task.labels)
    runs = {name: Run() for name in VARIANTS}
    trainers = {name: Trainer(options, classes, ours=name == "accelerated", dropout=dropout) for name in VARIANTS}
    bar = progress.add_task(title, total=2 * steps)
    held_out = batches.held_out() if dropout else []
    for name in VARIANTS if dropout else ():
        runs[name].accuracy_before = trainers[name].accuracy(held_out)
    for step in range(steps):
        inputs, labels = batches.train()
        for name in VARIANTS if step % 2 == 0 else reversed(VARIANTS):
            start = time.perf_counter()
            loss = trainers[name].step(inputs, labels)
            runs[name].step_seconds.append(time.perf_counter() - start)
            runs[name].losses.append(loss)
            progress.advance(bar)
    for name in VARIANTS if dropout else ():
        runs[name].accuracy_after = trainers[name].accuracy(held_out)
    return runs, trainers


def _resident(field_name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field_name} in /proc/self/status")


def _peak_of_steps(options: Options, ours: bool, pipe: Any) -> None:
    """In a process of its own: how far memory rises above the loaded model during two steps."""
    _quiet()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    batches = Batches(options)
    trainer = Trainer(options, len(batches.task.labels), ours=ours, dropout=True)
    inputs, labels = batches.train()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(MEMORY_STEPS):
        trainer.step(inputs, labels)
    pipe.send(_resident("VmHWM") - before)


def peak_memory(options: Options, ours: bool) -> int | None:
    """Bytes, or None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of_steps, args=(options, ours, sender))
    process.start()
    sender.close()
    try:
        measured: int = receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()
    return measured


def loss_difference(runs: dict[str, Run]) -> float:
    """The largest relative difference between the two loss curves."""
    pairs = zip(runs["baseline"].losses, runs["accelerated"].losses, strict=True)
    return max(abs(ours - theirs) / abs(theirs) for theirs, ours in pairs)


def versions() -> dict[str, str]:
    """Of everything that has a part in the figures."""
    import peft
    import transformers

    return {
        "lwft_kernels": lwft_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instruction set": str(lwft_kernels.backend.describe()["cpu_isa"]),
    }


def _quiet() -> None:
    """Without the library's remarks on weights this task has no use for, and its bars between ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def run(options: Options, console: Console) -> dict[str, Any]:
    """The whole comparison; returns what is written as JSON."""
    _quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    lwft_kernels.reset_stats()
    batches = Batches(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        check, _ = alternate(
            options, batches, options.check_steps, dropout=False, progress=progress, title="dropout off"
        )
        lwft_kernels.reset_stats()
        runs, trainers = alternate(options, batches, options.steps, dropout=True, progress=progress, title="dropout on")
        counts = lwft_kernels.stats()
        bar = progress.add_task("peak memory", total=2 if options.memory else 0)
        for name in VARIANTS if options.memory else ():
            runs[name].peak_memory = peak_memory(options, name == "accelerated")
            progress.advance(bar)
    accelerated = trainers["accelerated"]
    return {
        "options": asdict(options),
        "versions": versions(),
        "labels": batches.task.labels,
        "held_out_texts": options.held_out * len(batches.task.labels),
        "trained_parameters": accelerated.trained_parameters,
        "runs": {name: asdict(result) for name, result in runs.items()},
        "losses_without_dropout": {name: result.losses for name, result in check.items()},
        "loss_difference_without_dropout": loss_difference(check),
        "speedup": speedup(runs),
        "stats": counts,
        "report": str(accelerated.report),
    }


def speedup(runs: dict[str, Run]) -> float:
    """Median over steps of baseline time / accelerated time, each pair on one batch; the first step warms up."""
    pairs = zip(runs["baseline"].step_seconds, runs["accelerated"].step_seconds, strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return statistics.median(ratios[1:] or ratios)


@click.command()
@click.option(
    "--model",
    type=click.Choice(MODEL_NAMES),
    default=Options.model,
    show_default=True,
    help="Pretrained MiniLM, or a random 4-layer BERT, 512 wide, of 10000 words.",
)
@click.option("--method", type=click.Choice(METHOD_NAMES), default="lora", show_default=True)
@click.option("--steps", default=Options.steps, show_default=True, help="Steps of each variant, with dropout on.")
@click.option(
    "--check-steps",
    default=Options.check_steps,
    show_default=True,
    help="Steps with dropout off, to compare losses.",
)
@click.option("--batch", default=Options.batch, show_default=True)
@click.option("--seq-len", default=Options.seq_len, show_default=True, help="Tokens of a text, padding included.")
@click.option("--learning-rate", default=Options.learning_rate, show_default=True)
@click.option("--held-out", default=Options.held_out, show_default=True, help="Texts per package to test on.")
@click.option("--threads", default=0, help="CPU threads; 0 for torch's default.")
@click.option("--seed", default=0, show_default=True)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory in own processes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Default: results/finetune-METHOD.json")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Default: results/finetune-METHOD.png")
def finetune(json_path: Path | None, png_path: Path | None, **options: Any) -> None:
    """Fine-tune a BERT with and without the kernels, in turn, and compare."""
    from . import finetune_report

    console = Console()
    chosen = Options(**options)
    result = run(chosen, console)
    finetune_report.print_tables(result, console)
    json_path = json_path or Path(f"results/finetune-{chosen.method}.json")
    png_path = png_path or Path(f"results/finetune-{chosen.method}.png")
    for path in (json_path, png_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=1))
    finetune_report.draw(result, png_path)
    console.print(f"written: {json_path}, {png_path}")
