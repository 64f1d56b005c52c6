"""Runs Python commands in forks of a process that has imported torch: importing it takes seconds in each command.

Not for tests of the interpreter, its flags, its streams and signals, or the import of torch itself.
"""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def run(*command: object, cwd: Path, env=os.environ, timeout: int = 600) -> subprocess.CompletedProcess:
    """subprocess.run([sys.executable, *command]) with text captured; a command begins with a script, -m or -c.

    After `timeout` seconds it is killed, and the return code is -SIGALRM.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        job = [*map(str, command)], str(cwd), dict(env), [*map(str, outputs)], timeout
        print(json.dumps(job), file=server().stdin, flush=True)
        code = int(server().stdout.readline())
        return subprocess.CompletedProcess(command, code, *(path.read_text(encoding="utf-8") for path in outputs))


@functools.cache
def server() -> subprocess.Popen:
    """Ends with this process, which closes its stdin."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    import torch  # noqa: F401

    for line in sys.stdin:
        (kind, *arguments), folder, environment, outputs, timeout = json.loads(line)
        if (child := os.fork()) == 0:
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        sys.exit()

    # From here on, this is the command's process.
    signal.alarm(timeout)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    sys.path[0] = {"-c": "", "-m": folder}.get(kind, os.path.dirname(kind))
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")
