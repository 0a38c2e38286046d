"""Watch the system calls of a whole job from outside, and let one of them fail or be its last.

A tracer in the way of strace, made for one question: the k-th call, of all processes of a job together, that changes
something in one directory. strace counts for each thread and each kind of call apart, cannot be told of a directory
with all that is in it, and kills one process of the job. Here there is one count, and at the chosen call every process
is killed before it takes place, or the call is answered with an error in the kernel's place.

A seccomp filter makes only write-like calls stop, so the rest of the job runs at full speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.forking import fork
from tests.faults.system_calls import BY_NUMBER, OPEN_TO_WRITE, WRITE_LIKE, SystemCall, files_of

_SEIZE, _LISTEN, _CONT, _SYSCALL, _POKEUSER, _GET_EVENT, _SYSCALL_INFO = 0x4206, 0x4208, 7, 24, 6, 0x4201, 0x420E
# TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, TRACESECCOMP, EXITKILL
_OPTIONS = 1 | 2 | 4 | 8 | 0x80 | 0x100000
_EVENT_SECCOMP, _EVENT_STOP = 7, 128
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_RAX, _ORIG_RAX = 10 * 8, 15 * 8  # of `struct user_regs_struct`, <sys/user.h>
_STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@dataclass
class Call:
    """One call that changes something in the watched directory."""

    number: int
    """From 1, in the order in which the calls were begun."""
    who: str
    name: str
    files: tuple[str, ...]
    """Inside the watched directory relative to it, `.` for itself; others absolute."""
    process: int
    error: int | None = None
    """0: it succeeded; None: it was not seen to end."""
    creates: bool = False
    """Whether it is an opening that makes a file that is not there."""

    def __str__(self) -> str:
        return f"call {self.number}, {self.name}({', '.join(self.files)}) of {self.who}"


@dataclass(frozen=True)
class Fault:
    """What happens at a call.

    Attributes:
        at: its number.
        error: the errno that it is answered with; None: every process of the job is killed before it takes place.
        lasting: all later calls are answered so too.
        action: done before it takes place, instead of either.
    """

    at: int
    error: int | None = None
    lasting: bool = False
    action: Callable[[Call, list[int]], None] | None = field(default=None, compare=False)

    def hits(self, call: Call) -> bool:
        """Whether it takes place at a call."""
        if call.number <= self.at or not self.lasting:
            return call.number == self.at
        # A full disk keeps nobody from deleting.
        return self.error not in (errno.ENOSPC, errno.EDQUOT) or call.name not in ("unlink", "unlinkat", "rmdir")

    def __str__(self) -> str:
        if self.action is not None:
            return "an action"
        if self.error is None:
            return "SIGKILL"
        return errno.errorcode[self.error] + (" from then on" if self.lasting else "")


@dataclass
class Traced:
    """How a job went."""

    calls: list[Call]
    killed: bool
    fired: bool
    """Whether the fault took place."""
    hung: list[str]
    """The processes that were still there when the time was over."""
    statuses: dict[int, int]
    """Exit status of each first process; minus the signal where one ended it."""


class Refused(RuntimeError):
    """This machine does not let one process trace another."""


def trace(
    starts: list[Callable[[], None]],
    watched: Path,
    fault: Fault | None = None,
    *,
    timeout: float,
    missing: frozenset[str] = frozenset(),
) -> Traced:
    """Run a job whose processes begin with `starts`, and watch a directory. Call it in a process without children.

    Args:
        starts: the body of each first process; it must not return.
        watched: an absolute path without links.
        fault: what happens at which call; None: nothing.
        timeout: seconds, after which the job is killed as hung.
        missing: names of calls that this kernel shall not have: they are answered with ENOSYS and not counted.

    Raises:
        Refused: tracing is not allowed here.
    """
    return _Tracer(watched, fault, missing).run(starts, timeout)


class _Tracer:
    def __init__(self, watched: Path, fault: Fault | None, missing: frozenset[str]) -> None:
        self._watched = str(watched)
        self._above = str(watched.parent)
        self._fault = fault
        self._missing = missing
        self._alive: set[int] = set()
        self._first: dict[int, int] = {}
        self._pending: dict[int, Call] = {}
        self._result = Traced([], False, False, [], {})

    def run(self, starts: list[Callable[[], None]], timeout: float) -> Traced:
        try:
            for rank, start in enumerate(starts):
                pid = _fork_traced(start)
                self._first[pid] = rank
                self._alive.add(pid)
            # A thread may kill what it does not trace; a signal could come between a stop and its treatment.
            watchdog = threading.Timer(timeout, self._time_is_over)
            watchdog.start()
            try:
                while self._alive:
                    self._step()
            finally:
                watchdog.cancel()
        finally:
            self._kill()
        return self._result

    def _time_is_over(self) -> None:
        self._result.hung = [self._who(pid) for pid in sorted(self._alive)]
        self._kill()

    def _step(self) -> None:
        try:
            thread, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            self._alive.clear()
            return
        if not os.WIFSTOPPED(status):
            self._alive.discard(thread)
            if thread in self._first:
                self._result.statuses[self._first[thread]] = os.waitstatus_to_exitcode(status)
            return
        self._alive.add(thread)
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            self._stopped(thread, status >> 16, os.WSTOPSIG(status))

    def _stopped(self, thread: int, event: int, number: int) -> None:
        if event == _EVENT_SECCOMP:
            self._begins(thread)
        elif event == _EVENT_STOP and number in _STOPPING:
            _ptrace(_LISTEN, thread)
        elif event:
            _ptrace(_CONT, thread)
        elif number == _SYSCALL_STOP:
            self._ends(thread)
        else:
            _ptrace(_CONT, thread, 0, number)

    def _begins(self, thread: int) -> None:
        number, arguments = _call_of(thread)
        system_call = BY_NUMBER[number]
        files = files_of(system_call, thread, arguments)
        if not any(self._is_inside(file) for file in files):
            _ptrace(_CONT, thread)
            return
        if system_call.name in self._missing:
            _answer(thread, errno.ENOSYS)
            return
        call = self._count(thread, system_call, arguments, files)
        if self._carried_out(call, thread):
            return
        self._pending[thread] = call
        _ptrace(_SYSCALL, thread)

    def _count(self, thread: int, system_call: SystemCall, arguments: list[int], files: tuple[str, ...]) -> Call:
        flags = 0 if system_call.flags is None else arguments[system_call.flags]
        creates = bool(flags & os.O_CREAT) and not os.path.lexists(files[0])
        call = Call(
            len(self._result.calls) + 1,
            self._who(thread),
            system_call.name,
            tuple(os.path.relpath(file, self._watched) if self._is_inside(file) else file for file in files),
            _process_of(thread),
            creates=creates,
        )
        self._result.calls.append(call)
        return call

    def _carried_out(self, call: Call, thread: int) -> bool:
        """Do what is due at a call; whether that is the end of it."""
        fault = self._fault
        if fault is None or not fault.hits(call):
            return False
        self._result.fired = True
        if fault.action is not None:
            fault.action(call, list(self._first))
            return False
        if fault.error is None:
            self._result.killed = True
            self._kill()
            return True
        call.error = fault.error
        _answer(thread, fault.error)
        return True

    def _ends(self, thread: int) -> None:
        call = self._pending.pop(thread, None)
        if call is not None:
            call.error = _error_of(thread)
        _ptrace(_CONT, thread)

    def _is_inside(self, file: str) -> bool:
        """Whether a file is in the directory, is it, or is the one above it, where its name is."""
        return file in (self._watched, self._above) or file.startswith(f"{self._watched}/")

    def _who(self, thread: int) -> str:
        process = _process_of(thread)
        if process in self._first:
            return f"rank {self._first[process]}"
        parent = _status_of(process, "PPid")
        if parent in self._first:
            return f"a child of rank {self._first[parent]}"
        return f"process {process}"

    def _kill(self) -> None:
        for pid in sorted(self._alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fork_traced(start: Callable[[], None]) -> int:
    """A child that waits until it is traced, and then goes on to `start`."""
    gate, opener = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            os.close(opener)
            os.read(gate, 1)
            os.close(gate)
            _install_filter()
            start()
        finally:
            os._exit(70)
    os.close(gate)
    try:
        _ptrace(_SEIZE, pid, 0, _OPTIONS)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        raise Refused(f"ptrace is not allowed here: {error}") from error
    finally:
        os.close(opener)
    return pid


def _install_filter() -> None:
    """Let only write-like calls of this process, and of all that come from it, stop for the tracer."""
    allow, stop = 0x7FFF0000, 0x7FF00000
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06  # BPF opcodes, <linux/bpf_common.h>
    lines: list[tuple[int, int, int, int]] = [(load, 0, 0, 0)]  # the call's number
    for call in WRITE_LIKE:
        if call.flags is None:
            lines += [(equal, 0, 1, call.number), (give, 0, 0, stop)]
        else:
            lines += [
                (equal, 0, 4, call.number),
                (load, 0, 0, 16 + 8 * call.flags),
                (any_bit, 0, 1, OPEN_TO_WRITE),
                (give, 0, 0, stop),
                (give, 0, 0, allow),
            ]
    lines.append((give, 0, 0, allow))
    code = b"".join(struct.pack("=HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(lines), ctypes.addressof(buffer))
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if _libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "no seccomp filter could be installed")


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address, data) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _syscall_info(thread: int) -> bytes:
    buffer = ctypes.create_string_buffer(88)  # struct ptrace_syscall_info
    _ptrace(_SYSCALL_INFO, thread, len(buffer), ctypes.addressof(buffer))
    return buffer.raw


def _call_of(thread: int) -> tuple[int, list[int]]:
    number, *arguments = struct.unpack_from("=7Q", _syscall_info(thread), 24)
    return number, arguments


def _error_of(thread: int) -> int:
    (value,) = struct.unpack_from("=q", _syscall_info(thread), 24)
    return -value if -4096 < value < 0 else 0


def _answer(thread: int, error: int) -> None:
    """Let the call that a thread has stopped at return an error, without taking place."""
    _ptrace(_POKEUSER, thread, _ORIG_RAX, 0xFFFFFFFFFFFFFFFF)
    _ptrace(_POKEUSER, thread, _RAX, (1 << 64) - error)
    _ptrace(_CONT, thread)


def _process_of(thread: int) -> int:
    return _status_of(thread, "Tgid") or thread


def _status_of(process: int, field_name: str) -> int | None:
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None
