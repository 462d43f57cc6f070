"""New processes that need not import anything: of one distributed training, or for one program."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys

import keras
import pytest

SECONDS = 300  # after which a process is taken to hang: some twenty times what it needs

# Each process is forked from one that has imported what all need and computed nothing: importing
# takes longer than all that they do.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tools"])


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


def virtual_devices(number) -> dict:
    """The environment of a process in which JAX has this many CPUs."""
    flag = f"--xla_force_host_platform_device_count={number}"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}


def run_workers(program, environments, folder, *arguments, killed=None):
    """Runs a program in one process for each environment, and waits for all.

    Args:
        program: str, the name of a module in this folder, with a function `main`.
        environments: list of dicts.
        folder: path, where what each process prints is written, too.
        arguments: what `main` is given after the folder.
        killed: int, the process that kills itself. The others are then killed too if they do not
            end by themselves, as whoever starts such processes does.
    """
    workers = [
        PROCESSES.Process(
            target=_run_module,
            args=(program, environment, folder / f"{number}.log", folder, *arguments),
        )
        for number, environment in enumerate(environments)
    ]
    try:
        _start(workers)
        for number in range(len(workers)) if killed is None else [killed]:
            workers[number].join(SECONDS)
            code = 0 if killed is None else -signal.SIGKILL
            assert workers[number].exitcode == code, (folder / f"{number}.log").read_text()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def run_program(program, log, *arguments, devices=1) -> str:
    """Runs a program in a new process, and returns what it printed.

    Args:
        program: str, Python.
        log: path of a file for what it prints.
        arguments: what it finds in `sys.argv`.
        devices: int, how many virtual devices JAX has there.
    """
    environment = virtual_devices(devices) if keras.backend.backend() == "jax" else {}
    arguments = program, environment, log, *map(str, arguments)
    worker = PROCESSES.Process(target=_run_program, args=arguments)
    try:
        _start([worker])
        worker.join(SECONDS)
        assert worker.exitcode == 0, log.read_text()
    finally:
        worker.kill()
    return log.read_text()


def _start(workers):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", keras.backend.backend())
        # Else Python 3.11 imports nothing beforehand.
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        for worker in workers:
            worker.start()


def _run_module(name, environment, log, *arguments):
    _prepare(environment, log)
    importlib.import_module(name).main(*arguments)


def _run_program(program, environment, log, *arguments):
    _prepare(environment, log)
    sys.argv = ["", *arguments]
    exec(program, {"__name__": "__main__"})


def _prepare(environment, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
