"""tests/forking.py: a script in a fork does what it does in an interpreter of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import forking
import pytest

import helpers

SCRIPTS = {
    "output": "import sys\nprint('é', end='')\nprint('wrong', file=sys.stderr)",
    "code": "raise SystemExit(3)",
    "no code": "raise SystemExit",
    "message": "raise SystemExit('error: no')",
    "exit in a function": "import sys\ndef leave(): sys.exit(4)\nleave()",
    "killed": "import os\nprint('lost')\nos.kill(os.getpid(), 9)",
    "interrupted": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    "exception": "def divide(): 1 / 0\ndivide()",
    "thread": """
import threading, time
threading.Thread(target=lambda: time.sleep(0.1) or print('later')).start()
print('now')
""",
    "exit handler": "import atexit\natexit.register(print, 'left')\nprint('done')",
    "place": """
import os, sys
print(os.getcwd(), sys.argv, sys.path[0], __name__, __file__, sys.stdin.read())
print({name: os.environ.get(name) for name in ('SEED', 'DEVICE', 'TOKEN')})
""",
    "module": """
import dataclasses, pickle, sys
@dataclasses.dataclass
class Pair:
    a: int
print(pickle.loads(pickle.dumps(Pair(1))), sys.modules['__main__'].Pair)
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_does_what_an_interpreter_does(tmp_path, name):
    """Of what Python says to an exception, the last line: a traceback names other frames."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[name], encoding="utf-8")
    settings, found = {"SEED": 7}, []
    for fresh in (False, True):
        done = helpers.run(settings, script=script, cwd=tmp_path, arguments=["a b"], fresh=fresh)
        found.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
        assert ("Traceback" in done.stderr) == (name in ("exception", "interrupted"))
    assert found[0] == found[1]


def test_a_fork_is_like_a_process_to_who_started_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    process = helpers.start({}, script=script)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.1)
    assert process.poll() is None and process.returncode is None
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    while process.poll() is None and not process.outputs[0].read_text():
        time.sleep(0.01)
    process.kill()
    assert process.communicate() == ("begun\n", "")
    assert process.returncode == process.poll() == process.wait() == -signal.SIGKILL
    process.kill()  # nothing is left to kill


def test_forks_share_nothing_that_they_change(tmp_path):
    """Neither the modules of the server, nor numbers drawn at random."""
    script = tmp_path / "script.py"
    script.write_text(
        "import random, torch\nprint(hasattr(torch, 'mark'), random.random())\ntorch.mark = 1"
    )
    first, second = (helpers.run_well({}, script=script).split() for _ in range(2))
    assert first[0] == second[0] == "False"
    assert first[1] != second[1]


def test_a_file_of_a_fork_may_be_limited(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("file = open('file', 'wb', 0)\nfile.write(bytes(1000))\nfile.write(b'1')")
    limited = helpers.fork_server().start([script], {}, tmp_path, file_limit=1000)
    assert "File too large" in limited.communicate()[1]
    assert limited.returncode == 1
    assert (tmp_path / "file").stat().st_size == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such namespaces")
def test_an_offline_fork_has_no_network(tmp_path):
    if subprocess.run(["unshare", "--map-root-user", "--net", "--", "true"]).returncode:
        pytest.skip("the system lets no user leave the network")
    script = tmp_path / "script.py"
    script.write_text("import os, socket\nprint(os.getuid(), socket.if_nameindex())")
    alone = helpers.fork_server().start([script], {}, tmp_path, offline=True)
    assert alone.communicate() == ("0 [(1, 'lo')]\n", ""), "root of its own, as by unshare"


def test_python_that_a_fork_starts_is_a_fork_too(tmp_path):
    """By subprocess.run and what uses it, where the test asks for that."""
    script, inner = tmp_path / "script.py", tmp_path / "inner"
    inner.mkdir()
    script.write_text(
        """
import subprocess, sys
told = "import os, sys; print('torch' in sys.modules, sys.argv, os.getcwd(), os.environ['SEED'])"
command = [sys.executable, "-c", told, "a b"]
options = {"cwd": "inner", "env": {"SEED": "7"}, "text": True}
print(subprocess.run(command, capture_output=True, **options).stdout, end="")
try:
    subprocess.check_output([sys.executable, "-c", "raise SystemExit(3)"])
except subprocess.CalledProcessError as error:
    print(error.returncode)
print(subprocess.check_output(["echo", "another"], text=True), end="")
"""
    )
    server = helpers.fork_server()
    process = server.start([script], helpers.environment({}), tmp_path, with_children=True)
    out, err = process.communicate()
    assert out.splitlines() == [f"True ['-c', 'a b'] {inner} 7", "3", "another"], err


def test_several_processes_share_a_server(tmp_path):
    """One that no longer needs it leaves it to the others."""
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.getppid())")
    ours = helpers.fork_server()
    theirs = forking.ForkServer(ours.address)
    parents = [server.start([script], {}).communicate()[0] for server in (ours, theirs)]
    theirs.close()
    parents.append(ours.start([script], {}).communicate()[0])
    assert len(set(parents)) == 1
