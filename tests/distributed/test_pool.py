"""The pool itself: what it returns, and every way in which a rank can fail."""

import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed

from tests.distributed.pool import RankError


def total(rank, world_size, offset):
    tensor = torch.tensor(rank + offset)
    distributed.all_reduce(tensor)
    return rank, world_size, tensor.item(), torch.rand(()).item(), torch.get_num_threads()


def fail(rank, world_size, how):
    if rank == 1:
        if how == "raise":
            raise ValueError("rank-sized numbers only")
        if how == "warn":
            warnings.warn("an omen", stacklevel=1)
        if how == "die":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
    distributed.barrier()


def fail_to_join_next_time(rank, world_size):
    join = distributed.init_process_group

    def once(*args, **options):
        distributed.init_process_group = join
        if rank == 1:
            raise OSError("no store at hand")
        join(*args, **options | {"timeout": timedelta(seconds=0.1)})  # in vain; it gives up before the pool does

    distributed.init_process_group = once


@pytest.mark.parametrize("processes", [2, 4])
def test_every_rank_answers_in_order(pool, processes):
    drawn = torch.rand((), generator=torch.Generator().manual_seed(0)).item()
    expected = sum(range(10, 10 + processes))
    assert pool.run(total, 10, processes=processes) == [
        (rank, processes, expected, drawn, 1) for rank in range(processes)
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", r"rank 1 raised:\n(.*\n)+ValueError: rank-sized numbers only"),
        ("warn", r"rank 1 raised:\n(.*\n)+UserWarning: an omen"),
        ("die", r"rank 1 died with exit code 3"),
        ("hang", r"rank 1 gave no answer for 1 s and was stopped here:\n(.*\n)*.*in fail"),
    ],
)
def test_a_rank_that_fails_is_told_about_and_the_next_run_works(pool, how, told):
    with pytest.raises(RankError, match=told):
        pool.run(fail, how, processes=2, timeout=1)
    assert [answer[2] for answer in pool.run(total, 0, processes=2)] == [1, 1]


def test_after_a_rank_did_not_join_its_group_the_next_run_works(pool):
    pool.run(fail_to_join_next_time, processes=2)
    with pytest.raises(RankError, match=r"rank 1 died with exit code 1:\n(.*\n)+OSError: no store at hand"):
        pool.run(total, 0, processes=2)
    assert [answer[2] for answer in pool.run(total, 0, processes=2, timeout=30)] == [1, 1]
