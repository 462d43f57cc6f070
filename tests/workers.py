"""Starting the processes of one distributed training on this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import keras

SECONDS = 300  # after which a process is taken to hang: some twenty times what it needs


def free_ports(number):
    """Ports that nothing listens at. All are held until the last is found, so none comes twice."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def run_workers(program, environments, *arguments, killed=None):
    """Runs a program in one process for each environment, and waits for all.

    Args:
        program: str, the name of a program in this folder.
        environments: list of dicts.
        arguments: what each process is given.
        killed: int, the process that kills itself. The others are then killed too if they do not
            end by themselves, as whoever starts such processes does.

    Returns:
        list of what each has printed.
    """
    path = Path(__file__).with_name(program)
    workers = [
        subprocess.Popen(
            [sys.executable, path, *map(str, arguments)],
            env={**os.environ, "KERAS_BACKEND": keras.backend.backend(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        if killed is not None:
            printed, _ = workers[killed].communicate(timeout=SECONDS)
            assert workers[killed].returncode == -signal.SIGKILL, printed
            return []
        printed = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
        for worker, text in zip(workers, printed):
            assert worker.returncode == 0, text
        return printed
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.communicate()
