"""`import lwft_kernels` loads no library whose models it can accelerate."""

import subprocess
import sys


def test_import_is_light():
    heavy = ("transformers", "peft", "triton", "numpy.testing")
    code = f"import sys, lwft_kernels; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
