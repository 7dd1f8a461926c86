"""Processes that write a dataset with a model that is already loaded, and that can be killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import traceback


def forked(work):
    """Run `work` in a process of its own; returns its id. It ends with 0, or with 1 after an error."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child):
    """How a process ended: its code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def killed_at(call):
    """A block in which the process kills itself (SIGKILL) right before or after its n-th call that changes a file."""
    names = ("pwrite", "replace", "fsync", "unlink", "ftruncate")
    kept = {name: getattr(os, name) for name in names}
    calls = itertools.count(1)  # several threads may count

    def counted(name):
        def function(*arguments, **keywords):
            mine = next(calls)
            if mine == call and call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return kept[name](*arguments, **keywords)
            finally:
                if mine == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        return function

    for name in names:
        setattr(os, name, counted(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(os, name, function)


def contents(folder):
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
