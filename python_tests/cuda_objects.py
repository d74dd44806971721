"""What nvcc makes of the CUDA kernels, read from the objects of the build. No GPU is needed.

    python python_tests/cuda_objects.py --write    the committed table, anew from what the build makes
    python python_tests/cuda_objects.py --cost     every file compiled alone: its time and its memory

Both want a build with nvcc, as `make library` makes it; a kernel that has changed is built again.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
TABLE = ROOT / "python_tests" / "cuda" / "kernels.csv"
TARGET = "lwft_cuda_kernels"

# What says something about a kernel when it is there: matrix products and their operands from shared memory, copies to
# shared memory past the registers, 16 bytes at a time to and from memory.
WANTED = {
    "HMMA": r"HMMA\.",
    "LDSM": r"LDSM\.",
    "LDGSTS": r"LDGSTS\.",
    "LDG.128": r"LDG\.E\.\S*128",
    "STG.128": r"STG\.E\.\S*128",
}
LOCAL = r"(?:LDL|STL)\b"
FLOAT_ATOMIC = r"(?:RED|ATOMG?|ATOMS)\.\S*F(?:16|32|64)"  # a sum in no order
NARROW = r"(?:LDG|STG)\.E\.\S*[US](?:8|16)\b"  # less than 4 bytes of global memory
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture.

    Attributes:
        threads: the most that a block may have.
        static_shared, stack: bytes. From sm_90 on 1024 of shared memory are the driver's. What a launch asks for is no
            part of the object.
        local, float_atomics, narrow: instructions that load or store local memory, that add floating-point numbers in
            no order, that load or store less than 4 bytes of global memory.
        instructions: those of `WANTED` that are there.
    """

    file: str
    kernel: str
    architecture: str
    threads: int
    registers: int
    static_shared: int
    stack: int
    local: int
    float_atomics: int
    narrow: int
    instructions: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.kernel, self.architecture

    @property
    def blocks(self) -> int:
        """How many blocks the registers of a multiprocessor are enough for (CUDA occupancy calculator): 65536 of them,
        handed out to warps by 256."""
        warps = self.threads // 32
        return 65536 // (-(-self.registers * 32 // 256) * 256) // warps


def why_not() -> str | None:
    """Why there is nothing to read."""
    if not (BUILD / "build.ninja").exists() or TARGET not in (BUILD / "build.ninja").read_text():
        return f"there is no build with nvcc in {BUILD.name}/: `make library` makes one where nvcc is"
    for tool in ("cuobjdump", "nvdisasm", "c++filt"):
        if _tool(tool) is None:
            return f"there is no {tool}: it comes with the CUDA toolkit or with Triton, c++filt with binutils"
    return None


def _tool(name: str) -> str | None:
    """In PATH, or as Triton brings it along."""
    places = [os.environ.get("PATH", "")]
    for folder in sys.path:
        places.append(str(Path(folder) / "triton" / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def build() -> None:
    """Bring the objects up to date. RuntimeError holds what the compiler said."""
    cache = (BUILD / "CMakeCache.txt").read_text()
    (cmake,) = re.findall(r"^CMAKE_COMMAND:\w+=(.*)$", cache, re.MULTILINE)
    with (BUILD / f"{TARGET}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers
        done = subprocess.run(
            [cmake, "--build", BUILD, "--target", TARGET], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-5000:] + done.stderr[-5000:])


def commands() -> dict[str, list[str]]:
    """The compiler's command for each file, by its path below csrc."""
    found = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        path = Path(entry["file"])
        if path.suffix == ".cu":
            found[str(path.relative_to(ROOT / "csrc"))] = shlex.split(entry["command"])
    return dict(sorted(found.items()))


def nvcc_version() -> str:
    """The release, as 13.0."""
    compiler = next(iter(commands().values()))[0]
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    assert match is not None, said
    return match[1]


def kernels() -> list[Kernel]:
    """All that the build holds, brought up to date, in order. Read once for all processes."""
    build()
    folder = BUILD / "CMakeFiles" / f"{TARGET}.dir" / "csrc"
    objects = {name: folder / f"{name}.o" for name in commands()}
    # what was read before, while object and reader are as they were
    state = [[name, path.stat().st_mtime_ns] for name, path in objects.items()]
    state.append([Path(__file__).name, Path(__file__).stat().st_mtime_ns])
    kept = BUILD / f"{TARGET}.json"
    with (BUILD / f"{TARGET}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            before = json.loads(kept.read_text())
            if before["state"] == state:
                return [Kernel(*row) for row in before["kernels"]]
        found = [kernel for name, path in objects.items() for kernel in read(name, path)]
        found.sort(key=lambda kernel: (kernel.file, kernel.kernel, int(kernel.architecture.removeprefix("sm_"))))
        kept.write_text(json.dumps({"state": state, "kernels": [astuple(kernel) for kernel in found]}))
    return found


def read(file: str, path: Path) -> Iterator[Kernel]:
    usage = _sections(_output("cuobjdump", "--dump-resource-usage", path), r"^ Function (\S+?):")
    threads = _sections(_output("cuobjdump", "--dump-elf", path), r"^\.nv\.info\.(\S+)")
    code = _sections(_output("cuobjdump", "--dump-sass", path), r"^\s+Function : (\S+)")
    names = dict(zip(*_plain_names({symbol for _, symbol in usage}), strict=True))
    assert len(set(names.values())) == len(names), f"two kernels of {file} have one name: {names}"
    for (architecture, symbol), words in usage.items():
        used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|SHARED):(\d+)", words)}
        limit = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x([0-9a-f]+)", threads[architecture, symbol])
        assert limit is not None, f"{symbol} says nothing of its threads: define it by LWFT_KERNEL"
        instructions = _INSTRUCTION.findall(code[architecture, symbol])
        assert instructions, f"{symbol}: the disassembly is empty"
        yield Kernel(
            file, names[symbol], architecture, int(limit[1], 16), used["REG"], used["SHARED"], used["STACK"],
            *(sum(bool(re.match(form, word)) for word in instructions) for form in (LOCAL, FLOAT_ATOMIC, NARROW)),
            " ".join(name for name, form in WANTED.items() if any(re.match(form, word) for word in instructions)),
        )  # fmt: skip


def _output(tool: str, *words: object) -> str:
    program = _tool(tool)
    assert program is not None
    beside = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])  # cuobjdump calls nvdisasm
    command = [program, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": beside}
    ).stdout


def _sections(text: str, heading: str) -> dict[tuple[str, str], str]:
    """What stands below each heading, by architecture and the heading's word."""
    found: dict[tuple[str, str], str] = {}
    marks = list(re.finditer(rf"^arch = (?P<architecture>\S+)|{heading}", text, re.MULTILINE))
    architecture = ""
    for mark, following in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        if mark["architecture"]:
            architecture = mark["architecture"]
        else:
            found[architecture, mark[2]] = text[mark.end() : following]
    return found


def _plain_names(symbols: Iterable[str]) -> tuple[list[str], list[str]]:
    """Symbols, and what they are called without namespaces and parameters: adapter_dx_kernel<BFloat16, 64>."""
    mangled = sorted(symbols)
    said = subprocess.run([str(_tool("c++filt"))], input="\n".join(mangled), capture_output=True, text=True, check=True)
    plain = []
    for line in said.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|\blwft::|\bcuda::|^void ", "", line)
        depth = 0
        for end, letter in enumerate(name):  # up to the parenthesis that opens the parameters
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                name = name[:end]
                break
        plain.append(name)
    return mangled, plain


# ---- the table ----


def read_table() -> tuple[str, list[Kernel]]:
    """The release of nvcc that it is of, and its rows."""
    first, *lines = TABLE.read_text().splitlines()
    kinds = {field.name: int if field.type == "int" else str for field in fields(Kernel)}
    rows = [{name: kinds[name](value) for name, value in row.items()} for row in csv.DictReader(lines)]
    return first.removeprefix("# nvcc "), [Kernel(**row) for row in rows]


def write_table(found: list[Kernel]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {nvcc_version()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Kernel))
        writer.writerows(astuple(kernel) for kernel in found)


def complaints(found: list[Kernel], table: list[Kernel]) -> list[str]:
    """What of `found` is a fault, or worse than in `table`. Architectures that were not built are not missed."""
    known = {kernel.key: kernel for kernel in table}
    said = []
    for kernel in found:
        where = f"{kernel.file}: {kernel.kernel} on {kernel.architecture}"
        if kernel.stack or kernel.local:
            said.append(f"{where} uses local memory: {kernel.stack} bytes, {kernel.local} loads and stores")
        if kernel.float_atomics:
            said.append(f"{where} adds floating-point numbers by atomics, in no order: {kernel.float_atomics}")
        before = known.get(kernel.key)
        if before is None:
            said.append(f"{where} is not in the table")
            continue
        if kernel.blocks < before.blocks:
            said.append(
                f"{where} takes {kernel.registers} registers, {kernel.registers - before.registers} more than before: "
                f"room for {kernel.blocks} blocks of {kernel.threads} threads on a multiprocessor, before for "
                f"{before.blocks} of {before.threads}"
            )
        if kernel.static_shared > before.static_shared:
            grown = kernel.static_shared - before.static_shared
            said.append(f"{where} has {grown} bytes of static shared memory more than before")
        if kernel.narrow and not before.narrow:
            said.append(f"{where} reads or writes an element of memory alone: {kernel.narrow} times")
        lost = set(before.instructions.split()) - set(kernel.instructions.split())
        if lost:
            said.append(f"{where} has lost its {', '.join(sorted(lost))}")
    architectures = {kernel.architecture for kernel in found}
    gone = known.keys() - {kernel.key for kernel in found}
    said += [
        f"{file}: {name} on {arch} is in the table only" for file, name, arch in sorted(gone) if arch in architectures
    ]
    return said


def changes(found: list[Kernel], table: list[Kernel]) -> list[str]:
    """Registers that are others than in the table."""
    known = {kernel.key: kernel.registers for kernel in table}
    return [
        f"{kernel.file}: {kernel.kernel} on {kernel.architecture}: {known[kernel.key]} -> {kernel.registers} registers"
        for kernel in found
        if known.get(kernel.key, kernel.registers) != kernel.registers
    ]


# ---- the cost of compiling ----


def cost() -> Iterator[tuple[str, float, int]]:
    """Seconds and the bytes of its largest process, for each file alone, for all that the build compiles it for."""
    with tempfile.TemporaryDirectory() as folder:
        for file, command in commands().items():
            command = [*command[: command.index("-o")], "-o", str(Path(folder) / "object.o")]
            begin = time.monotonic()
            process = subprocess.Popen(command, cwd=BUILD)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                raise SystemExit(f"{file} does not compile")
            yield file, time.monotonic() - begin, used.ru_maxrss * 1024


def main(words: list[str]) -> None:
    if words not in (["--write"], ["--cost"]):
        raise SystemExit(__doc__)
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    if words == ["--write"]:
        found = kernels()
        before = read_table()[1] if TABLE.exists() else []
        write_table(found)
        print("\n".join([*changes(found, before), f"{TABLE.relative_to(ROOT)}: {len(found)} rows"]))
        return
    instances: dict[str, set[str]] = {}
    for kernel in kernels():
        instances.setdefault(kernel.file, set()).add(kernel.kernel)
    total = largest = 0.0
    print(f"{'file':44} kernels seconds   MiB")
    for file, seconds, memory in cost():
        total, largest = total + seconds, max(largest, memory)
        print(f"{file:44} {len(instances[file]):7} {seconds:7.1f} {memory / 2**20:5.0f}", flush=True)
    print(f"{'all, one after the other':44} {sum(map(len, instances.values())):7} {total:7.1f} {largest / 2**20:5.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
