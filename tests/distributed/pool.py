"""Processes that are started once, and run functions together as the ranks of a gloo group.

`pool.run(function, *args)` calls `function(rank, world_size, *args)` on every rank and returns their results. To start
a process costs seconds, most of them for importing torch; a group costs milliseconds, so that every run has its own,
and nothing that a failed run left in the air reaches the next.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

TIMEOUT = 120.0  # seconds for a run, in the processes' clocks as in the pool's
GRACE = 5.0  # for the others, once a rank has failed: they may wait for it in a collective, or tell their own story


class RankError(Exception):
    """A rank raised, died or hung; the message says which, where and how."""


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    log: Path  # what the process printed, and where it stood when it was stopped


class Pool:
    """Up to `size` ranks. Once one has died, hung or not joined its group, all are started anew at the next run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0

    def run(
        self, function: Callable[..., Any], *args: Any, processes: int | None = None, timeout: float = TIMEOUT
    ) -> list[Any]:
        """function(rank, world_size, *args) on each of so many ranks: their results, in order of rank.

        Function, arguments and results are pickled, so the function lies at the top of a module. Each run starts with
        torch's generator seeded with 0.

        Raises:
            RankError: a rank raised, with its traceback; or died, or took longer than timeout seconds.
        """
        count = self.size if processes is None else processes
        assert 1 <= count <= self.size
        while len(self._workers) < count:
            self._workers.append(self._start(len(self._workers)))
        workers = self._workers[:count]
        self._runs += 1
        store = str(Path(self._folder.name) / f"store-{self._runs}")
        job = pickle.dumps((function, args, count, store, timeout))
        answers: dict[int, tuple[bool, Any]] = {}
        failures: dict[int, str] = {}
        for worker in workers:
            with suppress(OSError):  # of a dead process; that it is dead is read below
                worker.connection.send_bytes(job)
        deadline = time.monotonic() + timeout
        while len(answers) + len(failures) < count:
            waiting = {
                worker.connection: rank
                for rank, worker in enumerate(workers)
                if rank not in answers and rank not in failures
            }
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    failures[rank] = _stop(workers[rank], f"gave no answer for {timeout:g} s")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    failures[rank] = _death(workers[rank])
            if failures or not all(fine for fine, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        raised = {rank: text for rank, (fine, text) in sorted(answers.items()) if not fine}
        if failures:
            self._end()
        if raised or failures:
            # What was raised explains who waited for it in vain.
            raise RankError("\n".join(f"rank {rank} {text}" for rank, text in [*raised.items(), *failures.items()]))
        return [answers[rank][1] for rank in range(count)]

    def _start(self, rank: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        log = Path(self._folder.name) / f"log-{rank}-{self._runs}"
        process = context.Process(target=_serve, args=(rank, there, str(log)), daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        return _Worker(process, here, log)

    def close(self) -> None:
        """Ends the processes; the pool runs nothing more."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # which the process takes as its end
        for worker in self._workers:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


def _stop(worker: _Worker, why: str) -> str:
    """Ends a process, and tells why and where it stood."""
    os.kill(worker.process.pid, signal.SIGABRT)
    worker.process.join(GRACE)
    return f"{why} and was stopped here:\n{worker.log.read_text()[-4000:]}"


def _death(worker: _Worker) -> str:
    worker.process.join(GRACE)
    return f"died with exit code {worker.process.exitcode}:\n{worker.log.read_text()[-4000:]}"


def _serve(rank: int, jobs: Connection, log: str) -> None:
    """A rank: waits for jobs until the pool closes the pipe."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # SIGABRT writes the traceback into the log
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its process
    while True:
        try:
            job = jobs.recv_bytes()
        except EOFError:
            return
        jobs.send_bytes(pickle.dumps(_answer(rank, job)))


def _answer(rank: int, job: bytes) -> tuple[bool, Any]:
    """(True, the result) or (False, the traceback).

    What fails before the function runs ends this process, and so the pool starts all of them anew: torch counts the
    groups that a process has made, and with another count than its peers' it would wait for them in vain.
    """
    function, args, world_size, store, timeout = pickle.loads(job)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    # A function that returns at once would close this rank's connections while a slower one still makes its own.
    distributed.barrier()
    try:
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                return True, function(rank, world_size, *args)
        finally:
            distributed.destroy_process_group()
    except BaseException:
        return False, f"raised:\n{traceback.format_exc()}"
