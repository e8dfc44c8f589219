"""An executable that takes the arguments of Python, and forks from a process that has imported everything.

A process of its own costs seconds of processor time, nearly all of which is the import of PyTorch. The forked ones have
their own working directory, environment and standard streams, and end with the exit status that Python would give.
SIGTERM and SIGINT are passed on, and SIGKILL ends the forked process as well.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import warnings
from multiprocessing.process import parent_process
from pathlib import Path
from typing import NoReturn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
pid = int(server.recv(16))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(server.recv(16))
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def warm_python() -> str:
    """Start the process to fork from, and return the path of an executable that is named ``python``."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    server = CONTEXT.Process(target=_serve, args=(listener,))
    server.start()
    listener.close()
    atexit.register(server.kill)
    executable = folder / "python"
    executable.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    executable.chmod(0o755)
    return str(executable)


def _serve(listener: socket.socket) -> None:
    """Fork for each request a process that runs it, and one that waits for that and reports the exit status."""
    parent = parent_process()
    assert parent
    while listener in select.select([listener, parent.sentinel], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            length, fds, _, _ = socket.recv_fds(connection, 8, 3)
            request = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            if (pid := os.fork()) == 0:
                connection.close()
                _run(fds, *json.loads(request))
            os._exit(_report(pid, connection))
        connection.close()
        while _reap():
            pass


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _report(pid: int, connection: socket.socket) -> int:
    """Wait for a process, which is killed with its children when the executable is."""
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)  # the process does so as well; the first one counts
    connection.sendall(f"{pid:<16}".encode())
    if connection in select.select([os.pidfd_open(pid), connection], [], [])[0]:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status:<16}".encode())
    return 0


def _run(fds: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """Do what Python does with these arguments; the status of the process is that of the ``SystemExit``."""
    os.setpgid(0, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # loaders would otherwise use a fork server
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.executable = arguments.pop(0)
    while arguments[0] == "-u":
        arguments.pop(0)
    try:
        if arguments[0] == "-m":
            sys.path.insert(0, folder)
            sys.argv = arguments[1:]
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it has been imported before
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.path.insert(0, folder)
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
    sys.exit()
