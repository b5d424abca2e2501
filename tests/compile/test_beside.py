"""A fork's launches, against a driver that records them: what goes to which stream, and what is held how long."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.kernels import beside, replay
from lora_kernels.kernels.beside import Fork
from lora_kernels.kernels.launch import Launch
from lora_kernels.ops import Needs, _linear_triton
from lora_kernels.planning import make_plan
from lora_kernels.planning.plan import paired
from lora_kernels.testing import make_linear_inputs
from tests.compile.test_launch import WIDTH_DTYPES, problem_of

FORKED = ["fork", ("persistent", 0), ("bwd_lora_a", 77), ("reduce_partials", 77), "join"]


class Story:
    """What happens in a call, in order: fork, launches as (kernel, stream), join; and what is freed in between."""

    def __init__(self, driver, monkeypatch):
        self.driver, self.seen, self.freed = driver, [], []
        self.inside = []
        story = self

        class Fake(Fork):
            @staticmethod
            def of(device):
                story.seen.append("fork")
                monkeypatch.setattr(torch, "empty_strided", lambda *_, **__: pytest.fail("allocated"))
                return Fake(None, SimpleNamespace(cuda_stream=77))

            def join(self):
                monkeypatch.setattr(torch, "empty_strided", allocate)
                story.freed.append(sum(storage.expired() for storage in story.inside))
                story.seen.append("join")

        allocate, run = torch.empty_strided, Launch.run

        @contextmanager
        def on(stream):
            driver.stream = stream
            try:
                yield
            finally:
                driver.stream = 0

        def run_on(launch, stream, args):
            with on(stream):
                run(launch, stream, args)

        monkeypatch.setattr(Launch, "run", run_on)
        monkeypatch.setattr(driver, "keep", self.keep)
        monkeypatch.setattr(replay, "Fork", Fake)

    def keep(self, binary, grid, args, hook):
        self.seen.append((self.driver.names[binary - 1].removesuffix("_kernel"), self.driver.stream))
        if self.seen.count("fork") > self.seen.count("join"):
            tensors = [getattr(arg, "base", arg) for arg in args]
            self.inside += [StorageWeakRef(t.untyped_storage()) for t in tensors if isinstance(t, torch.Tensor)]


@pytest.fixture
def story(driver, monkeypatch):
    return Story(driver, monkeypatch)


def backward_of(width, stride=80):
    dtype, adapters = WIDTH_DTYPES[width]
    problem = problem_of(width, 0.0)
    plan = replace(paired(problem, make_plan(problem, "triton", triton_available=True), "persistent"), beside=True)
    i = make_linear_inputs(16, 64, 80, 16, dtype=dtype, adapter_dtype=adapters)
    weight = torch.randn(64, stride).to(dtype)[:, :80]
    needs, xa = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=False), torch.randn(16, 16, dtype=adapters)
    return lambda: _linear_triton.backward(
        i.dy, i.x, weight, i.lora_A, i.lora_B, xa, None, 2.0, 0.0, needs, plan
    )  # fmt: skip


@pytest.mark.parametrize("width", ["16", "mixed"])
def test_d_a_is_launched_beside_the_product_of_a_repeated_call(story, width):
    backward = backward_of(width)
    told = []
    for _ in range(5):
        story.seen.clear()
        story.inside.clear()
        backward()
        told.append(list(story.seen))
    written, recorded, *repeated = told
    assert written == recorded
    assert {stream for _, stream in written} == {0}
    fork = repeated[0].index("fork")
    assert repeated == [[*written[:fork], *FORKED]] * 3
    assert [name for name, _ in written[fork:]] == ["persistent", "bwd_lora_a", "reduce_partials"]
    assert story.freed == [0, 0, 0]  # between fork and join; and nothing is allocated there


def test_there_is_a_join_whatever_is_raised(story, monkeypatch):
    backward = backward_of("16")
    for _ in range(3):
        backward()
    run = Launch.run

    def fails(launch, stream, args):
        if stream == 77:
            raise torch.OutOfMemoryError("of the driver")
        run(launch, stream, args)

    monkeypatch.setattr(Launch, "run", fails)
    story.seen.clear()
    with pytest.raises(torch.OutOfMemoryError):
        backward()
    assert story.seen[-3:] == ["fork", ("persistent", 0), "join"]


@pytest.mark.parametrize("width", ["16", "mixed"])
def test_a_weight_that_the_persistent_kernel_cannot_take_forks_nothing(story, width):
    backward = backward_of(width, stride=84)  # rows that are no whole 16 bytes apart
    for _ in range(4):
        story.seen.clear()
        backward()
        names = [name for name, _ in story.seen]
        assert "persistent" not in names
        assert "in_parts" not in names
        assert {stream for _, stream in story.seen} == {0}


def test_the_second_stream_is_another_and_the_same_each_time(monkeypatch):
    class Stream:
        handles = iter([5, 5, 9])

        def __init__(self, device=None, handle=None):
            self.device_index, self.cuda_stream = 0, next(self.handles) if handle is None else handle
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other.cuda_stream)

    current = Stream(handle=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(beside, "_seconds", {})
    first, again = Fork.of("cuda"), Fork.of("cuda")
    assert first.second is again.second
    assert first.second.cuda_stream == 9
    assert first.second.waited == [5, 5]
    first.join()
    assert current.waited == [9]
