"""Which replaced modules a fast call has reached: a patch can be in place and never be called."""

from __future__ import annotations

import weakref

import torch
from torch import nn

_modules: dict[int, weakref.ref[nn.Module]] = {}
# Under torch.compile the code of a module is traced, once for many modules alike: all of the class count as reached.
_classes: weakref.WeakSet[type] = weakref.WeakSet()


def mark(module: nn.Module) -> None:
    """Note that a fast call of `module` is under way: some 0.2 us, and nothing at all in a compiled graph.

    Nothing is stored on the module, so copies and pickles are as they were.
    """
    if torch.compiler.is_compiling():
        _mark_class(type(module))
    elif id(module) not in _modules:
        _mark_first(module)


def _mark_first(module: nn.Module) -> None:
    if getattr(module, "_is_replica", False):  # nn.DataParallel calls copies
        _mark_class(type(module))
        return
    key = id(module)
    _modules[key] = weakref.ref(module, lambda _: _modules.pop(key, None))


def _mark_class(kind: type) -> None:
    _classes.add(kind)


# torch.compile calls such a function while it traces and leaves its result in the graph: here None, that is nothing.
# (`torch.compiler.assume_constant_result` sets the same, and imports all of the compiler.)
_mark_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_reached(module: nn.Module) -> bool:
    """Whether a fast call of `module` has begun, or, under torch.compile, of one of its class."""
    return id(module) in _modules or type(module) in _classes


def forget(module: nn.Module) -> None:
    """`module` is as if it had never been called."""
    _modules.pop(id(module), None)
