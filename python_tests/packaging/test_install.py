"""setup.py and what it packs, without building anything."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

import lwft_kernels

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run in a source tree")


def run(*command: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which nothing is installed."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    return directory / "bin" / "python"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources: setuptools writes beside what it packs."""
    ignored = shutil.ignore_patterns(".*_cache", ".git", ".venv*", "build", "results", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))


def stand_in_for_torch(directory: Path, version: str) -> Path:
    """A torch that can be looked up but not imported."""
    package = directory / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    (package / "version.py").write_text(f"from typing import Optional\n\n__version__ = '{version}'\n")
    return package


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel"])
def test_without_torch_one_sentence_says_what_to_install(bare_python, command):
    result = run(bare_python, "setup.py", command)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "install torch first, e.g. `pip install torch`" in result.stderr


def test_an_older_torch_is_named(bare_python, tmp_path):
    package = stand_in_for_torch(tmp_path, "2.9.1+cpu")
    result = run(bare_python, "setup.py", "bdist_wheel", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"needs torch 2.10 or newer, and {package} is torch 2.9.1+cpu" in result.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0.0a0+git1234567"])
def test_torch_is_looked_up_and_not_imported(bare_python, tmp_path, version):
    package = stand_in_for_torch(tmp_path, version)
    result = run(bare_python, ROOT / "cmake" / "find_torch.py", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout.strip()) == (0, str(package.resolve())), result.stderr


def test_torch_of_the_target_environment_is_found_behind_pips_isolation(bare_python, tmp_path):
    """pip runs the target's interpreter and hides its site-packages by a sitecustomize."""
    purelib = run(bare_python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n\nsys.path.remove({purelib!r})\n")
    package = stand_in_for_torch(Path(purelib), "2.13.0")
    try:
        result = run(bare_python, ROOT / "cmake" / "find_torch.py", PYTHONPATH=str(tmp_path))
        assert result.stdout.strip() == str(package.resolve()), result.stderr
    finally:
        shutil.rmtree(package)


def test_the_wheel_is_for_every_python(tree):
    pytest.importorskip("setuptools", minversion="77")
    result = run(
        sys.executable,
        "-c",
        "from distutils.core import run_setup\n"
        "command = run_setup('setup.py', stop_after='init').get_command_obj('bdist_wheel')\n"
        "command.ensure_finalized()\n"
        "print(*command.get_tag()[:2], command.root_is_pure)\n",
        cwd=tree,
        SETUPTOOLS_USE_DISTUTILS="local",
    )
    assert result.stdout.split() == ["py3", "none", "False"], result.stderr


def test_the_sdist_holds_all_that_a_build_needs(tree):
    pytest.importorskip("setuptools", minversion="77")
    (tree / "csrc" / "stray.so").touch()
    result = run(sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_sdist('.'))", cwd=tree)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tree / result.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES}
    needed = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "lwft_kernels/py.typed"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "cmake").iterdir() if path.is_file()}
    assert sources
    assert needed | sources <= packed
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc"))]


SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


def test_the_build_does_not_fetch_a_torch_of_its_own():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [word for word in settings["build-system"]["requires"] if word.startswith("torch")]
    assert settings["project"]["version"] == lwft_kernels.__version__


def test_the_command_is_installed():
    try:
        scripts = importlib.metadata.distribution("lwft_kernels").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lwft_kernels is imported from the source tree, not installed")
    (command,) = [script for script in scripts if script.name == "lwft-bench"]
    assert callable(command.load())
