"""`import lwft_kernels` loads no library whose models it can accelerate."""

import subprocess
import sys


def test_import_is_light():
    code = "import sys, lwft_kernels; print([m for m in ('transformers', 'peft', 'triton', 'numpy.testing') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
