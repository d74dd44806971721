"""What compiling ahead of time calls a fault, and the compiler does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lwft_kernels


def compiling(tmp_path, *command):
    """A process that compiles: not under the interpreter, with nothing compiled before."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    environment["PYTHONPATH"] = str(Path(lwft_kernels.__file__).parents[1])  # beside which it need not be installed
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_planted_faults_are_found(tmp_path):
    faults = {
        (call, card.split()[0]): found
        for call, card, found, _ in compiling(tmp_path, Path(__file__).with_name("faulty_kernels.py"))
    }
    assert faults["sound", "sm_90"] == faults["sound", "sm_86"] == []
    for card in ("sm_86", "sm_90"):
        (fault,) = faults["too much shared memory", card]
        assert "bytes of shared memory, the card has" in fault
        assert any(fault.startswith("spills") for fault in faults["spills", card])
        assert faults["no matrix instruction", card] == ["no matrix instruction"]
