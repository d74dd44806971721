"""Drives CMake for pip. What is built, and how, is said in CMakeLists.txt; metadata stands in pyproject.toml.

Environment: MAX_JOBS (parallel compilers), LWFT_BUILD_CUDA=0/1, CUDA_HOME, TORCH_CUDA_ARCH_LIST (see cmake/cuda.cmake),
LWFT_CMAKE_ARGS (further arguments for cmake).
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
    """Builds the CMake target _C: into the source tree for an editable install, else into the wheel."""

    def run(self) -> None:
        in_place = bool(self.inplace or self.editable_mode)
        # An editable install shares build/ with a developer's own cmake calls. A wheel must not touch the library
        # in the source tree, so it has a build directory of its own.
        build_dir = ROOT / "build" if in_place else Path(self.build_temp).resolve()
        library_dir = (ROOT if in_place else Path(self.build_lib).resolve()) / "lwft_kernels"
        cmake, ninja = _tool("cmake"), _tool("ninja")
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # in a cache from an earlier isolated build it names a path now gone
            f"-DLWFT_TORCH_DIR={find_torch()}",
            f"-DLWFT_LIBRARY_DIR={library_dir}",
            f"-DLWFT_BUILD_CUDA={os.environ.get('LWFT_BUILD_CUDA', '')}",
            # A spill costs speed: whoever works on a kernel must see it; whoever installs it can do without the error.
            f"-DLWFT_SPILLS_ARE_ERRORS={'ON' if in_place else 'OFF'}",
            *shlex.split(os.environ.get("LWFT_CMAKE_ARGS", "")),
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *configure], check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", build_dir, "--target", "_C", *(["-j", jobs] if jobs else [])], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python in it, so no Python version in its name


class PythonFreeWheel(bdist_wheel):
    """One wheel per platform for every Python: the library holds no Python.h."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _tool(name: str) -> str:
    """A build tool beside the running interpreter or in PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"lwft_kernels needs {name} to build: pip install {name}")
    return found


setup(
    packages=[
        *find_packages(include=["lwft_kernels", "lwft_kernels.*"]),
        *("lwft_bench" + (f".{name}" if name else "") for name in ["", *find_packages("benchmarks")]),
    ],
    package_dir={"lwft_bench": "benchmarks"},  # the folder is named for who looks for it, the package for who imports it
    ext_modules=[Extension("lwft_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PythonFreeWheel},
)
