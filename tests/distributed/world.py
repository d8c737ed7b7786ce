"""Real processes for tests: a few that stay, and run one function after the other together."""

import os
import traceback
from datetime import timedelta
from functools import cache
from socket import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds for one function, of which most take one


class World:
    """n processes in a gloo group."""

    def __init__(self, n):
        with socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, n, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args):
        """What function(*args) returns in each process.

        Raises:
            AssertionError: with the traceback of the first process that failed; the processes are gone then.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv() if pipe.poll(TIMEOUT) else (False, f"no answer within {TIMEOUT} seconds")
            except EOFError:
                answer = False, "it has died"
            answers.append((rank, *answer))
        for rank, fine, what in answers:
            if not fine:
                self.end()
                world.cache_clear()
                raise AssertionError(f"process {rank} of {len(self.pipes)}:\n{what}")
        return [what for _, _, what in answers]

    def end(self):
        for process in self.processes:
            process.kill()


@cache
def world(n):
    """The n processes that all tests of this size share."""
    return World(n)


def _work(rank, n, port, pipe):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
