"""A call's launches as they were the last time, with other tensors.

Between two calls under one plan, with tensors of the same layouts, nothing differs but addresses: grids, tiles, strides
and binaries would be found again for nothing. So the first call runs as it is written, the second is recorded, and from
the third on its launches are repeated with the tensors of that call. What the host spends then
(`bench.host`) small layers feel, whose kernels take microseconds.

Launches, allocations and views can be repeated. The recorder sees every other operation of PyTorch, and a call that has
one runs as written for ever.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from lora_kernels.kernels.beside import Fork
from lora_kernels.kernels.interpreter import is_interpreting
from lora_kernels.kernels.launch import ALIGNMENT, Launch, is_profiled, observer

MOST_RECIPES = 4096
"""Calls to remember."""

Inputs = tuple[Tensor | None, ...]
Outputs = tuple[Tensor | None, ...]


class Step(NamedTuple):
    """One launch. Slots are the places of a call's list of tensors: its inputs, then its allocations as they come."""

    allocations: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    """Made before it: shape, strides, dtype."""
    launch: Launch
    """With None where tensors and descriptors stand."""
    tensors: tuple[tuple[int, int], ...]
    """(argument, slot)."""
    descriptors: tuple[tuple[int, int, type, dict[str, Any]], ...]
    """(argument, slot of its base, class, attributes)."""
    last: tuple[int, ...]
    """Slots of allocations that nothing needs after it: what is allocated next may have their memory."""


class Recipe(NamedTuple):
    """A call without its tensors."""

    steps: tuple[Step, ...]
    outputs: tuple[int | None, ...]
    """Slots."""
    fork: int | None
    """The step before which the call forks, to its end."""
    plan: object
    """Whose id is part of the key: kept, so that no other object gets that id."""

    def follow(self, inputs: Inputs, device: torch.device, stream: int) -> Outputs:
        """The outputs for these inputs."""
        slots = list(inputs)
        before = len(self.steps) if self.fork is None else self.fork
        self._launch(self.steps[:before], slots, device, stream, None)
        if self.fork is not None:
            for step in self.steps[before:]:
                _allocate(step, slots, device)
            fork = Fork.of(device)
            try:
                self._launch(self.steps[before:], slots, device, stream, fork)
            finally:
                fork.join()
        return tuple([None if slot is None else slots[slot] for slot in self.outputs])

    def _launch(
        self, steps: Sequence[Step], slots: list[Tensor | None], device: torch.device, stream: int, fork: Fork | None
    ) -> None:
        """The steps in turn; without a fork they allocate as they go."""
        for step in steps:
            if fork is None:
                _allocate(step, slots, device)
            args = list(step.launch.args)
            for place, slot in step.tensors:
                args[place] = slots[slot]
            for place, slot, kind, attributes in step.descriptors:
                args[place] = _described(kind, attributes, slots[slot])
            step.launch.run(stream if fork is None or not step.launch.beside else fork.second.cuda_stream, args)
            args.clear()  # so that the slots are the last to hold a tensor
            for slot in step.last:
                slots[slot] = None


def _allocate(step: Step, slots: list[Tensor | None], device: torch.device) -> None:
    for shape, strides, dtype in step.allocations:
        # torch.empty takes 1.4 times as long (`bench.choices`).
        slots.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))


def _described(kind: type, attributes: dict[str, Any], base: Tensor | None) -> Any:
    # Not through its constructor, which validates what was validated. A function: no name of it outlives the launch.
    descriptor: Any = object.__new__(kind)
    descriptor.__dict__.update(attributes, base=base)
    return descriptor


UNREPEATABLE = "unrepeatable"
SEEN = "seen"
_recipes: dict[tuple[Any, ...], Recipe | str] = {}
_recording = threading.Lock()
"""Held while a call is recorded: PyTorch keeps whether any dispatch mode is on for the whole process and puts it back
at each exit, so that two threads' modes that overlap could leave it on. A thread that finds it held runs as written."""


def replayed(run: Callable[..., Outputs], inputs: Inputs, values: tuple[Any, ...], plan: object) -> Outputs:
    """run(*inputs, *values, plan), repeated from a recipe where there is one.

    Args:
        run: allocates, launches and returns what it allocated; the same for the same layouts, values and plan.
        inputs: on one device, the current one; at least one of them is not None.
        values: numbers and flags.
        plan: counts as this very object.
    """
    if is_interpreting() or is_profiled():
        return run(*inputs, *values, plan)
    present = next(t for t in inputs if t is not None)
    key = (
        run, id(plan), values, present.get_device(),
        *[t if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % ALIGNMENT) for t in inputs],
    )  # fmt: skip
    recipe = _recipes.get(key)
    if isinstance(recipe, Recipe):
        return recipe.follow(inputs, present.device, driver.active.get_current_stream(torch.cuda.current_device()))
    if recipe == SEEN and _recording.acquire(blocking=False):
        try:
            outputs, recipe = _recorded(run, inputs, values, plan)
        finally:
            _recording.release()
        _recipes[key] = recipe or UNREPEATABLE
        return outputs
    if recipe is None:
        if len(_recipes) >= MOST_RECIPES:
            _make_room()
        _recipes[key] = SEEN
    return run(*inputs, *values, plan)


def _make_room() -> None:
    """Forgets what came once, so that ever new sizes do not cost the usual ones their recipes; else everything."""
    for key, recipe in list(_recipes.items()):
        if recipe == SEEN:
            _recipes.pop(key, None)
    if len(_recipes) > MOST_RECIPES // 2:
        _recipes.clear()


def _recorded(
    run: Callable[..., Outputs], inputs: Inputs, values: tuple[Any, ...], plan: object
) -> tuple[Outputs, Recipe | None]:
    """The call's outputs, and its recipe if it can be repeated."""
    recorder = _Recorder(inputs)
    observer.launched, observer.forked = recorder.launched, recorder.forked
    try:
        with recorder:
            outputs = run(*inputs, *values, plan)
    finally:
        observer.launched = observer.forked = None
    return outputs, recorder.recipe(outputs, plan)


class _Recorder(TorchDispatchMode):
    """Sees what a call does, in order, and holds nothing of it: the call takes the memory that it takes as written."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = len(inputs)
        self.slots: dict[int, int] = {}
        """By address: of the tensor that is there, or was last."""
        self.allocated: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self.made = 0
        """How many of them are some step's."""
        self.steps: list[Step] = []
        self.fork: int | None = None
        self.repeatable = True
        """Every tensor is an input or an allocation, from its beginning, and could not be either of two."""
        for slot, tensor in enumerate(inputs):
            if tensor is not None and self.slots.setdefault(tensor.data_ptr(), slot) != slot:
                self.repeatable = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would import its compiler at the first operation seen: most of a second, in the second training step,
        # whose tensors that import's tracebacks kept.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and out.numel():  # empty ones share an address
            self.slots[out.data_ptr()] = self.inputs + len(self.allocated)
            self.allocated.append(_layout(out))
        elif not func.is_view:
            self.repeatable = False
        return out

    def forked(self) -> None:
        self.fork = len(self.steps)

    def launched(self, launch: Launch) -> None:
        args, places, descriptors = list(launch.args), [], []
        for place, arg in enumerate(launch.args):
            described = type(arg).__name__ == "TensorDescriptor"  # Triton's or Gluon's
            if not described and not isinstance(arg, Tensor):
                continue
            found = self.slots.get((arg.base if described else arg).data_ptr())
            if found is None:
                self.repeatable = False
                return
            args[place] = None
            if described:
                descriptors.append((place, found, type(arg), vars(arg) | {"base": None}))
            else:
                places.append((place, found))
        allocations = tuple(self.allocated[self.made :])
        self.made = len(self.allocated)
        self.steps.append(Step(allocations, launch._replace(args=args), tuple(places), tuple(descriptors), ()))

    def recipe(self, outputs: Outputs, plan: object) -> Recipe | None:
        """None if the call cannot be repeated."""
        if not self.repeatable or self.made < len(self.allocated):  # made for nobody's launch: not this package's way
            return None
        results: list[int | None] = []
        for output in outputs:
            if output is None:
                results.append(None)
                continue
            slot = self.slots.get(output.data_ptr(), 0)
            if slot < self.inputs or _layout(output) != self.allocated[slot - self.inputs]:
                return None
            results.append(slot)
        needed = set(results)
        for index, step in reversed(list(enumerate(self.steps))):
            used = {slot for _, slot, *_ in (*step.tensors, *step.descriptors)}
            if self.fork is not None and index >= self.fork:  # held until after the join
                needed |= used
                continue
            last = tuple(slot for slot in used - needed if slot >= self.inputs)
            self.steps[index] = step._replace(last=last)
            needed |= used
        return Recipe(tuple(self.steps), tuple(results), self.fork, plan)


def _layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return t.shape, t.stride(), t.dtype
