"""`accelerate(model)`: the kernels put into models of other libraries, with a report and an exact undo.

One file per library. None of them is imported before a model of that library is handed over.
"""

from lwft_kernels.integrations.accelerate import accelerate, accelerated, explain
from lwft_kernels.integrations.report import Change, Report

__all__ = ["Change", "Report", "accelerate", "accelerated", "explain"]
