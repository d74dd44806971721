"""Proves and measures the ops on a GPU in one go: `python -m benchmarks.gpu_proof --out DIR`, in the repository.

The work is cut into parts, the most valuable first, and a part into units. Each unit is a process of its own with a
limit of time, and writes what it has as it goes: what fails or takes too long stops nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lwft_kernels import backend

from . import gpu_checks, gpu_paths, gpu_summary, machine, report, results
from . import run as running

USAGE = """
Needs Python 3.10, torch with CUDA, Triton, and the C compiler that Triton calls; nothing is installed or fetched.
Transformers and PEFT (families peft and torch_nn), pytest (part tests), Liger and LoRAFusion are used where they are.

Copy the whole repository, lwft_kernels/_C.so too, which git ignores: it holds no Python and no version of torch, so
that one built elsewhere loads here. Where the copy has no .git, set LWFT_COMMIT to what `git rev-parse --short HEAD`
says at home. Then keep the result, which names card, versions, date, commit and command:
    cp -r DIR benchmarks/results/NAME          NAME as the last line says

In DIR: summary.md to read, proof.json with every check, bench*.json for `lwft-bench plot`, tuning.json with the
measured choices, gpu_paths.json with the shapes on which the CUDA C++ kernels won (the rows that
lwft_kernels/gpu_paths.json takes), log.txt with what the units printed. They are written anew after every part.
"""

FAMILIES = (
    "adapter",
    "lora",
    "attention",
    "add_layer_norm",
    "low_rank",
    "quantized",
    "peft",
    "torch_nn",
)  # in order of interest
COMPILERS = ("flex", "compile")  # peers that take long to make
ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted(ROOT.glob("python_tests/*/test_triton.py"))  # of each room; none beside an installed package
POLL = 0.05  # seconds
_UNIT = "--unit"


@dataclass(frozen=True)
class Part:
    """A step of the proof.

    Attributes:
        limit: seconds it may take.
        parallel: whether its units may run at once: those that time something may not.
        autotune: its LWFT_AUTOTUNE.
        fresh: whether it compiles anew what other parts have compiled already.
        cuda: whether it is about our CUDA C++ kernels, which no card may have run yet, not Triton's.
    """

    name: str
    words: str
    limit: float
    parallel: bool = False
    autotune: str = "0"
    fresh: bool = False
    cuda: bool = False


PARTS = (
    Part("environment", "versions, the card, its measured copy and GEMM rates", 60),
    Part("check", "every op against float64, the same bits twice, another stream, a CUDA graph", 150, parallel=True),
    Part("warm", "compiles what the timed parts call", 90, parallel=True),
    Part("bench", "the benchmark, without tuning", 180),
    Part("tune", "LWFT_AUTOTUNE=full over the same calls", 120, autotune="full"),
    Part("tuned", "the benchmark with the measured choices", 180, autotune="1"),
    Part("cuda_check", "the same checks of the CUDA C++ kernels of the library", 60, parallel=True, cuda=True),
    Part("cuda_bench", "the benchmark of those", 60, cuda=True),
    Part("sanitizer", "compute-sanitizer over those, in sizes for tests", 180, parallel=True, cuda=True),
    Part("first_call", "the first call of each op, nothing compiled before", 90, fresh=True),
    Part("tests", "the rooms' own Triton tests, by pytest", 240, parallel=True),
    Part("compilers", "FlexAttention and torch.compile beside eager and ours, tuned", 420, autotune="1"),
)
BENCHES = ("bench", "tuned", "cuda_bench", "compilers")
CHECKS = ("check", "cuda_check")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")  # tools of compute-sanitizer
_REPORTED = 9  # its exit status where it has something to report

Unit = dict[str, Any]  # "part", and what of it; JSON, for the process that does it


@dataclass(frozen=True)
class Options:
    """What the command line says, for every unit."""

    device: str
    smoke: bool
    families: tuple[str, ...]
    min_time: float

    @property
    def preset(self) -> str:
        return "gpu-smoke" if self.smoke else "gpu"


@dataclass
class Outcome:
    """What became of a unit: "done", "failed", "stopped" at the limit, "not begun", or "skipped" with the reason."""

    unit: Unit
    status: str
    seconds: float = 0.0


def sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit, None where there is none."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def units(part: Part, options: Options) -> list[Unit]:
    families: list[str] = list(options.families)
    if part.cuda:
        families = [name for name in families if backend.has_cuda_kernel(f"{running.FAMILIES[name].op}_forward")]
    if part.name in CHECKS:
        dtypes = ("float32", "bfloat16") if options.smoke else ("bfloat16", "float32", "float16")
        found = [{"family": family, "dtype": dtype} for dtype in dtypes for family in families]
    elif part.name in ("warm", "tune"):
        found = [{"family": family} for family in families if family in gpu_checks.OPS]
    elif part.name == "sanitizer":
        families = [family for family in families if family in gpu_checks.OPS]
        found = [{"family": family, "tool": tool} for family in families for tool in SANITIZERS]
    elif part.name in BENCHES:
        found = [{"family": name} for name in families if part.name != "compilers" or name != "peft"]
    elif part.name == "tests":
        rooms = [path.parent.name for path in TESTS]
        found = [{"room": room} for room in rooms if room == "norm" or not options.smoke]
    else:
        found = [{}]
    return [{"part": part.name, **unit} for unit in found]


# ---- a unit, in its own process ----


def _begin(unit: str, options: str, path: str) -> None:
    """What a unit's process does: its words are those that `Proof` gave it."""
    decoded = json.loads(options)
    chosen = Options(**{**decoded, "families": tuple(decoded["families"])})
    if chosen.device != "cpu":
        torch.cuda.set_device(torch.device(chosen.device))
    work(json.loads(unit), chosen, Path(path))


def work(unit: Unit, options: Options, path: Path) -> None:
    """Do `unit` and write what is found to `path`, after every finding anew."""
    device = torch.device(options.device)
    part = unit["part"]
    if part == "environment":
        facts = machine.environment(device)
        facts["peaks"] = machine.peaks((torch.bfloat16, torch.float32), device)
        _write(path, facts)
    elif part in BENCHES:
        _bench(unit, options, device, path)
    else:
        found: list[dict[str, Any]] = []
        for finding in _findings(unit, options, device):
            found.append(finding.record())
            _write(path, found)


def _findings(unit: Unit, options: Options, device: torch.device) -> Iterator[gpu_checks.Finding]:
    part = unit["part"]
    if part in CHECKS:
        presets = ("gpu-smoke",) if options.smoke else ("smoke", "gpu-smoke", "quick")
        for case in gpu_checks.cases(unit["family"], presets):
            yield from gpu_checks.check(unit["family"], case, unit["dtype"], device)
    elif part == "sanitizer":
        # Only what these kernels serve: the rest is PyTorch's and Triton's, whose launches we do not answer for.
        for dtype in ("bfloat16", "float16", "float32"):
            for case in gpu_checks.cases(unit["family"], ("smoke", "gpu-smoke")):
                yield gpu_checks.run_once(unit["family"], case, dtype, device)
    elif part in ("warm", "tune"):
        for case in gpu_checks.cases(unit["family"], (options.preset,)):
            yield gpu_checks.run_once(unit["family"], case, "bfloat16", device)
    elif part == "first_call":
        for family in options.families:
            if family in gpu_checks.OPS:
                yield from gpu_checks.first_calls(family, options.preset, "bfloat16", device)
    else:
        raise ValueError(f"there is no part {part!r}")


def _bench(unit: Unit, options: Options, device: torch.device, path: Path) -> None:
    if unit["part"] == "compilers":
        providers: tuple[str, ...] = ("eager", *COMPILERS, results.OURS)
        modes: tuple[str, ...] = ("fwdbwd",)
    else:
        providers = tuple(name for name in (*report.PEERS, results.OURS) if name not in COMPILERS)
        modes = running.MODES
    planned = running.plans((unit["family"],), options.preset, (), modes, (torch.get_num_threads(),), providers)
    found: list[results.Row] = []
    for row in running.rows(planned, providers, 0, options.min_time, device):
        found.append(row)
        results.Report("", 0, {}, found, len(planned)).write_json(path)


def _write(path: Path, content: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# ---- the process above them ----


class Proof:
    """Runs the parts, collects what their units wrote, and keeps the files of `out` up to date."""

    def __init__(self, out: Path, work_folder: Path, options: Options, deadline: float, command: str) -> None:
        self._out, self._folder, self._options = out, work_folder, options
        self._deadline, self._command = deadline, command
        self._outcomes: dict[str, list[Outcome]] = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")

    def run(self, part: Part) -> None:
        """Every unit of `part`, as far as its limit and the whole's let it."""
        deadline = min(time.monotonic() + part.limit, self._deadline)
        waiting = [Outcome(unit, "not begun") for unit in units(part, self._options)]
        self._outcomes[part.name] = list(waiting)
        if part.name == "sanitizer" and sanitizer() is None:
            for outcome in waiting:
                outcome.status = "skipped: no compute-sanitizer in PATH or CUDA_HOME"
            waiting = []
        at_once = (os.cpu_count() or 1) if part.parallel else 1
        active: list[tuple[Outcome, subprocess.Popen[bytes], float]] = []
        while active or (waiting and time.monotonic() < deadline):
            while waiting and len(active) < at_once and time.monotonic() < deadline:
                outcome = waiting.pop(0)
                active.append((outcome, self._start(part, outcome.unit), time.monotonic()))
            late = time.monotonic() >= deadline
            for entry in list(active):
                outcome, process, begun = entry
                if late and process.poll() is None:
                    process.kill()
                    process.wait()
                    outcome.status = "stopped"
                elif process.poll() is not None:
                    outcome.status = "failed" if process.returncode else "done"
                else:
                    continue
                outcome.seconds = time.monotonic() - begun
                active.remove(entry)
                if not part.parallel:
                    self.write()  # each is long, and whoever stops this process gets what there is
            time.sleep(POLL)
        self._log(part)
        self.write()

    def _start(self, part: Part, unit: Unit) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
            "LWFT_AUTOTUNE": part.autotune,
            "LWFT_CUDA_UNPROVEN": "1" if part.cuda else "0",
            "LWFT_CACHE_DIR": str(self._folder / "tuning"),
            "TRITON_CACHE_DIR": str(self._folder / (f"triton-{part.name}" if part.fresh else "triton")),
        }
        path = self._path(unit)
        if part.name == "tests":
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                f"--junitxml={path}",
                f"python_tests/{unit['room']}/test_triton.py",
            ]
            command += ["-k", "no_tokens"] if self._options.smoke else []
        else:
            command = [sys.executable, "-m", f"{__package__}.gpu_proof"]
            if part.name == "sanitizer":
                # our kernels' names begin so; what memory torch's allocator keeps is not ours to report
                environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
                checking = [str(sanitizer()), f"--tool={unit['tool']}", f"--error-exitcode={_REPORTED}"]
                command = [*checking, "--kernel-name=kernel_substring=lwft", "--target-processes=all", *command]
            command += [_UNIT, json.dumps(unit), json.dumps(asdict(self._options)), str(path)]
        with path.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _path(self, unit: Unit) -> Path:
        suffix = ".xml" if unit["part"] == "tests" else ".json"
        return self._folder / ("-".join(str(value) for value in unit.values()) + suffix)

    def _log(self, part: Part) -> None:
        with (self._out / "log.txt").open("a") as log:
            for outcome in self._outcomes[part.name]:
                words = ", ".join(str(value) for value in outcome.unit.values())
                log.write(f"==> {words}: {outcome.status} after {outcome.seconds:.0f} s\n")
                path = self._path(outcome.unit).with_suffix(".log")
                if path.exists():
                    log.write(path.read_text(errors="replace")[-20_000:] + "\n")
        done = self._outcomes[part.name]
        print(f"{part.name}: {gpu_summary.told(done)}", flush=True)

    def write(self) -> None:
        """All that is there so far."""
        environment = self._read({"part": "environment"}) or machine.environment()
        benches = {name: self._bench(name, environment) for name in BENCHES if name in self._outcomes}
        for name, whole in benches.items():
            if whole.rows:
                whole.write_json(self._out / f"{name}.json")
        _write(self._out / "gpu_paths.json", gpu_paths.table(environment, benches))
        tables = {path.name: json.loads(path.read_text()) for path in sorted((self._folder / "tuning").glob("*.json"))}
        if tables:
            _write(self._out / "tuning.json", tables)
        proof = {
            "command": self._command,
            "environment": environment,
            "parts": {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in self._outcomes.items()},
            "findings": {
                name: [finding for outcome in outcomes for finding in self._read(outcome.unit) or []]
                for name, outcomes in self._outcomes.items()
                if name not in (*BENCHES, "environment", "tests")
            },
            "tests": {
                outcome.unit["room"]: gpu_summary.counts(self._path(outcome.unit))
                for outcome in self._outcomes.get("tests", [])
            },
        }
        _write(self._out / "proof.json", proof)
        (self._out / "summary.md").write_text(gpu_summary.markdown(proof, benches, {p.name: p.words for p in PARTS}))

    def _read(self, unit: Unit) -> Any:
        path = self._path(unit)
        return json.loads(path.read_text()) if path.exists() else None

    def _bench(self, name: str, environment: dict[str, Any]) -> results.Report:
        """The rows of all families in one report."""
        found: list[results.Row] = []
        planned = 0
        for outcome in self._outcomes[name]:
            path = self._path(outcome.unit)
            if path.exists():
                of_family = results.read(path)
                found += of_family.rows
                planned += of_family.planned
        return results.Report(f"{self._command} ({name})", 0, environment, found, planned)

    def faults(self) -> int:
        """Units that failed, and checks that did not come out as they must."""
        failed = sum(outcome.status == "failed" for outcomes in self._outcomes.values() for outcome in outcomes)
        proof = json.loads((self._out / "proof.json").read_text())
        complaints = [finding for found in proof["findings"].values() for finding in found if finding["complaint"]]
        return failed + len(complaints)


def name_of(environment: dict[str, Any]) -> str:
    """The folder of `benchmarks/results` for a run: card, date, commit."""
    words = (environment["GPU"], environment["date"][:10], environment["commit"].split()[0].rstrip(","))
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    described = "\n".join(f"    {part.name:12} {part.words}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.gpu_proof",
        description=__doc__,
        epilog=f"{USAGE}\nparts, in this order:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", help="Of those below, separated by commas. Default: all.")
    parser.add_argument("--families", default=",".join(FAMILIES), help="Default: %(default)s.")
    parser.add_argument("--minutes", type=float, default=9.0, help="For all parts together. Default: %(default)s.")
    parser.add_argument("--min-time", type=float, help="Seconds of timing per provider and row.")
    parser.add_argument("--smoke", action="store_true", help="Tiny sizes, to try this script itself; on the CPU too.")
    found = parser.parse_args(words)
    names = [part.name for part in PARTS]
    found.parts = found.parts.split(",") if found.parts else names
    found.families = tuple(found.families.split(","))
    for words_, known in ((found.parts, names), (found.families, FAMILIES)):
        for word in words_:
            if word not in known:
                parser.error(f"{word!r} is not one of {', '.join(known)}")
    if found.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke tries the script itself")
    return found


def main(words: list[str] | None = None) -> int:
    """The exit status is 1 if a unit failed or a check did not come out as it must."""
    found = _arguments(words)
    least = found.min_time if found.min_time is not None else 0.001 if found.smoke else 0.05
    options = Options(found.device, found.smoke, found.families, least)
    command = shlex.join(["python", "-m", f"{__package__}.gpu_proof", *(sys.argv[1:] if words is None else words)])
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(found.out, Path(folder), options, time.monotonic() + 60 * found.minutes, command)
        for part in PARTS:
            if part.name in found.parts:
                proof.run(part)
        faults = proof.faults()
    environment = json.loads((found.out / "proof.json").read_text())["environment"]
    print(f"{faults} faults; keep with: cp -r {found.out} benchmarks/results/{name_of(environment)}")
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == [_UNIT]:
        _begin(*sys.argv[2:])
    else:
        raise SystemExit(main())
