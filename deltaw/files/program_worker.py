"""The process in which a program that a model wrote runs. program.py starts it, once for each program.

What it gives up before it reads the program, for good:

    files, sockets, memory, processes     as the worker for templates does (`bounded_worker.lock_down`)
    descriptors                           none can be opened any more, not even in the place of one that is closed
    system calls                          all but those of `CALLS` are refused by the kernel (seccomp, Kerrisk 2012): no
                                          file is made, moved or removed, nobody is sent a signal, nothing is started
    computing time                        twice what whoever asks will wait

Modules can't be found any more either, so the usual ones of the standard library are imported before. Where the kernel
has no filter for system calls, or this is another machine than those of `MACHINES`, no program is run: `X` and why
comes instead of `R`. Arm's numbers are from the kernel's table and weren't tried on one.

After `R` it reads one line, {word, program}, runs the program and writes the word; or why it failed, behind a NUL.
"""

import ctypes
import importlib
import io
import json
import os
import platform
import resource
import sys

from deltaw.files.bounded_worker import lock_down, lower

MODULES = (  # noqa: SIM905
    "abc array ast base64 bisect builtins calendar cmath collections collections.abc contextlib copy csv dataclasses "
    "datetime decimal difflib enum fractions functools hashlib heapq inspect io itertools json keyword math numbers "
    "operator pprint queue random re secrets statistics string struct sys textwrap time traceback types typing "
    "unicodedata unittest uuid warnings zlib"
).split()
CALLS = {  # name: (x86-64, Arm 64)
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "times": (100, 153), "sigaltstack": (131, 132),
    "gettid": (186, 178), "futex": (202, 98), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "getrandom": (318, 278),
    "membarrier": (324, 283), "rseq": (334, 293),
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # the kernel's number of each, and its column
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of the filter
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # what it can answer; REFUSE is EPERM
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
CPU_SECONDS = 20


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction))]


class _Nowhere(io.TextIOBase):
    """What is printed goes nowhere."""

    def write(self, text: str) -> int:
        return len(text)


def refuse_calls() -> None:
    """Let the kernel refuse all system calls but those of `CALLS`. Raises OSError where that can't be had."""
    if platform.machine() not in MACHINES or not sys.platform.startswith("linux"):
        raise OSError(f"its system calls aren't known ({sys.platform}, {platform.machine()})")
    machine, column = MACHINES[platform.machine()]
    numbers = [call[column] for call in CALLS.values()]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [(EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    code = (_Instruction * len(program))(*(_Instruction(*step) for step in program))
    filter_ = _Filter(len(program), code)
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SECCOMP, FILTER, ctypes.byref(filter_), 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "the kernel has no filter for system calls (seccomp)")


def main(memory: int) -> None:
    out = os.dup(1)
    try:
        for name in MODULES:
            importlib.import_module(name)
        lock_down(memory)
        lower(resource.RLIMIT_NOFILE, 0)
        lower(resource.RLIMIT_CPU, CPU_SECONDS)
        refuse_calls()
    except (OSError, ImportError, ValueError) as error:
        os.write(1, f"X{error}".encode())
        return
    os.write(1, b"R")
    request = json.loads(sys.stdin.buffer.readline())
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = _Nowhere()  # type: ignore[assignment, misc]
    os.write(out, _ran(request["program"]) or request["word"].encode())
    os._exit(0)


def _ran(program: str) -> bytes:
    """Nothing where it came to its end, else why not."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return b"\0it needs too much memory"
    except SystemExit:
        return b"\0it ended itself"
    except BaseException as error:  # a program can fail in any way that Python can
        return b"\0" + f"{type(error).__name__}: {error}".rstrip(": ").encode("utf-8", "replace")[:300]
    return b""
