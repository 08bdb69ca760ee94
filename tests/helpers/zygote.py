"""A process that has imported the package and forks for each command: a command then costs no import of torch.

Requests come as lines of JSON on stdin, with the names of files for the command's streams; answers go to stdout, first
the process, then its exit status. It computes nothing itself, so that no threads are lost in a fork.
"""

import importlib.util
import json
import os
import signal
import sys

import onnxscript  # noqa: F401 (slow, and loaded late by the exporter)
import torch
import torch.onnx

import eit.analysis.compare
import eit.analysis.report
import eit.cli
import eit.data.shards
import eit.export.exporter
import eit.training.preview
import eit.training.trainer


def become(request: dict) -> None:
    """Run `python -m eit WORDS...` in this process, as it would have started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    modes = dict(stdin=os.O_RDONLY, stdout=os.O_WRONLY | os.O_TRUNC, stderr=os.O_WRONLY | os.O_TRUNC)
    for number, (name, mode) in enumerate(modes.items()):
        os.dup2(os.open(request[name], mode), number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.modules["__main__"].__package__ = "eit"  # what the program is called follows from it
    sys.argv = [importlib.util.find_spec("eit.__main__").origin, *request["words"]]
    eit.cli.main()


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if not pid:
            answers.close()
            status = 1
            try:
                become(json.loads(line))
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


if __name__ == "__main__":
    main()
