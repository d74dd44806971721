"""Drives CMake for pip. What is built, and how, is said in CMakeLists.txt; the metadata is in pyproject.toml.

Environment: MAX_JOBS (parallel compilers), LWFT_BUILD_CUDA, CUDA_HOME and TORCH_CUDA_ARCH_LIST
(cmake/cuda.cmake), LWFT_CMAKE_ARGS (further arguments for cmake).
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
find_torch = runpy.run_path(str(ROOT / "cmake" / "find_torch.py"))["find_torch"]

# Before setuptools prints anything, so that one sentence is all that is said. An sdist needs no torch.
if {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"} & set(sys.argv):
    find_torch()

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402


class CMakeBuild(build_ext):
    """Builds the CMake target _C: for an editable install into the source tree, else into the wheel."""

    def run(self) -> None:
        # An editable install shares build/ with cmake calls made by hand. A wheel leaves the library in the
        # source tree alone and starts anew: what it was built with last time (an isolated ninja) may be gone.
        in_place = bool(self.inplace or self.editable_mode)
        build_dir = ROOT / "build" if in_place else Path(self.build_temp).resolve()
        package_root = ROOT if in_place else Path(self.build_lib).resolve()
        if not in_place:
            shutil.rmtree(build_dir, ignore_errors=True)
        _cmake(
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLWFT_LIBRARY_DIR={package_root / 'lwft_kernels'}",
            # A spill costs speed: who works on a kernel must see it, who installs it need not be stopped.
            f"-DLWFT_SPILLS_ARE_ERRORS={'ON' if in_place else 'OFF'}",
            *shlex.split(os.environ.get("LWFT_CMAKE_ARGS", "")),
        )
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        _cmake("--build", build_dir, "--target", "_C", *jobs)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python in it, so no Python version in its name


class PythonFreeWheel(bdist_wheel):
    """One wheel per platform for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _cmake(*arguments: "str | Path") -> None:
    if subprocess.run([_tool("cmake"), *arguments]).returncode != 0:
        raise SystemExit("lwft_kernels: the build failed; the reason is above")


def _tool(name: str) -> str:
    """A build tool beside the running interpreter, or in PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"lwft_kernels is built by {name}, which is not installed: pip install {name}")
    return found


setup(
    packages=[
        *find_packages(include=["lwft_kernels", "lwft_kernels.*"]),
        "lwft_bench",
        *(f"lwft_bench.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={"lwft_bench": "benchmarks"},  # the folder as one looks for it, the package as one imports it
    ext_modules=[Extension("lwft_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PythonFreeWheel},
)
