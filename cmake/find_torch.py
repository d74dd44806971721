"""Where the torch this package is being installed beside lies. It is looked up, never imported.

pip builds in an isolated environment that hides the site-packages of the target environment, but it does so with the
target's own interpreter, whose `purelib` still names them. So the build finds the torch it will run with, and
build-system.requires does not have to name torch, which would download a second and perhaps different one.

As a script it prints the directory, or one sentence saying what to install and exits with 1.
"""

import re
import site
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the stable ABI of 2.10 is what _C.so is built against; see CMakeLists.txt


def find_torch() -> Path:
    """The directory of the installed torch package. Raises SystemExit with one sentence if there is none to use."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    if sys.prefix != sys.base_prefix and _sees_system_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        roots += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    for root in roots:
        version_file = Path(root or ".", "torch", "version.py")
        if not version_file.is_file():
            continue
        version = re.search(r"^__version__\b.*?['\"](\d+)\.(\d+)([^'\"]*)", version_file.read_text(), re.MULTILINE)
        if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
            found = "of unknown version" if version is None else f"{version[1]}.{version[2]}{version[3]}"
            raise SystemExit(
                f"lwft_kernels needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer and found torch {found} in "
                f"{version_file.parent}: upgrade it, e.g. `pip install --upgrade torch`, then install lwft_kernels again."
            )
        return version_file.parent.resolve()
    raise SystemExit(
        "lwft_kernels is built beside the torch it will run with, and this environment has none: install torch "
        "first, e.g. `pip install torch`, then install lwft_kernels again (build front ends other than pip also need "
        "--no-build-isolation)."
    )


def _sees_system_packages() -> bool:
    """Whether this virtual environment was made with --system-site-packages."""
    config = Path(sys.prefix, "pyvenv.cfg")
    return config.is_file() and bool(
        re.search(r"^include-system-site-packages\s*=\s*true", config.read_text(), re.MULTILINE | re.IGNORECASE)
    )


if __name__ == "__main__":
    print(find_torch())
