"""Where the torch this package is being installed beside lies. It is looked up, never imported.

pip builds in an isolated environment, which hides the site-packages of the target environment, but with the
target's own interpreter, whose `purelib` still names them. So the build finds the torch it will run with, and
build-system.requires need not name torch, which would download a second and perhaps different one.

As a script: prints the directory, or one sentence that says what to install first, and then exits with 1.
"""

import re
import site
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 10)  # whose stable ABI _C.so is built against: TORCH_TARGET_VERSION in library.cmake


def find_torch() -> Path:
    """The directory of the installed torch package. SystemExit with one sentence where none can be used."""
    for root in _site_directories():
        version_file = Path(root, "torch", "version.py")
        if version_file.is_file():
            break
    else:
        raise SystemExit(
            "lwft_kernels is built beside the torch it will run with, and this environment has none: install "
            "torch first, e.g. `pip install torch`, then lwft_kernels (with a build front end other than "
            "pip, add --no-build-isolation)."
        )
    version = re.search(r"(?m)^__version__\b.*?['\"]((\d+)\.(\d+)[^'\"]*)", version_file.read_text())
    if version is None or (int(version[2]), int(version[3])) < OLDEST_TORCH:
        raise SystemExit(
            f"lwft_kernels needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, and "
            f"{version_file.parent} is torch {version[1] if version else 'of unknown version'}: upgrade it "
            "first, e.g. `pip install --upgrade torch`, then install lwft_kernels."
        )
    return version_file.parent.resolve()


def _site_directories() -> list[str]:
    """Where the target environment keeps packages, in the order it imports them."""
    directories = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        directories.append(site.getusersitepackages())
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.is_file() and re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        directories += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    return [directory or "." for directory in directories]


if __name__ == "__main__":
    print(find_torch())
