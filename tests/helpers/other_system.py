"""Run commands as on another system: EIT_SYSTEM=windows|macos python other_system.py < commands as lines of JSON.

Modules, signals and calls that the system lacks are hidden, worker processes are spawned, and for `windows` folders
cannot be opened and nothing is renamed onto what exists. A line per command says its exit status.
"""

# ruff: noqa: F401 (other packages may use what is hidden afterwards)
import importlib.abc
import json
import multiprocessing
import os
import shutil
import signal
import sys

import matplotlib.pyplot
import onnxscript
import sklearn.datasets
import tensorboard
import timm
import torch.distributed
import torch.onnx
import torch.utils.tensorboard
import torchvision

MODULES = dict(windows=("fcntl", "grp", "pwd", "resource", "termios"), macos=())
SIGNALS = dict(
    windows=(
        "SIGALRM",
        "SIGHUP",
        "SIGKILL",
        "SIGPIPE",
        "SIGUSR1",
        "SIGUSR2",
        "SIGXFSZ",
    ),
    macos=("SIGRTMIN", "SIGRTMAX", "SIGPOLL"),
)
BOTH = ("sigwaitinfo", "sigtimedwait")
CALLS = dict(
    windows=(
        "O_NOFOLLOW",
        "fork",
        "getuid",
        "killpg",
        "mkfifo",
        "register_at_fork",
        "sched_getaffinity",
        "set_blocking",
    ),
    macos=("sched_getaffinity", "sched_setaffinity"),
)


class Hidden(importlib.abc.MetaPathFinder):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become(system):
    sys.meta_path.insert(0, Hidden(MODULES[system]))
    for name in MODULES[system]:
        sys.modules.pop(name, None)
    for module, names in ((signal, (*SIGNALS[system], *BOTH)), (os, CALLS[system])):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    shutil._use_fd_functions = False  # as where folders have no descriptors
    if system == "windows":
        original_open, original_rename = os.open, os.rename

        def open_file(path, *more, **options):
            if not isinstance(path, int) and os.path.isdir(path):
                raise PermissionError(13, "Permission denied", str(path))
            return original_open(path, *more, **options)

        def rename(source, target, **options):
            if os.path.exists(target):
                raise FileExistsError(17, "File exists", str(source), None, str(target))
            return original_rename(source, target, **options)

        os.open, os.rename = open_file, rename


become(os.environ["EIT_SYSTEM"])  # in spawned processes too


def main():
    import eit.cli

    multiprocessing.set_start_method("spawn")
    for line in sys.stdin.read().splitlines():
        sys.argv[1:] = json.loads(line)
        status = 0
        try:
            eit.cli.main()
        except SystemExit as end:
            status = end.code or 0
        print(f"{sys.argv[1]}: status {status}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
