"""A server that runs scripts in forks of a process that has imported torch, for the tests.

Most of what a tiny run takes is its imports. A fork of a process that has done them needs a
fraction of that, and else is a process like any other: with its own environment, arguments, folder,
output, signals, limits and exit code. What only a fresh interpreter shows needs one: missing
packages, variables that libraries read while they are loaded, another order of a set of strings.

All who know its address may ask a server: the processes of pytest-xdist share one, and a script in
a fork may have its own Python processes forked, too.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTED = (
    "torch",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.run",
    "brotli",
    "numpy",
    "sentencepiece",
    "train_gpt",
)
IMPORTED_IF_INSTALLED = ("pandas", "matplotlib.pyplot", "scipy.stats", "rich.live")  # by tools
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of Linux's sched.h


class ForkedProcess:
    """A script that runs in a fork: the part of subprocess.Popen that tests use."""

    def __init__(self, server: ForkServer, pid: int, args: list[str], outputs: list[Path]) -> None:
        self.server, self.pid, self.args, self.outputs = server, pid, args, outputs
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, -N after signal N; None while the process runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Return the exit code; subprocess.TimeoutExpired if that takes too long."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            left = end - time.monotonic()
            if left < 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.sleep(min(left, 60.0))
        return self.returncode

    def sleep(self, seconds: float) -> None:
        """Sleep until the process has ended, or for so long."""
        if not hasattr(os, "pidfd_open"):  # of Linux
            return time.sleep(0.01)
        descriptor = os.pidfd_open(self.pid)
        select.select([descriptor], [], [], seconds)
        os.close(descriptor)

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        """Wait for the end; return what the process wrote to standard output and error."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self.outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, and a folder for what its children write.

    Args:
        address: the socket of a server that runs already; otherwise one is started.
    """

    def __init__(self, address: str | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.count = 0
        self.address = address or str(Path(self.folder.name, "socket"))
        self.process = None if address else self.start_process()

    def start_process(self) -> subprocess.Popen:
        """Start the server; it ends with this process. Who asks before it is ready has to wait."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            return subprocess.Popen(
                [sys.executable, __file__, self.address, str(listener.fileno())],
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # also of the libraries it imports
                stdin=subprocess.PIPE,  # closes when this process ends
                pass_fds=[listener.fileno()],
            )

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()
        self.folder.cleanup()

    def ask(self, request: Mapping) -> int | None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
            with connection.makefile("rw", encoding="utf-8") as stream:
                print(json.dumps(request), file=stream, flush=True)
                return json.loads(stream.readline())

    def start(
        self,
        command: Sequence[object],
        env: Mapping[str, str],
        cwd: object = None,
        outputs: Sequence[Path] = (),
        file_limit: int = 0,
        offline: bool = False,
        with_children: bool = False,
    ) -> ForkedProcess:
        """Start a script with its arguments.

        Args:
            command: the script, or -c and the code of one, and its arguments.
            env: all variables of its environment.
            cwd: its folder; this process's if there is none.
            outputs: files for standard output and error, instead of some of this server.
            file_limit: bytes that a file it writes may have; 0 is no limit.
            offline: whether it finds no network, as under `unshare --map-root-user --net`.
            with_children: whether Python processes that it starts by subprocess.run are forks, too.
        """
        self.count += 1
        own = [Path(self.folder.name, f"{self.count}.{kind}") for kind in ("out", "err")]
        paths = list(outputs) or own
        words = [str(word) for word in command]
        request = {
            "command": words,
            "env": dict(env),
            "cwd": str(Path.cwd() / (cwd or "")),
            "outputs": [str(path) for path in paths],
            "file_limit": file_limit,
            "offline": offline,
            "with_children": with_children,
        }
        return ForkedProcess(self, self.ask(request), [sys.executable, *words], paths)


# ---- In the server -------------------------------------------------------------------------------


def serve(listener: socket.socket) -> dict:
    """Answer requests until the starter ends; return one in a child that is to fulfil it."""
    while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            request = json.loads(stream.readline())
            if "poll" in request:
                ended, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            else:
                answer = os.fork()
                if not answer:
                    listener.close()
                    return request
            print(json.dumps(answer), file=stream, flush=True)
    leave(0)


def become(request: Mapping) -> None:
    """Give this process what a new interpreter has that was started so."""
    os.setsid()  # so that it can be ended with all that it starts
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, path in enumerate(["/dev/null", *request["outputs"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0), 0o666)
        os.dup2(file, number)
        os.close(file)
    if limit := request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request["offline"]:
        leave_network()
    if request["with_children"]:
        subprocess.run = functools.partial(run_in_fork, sys.argv[1], subprocess.run)
    sys.stdin = io.StringIO()
    sys.argv = request["command"]
    sys.path[0] = "" if sys.argv[0] == "-c" else str(Path(sys.argv[0]).resolve().parent)
    random.seed()
    tempfile.tempdir = None  # is found anew


def leave_network() -> None:
    """Go on in namespaces of its own: without network interfaces, as root of the namespace."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError("the system lets no user leave the network")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


TORCHRUN = ("-m", "torch.distributed.run")


def forked_words(words: Sequence[object]) -> list[object]:
    """Return what a fork runs for these arguments of a Python interpreter."""
    if tuple(words[:2]) == TORCHRUN:
        return [Path(__file__).with_name("torchrun.py"), *words[2:]]
    return [*words]


def run_in_fork(
    address: str, run: Callable, command: Sequence[str], **options: Any
) -> subprocess.CompletedProcess:
    """Do what subprocess.run, here `run`, does, but run Python in a fork and capture its output."""
    if command[0] != sys.executable:
        return run(command, **options)
    server = ForkServer(address)
    words = forked_words(command[1:])
    process = server.start(words, options.get("env", os.environ), options.get("cwd"))
    result = subprocess.CompletedProcess(command, process.wait(), *process.communicate())
    server.close()
    if options.get("check"):
        result.check_returncode()
    return result


@functools.cache
def compiled(source: bytes | str, path: str) -> types.CodeType:
    return compile(source, path, "exec")


def run_script() -> int:
    """Run the script as the module __main__; return its exit code, with what Python says to it."""
    path = sys.argv[0]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        if path == "-c":
            code = compiled(sys.argv.pop(1), "<string>")
        else:
            module.__file__ = path
            code = compiled(Path(path).read_bytes(), path)
        exec(code, vars(module))
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def leave(code: int) -> None:
    """End this process as multiprocessing ends its own: taking torch apart would take a second."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare() -> None:
    """Do what each run would do again: import, compile the script, and pack it to learn its size.

    Children find its text parsed, walked, written and compressed, each by what was given.
    """
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    for name in IMPORTED:
        importlib.import_module(name)
    for name in IMPORTED_IF_INSTALLED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch, script, walk = sys.modules["torch"], sys.modules["train_gpt"], ast.walk
    torch.compile(torch.neg, backend="aot_eager")(torch.ones(1))  # the first graph imports more
    ast.walk = lambda tree: list(walk(tree))
    for module, functions in ((ast, ("parse", "walk", "unparse")), (script.brotli, ("compress",))):
        for function in functions:
            setattr(module, function, functools.cache(getattr(module, function)))
    script.code_bytes()
    compiled(Path(script.__file__).read_bytes(), script.__file__)
    gc.freeze()  # else collections in a child would write to, and so copy, all of its memory


if __name__ == "__main__":
    prepare()
    become(serve(socket.socket(fileno=int(sys.argv[2]))))
    leave(run_script())
