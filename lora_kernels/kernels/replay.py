"""A call's launches as they were the last time, with other tensors.

Between two calls under one plan, with tensors of the same layouts, nothing differs but addresses: grids, tiles, strides
and binaries would be found again for nothing. So the first call runs as it is written, the second is recorded, and from
the third on its launches are repeated with the tensors of that call. What the host spends then is a fraction
(`bench.host`), which small layers feel, whose kernels take microseconds.

Launches, allocations and views can be repeated. The recorder sees every other operation of PyTorch, and a call that has
one runs as written for ever.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from lora_kernels.kernels.interpreter import is_interpreting
from lora_kernels.kernels.launch import ALIGNMENT, Launch, is_profiled, observer

MOST_RECIPES = 4096
"""Calls to remember. A stream of ever new sizes ends in an emptied table."""

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
    plan: object
    """Whose id is part of the key: kept, so that no other object gets that id."""

    def follow(self, inputs: Inputs, device: torch.device, stream: int) -> Outputs:
        """The outputs for these inputs."""
        slots = list(inputs)
        for allocations, launch, tensors, descriptors, last in self.steps:
            for shape, strides, dtype in allocations:
                # torch.empty takes twice as long: it looks for sizes one by one first.
                slots.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
            args = list(launch.args)
            for place, slot in tensors:
                args[place] = slots[slot]
            for place, slot, kind, attributes in descriptors:
                args[place] = _described(kind, attributes, slots[slot])
            launch.run(stream, args)
            args.clear()  # so that the slots are the last to hold a tensor
            for slot in last:
                slots[slot] = None
        return tuple([None if slot is None else slots[slot] for slot in self.outputs])


def _described(kind: type, attributes: dict[str, Any], base: Tensor | None) -> Any:
    # Not through its constructor, which validates what was validated: 2 us each.
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
            _recipes.clear()
        _recipes[key] = SEEN
    return run(*inputs, *values, plan)


def _recorded(
    run: Callable[..., Outputs], inputs: Inputs, values: tuple[Any, ...], plan: object
) -> tuple[Outputs, Recipe | None]:
    """The call's outputs, and its recipe if it can be repeated."""
    recorder = _Recorder()
    observer.launched = recorder.launched
    try:
        with recorder:
            outputs = run(*inputs, *values, plan)
    finally:
        observer.launched = None
    return outputs, None if recorder.saw_others else _recipe(inputs, recorder, outputs, plan)


class _Recorder(TorchDispatchMode):
    """Sees what a call does, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.launches: list[tuple[int, Launch]] = []
        """Each with the number of allocations before it."""
        self.saw_others = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would import its compiler at the first operation seen: most of a second, in the second training step,
        # whose tensors that import's tracebacks kept.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.allocated.append(out)
        elif not func.is_view:
            self.saw_others = True
        return out

    def launched(self, launch: Launch) -> None:
        self.launches.append((len(self.allocated), launch))


def _recipe(inputs: Inputs, recorder: _Recorder, outputs: Outputs, plan: object) -> Recipe | None:
    """None if some tensor is neither an input nor an allocation from its beginning, or could be either of two."""
    tensors = (*inputs, *recorder.allocated)  # all alive, so that an address is one tensor's
    slots: dict[int, int] = {}
    for slot, tensor in enumerate(tensors):
        if tensor is not None and slots.setdefault(tensor.data_ptr(), slot) != slot:
            return None
    made = 0
    steps: list[Step] = []
    results: list[int | None] = []
    for count, launch in recorder.launches:
        args, places, descriptors = list(launch.args), [], []
        for place, arg in enumerate(launch.args):
            described = type(arg).__name__ == "TensorDescriptor"  # Triton's or Gluon's
            if not described and not isinstance(arg, Tensor):
                continue
            found = slots.get((arg.base if described else arg).data_ptr())
            if found is None:
                return None
            args[place] = None
            if described:
                descriptors.append((place, found, type(arg), vars(arg) | {"base": None}))
            else:
                places.append((place, found))
        allocations = tuple(_layout(t) for t in recorder.allocated[made:count])
        made = count
        steps.append(Step(allocations, launch._replace(args=args), tuple(places), tuple(descriptors), ()))
    for output in outputs:
        if output is None:
            results.append(None)
            continue
        slot = slots.get(output.data_ptr(), 0)
        if slot < len(inputs) or _layout(output) != _layout(recorder.allocated[slot - len(inputs)]):
            return None
        results.append(slot)
    if made < len(recorder.allocated):  # by nobody's launch: not this package's way
        return None
    needed = set(results)
    for index, step in reversed(list(enumerate(steps))):
        used = {slot for _, slot, *_ in (*step.tensors, *step.descriptors)}
        last = tuple(slot for slot in used - needed if slot >= len(inputs))
        steps[index] = step._replace(last=last)
        needed |= used
    return Recipe(tuple(steps), tuple(results), plan)


def _layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return t.shape, t.stride(), t.dtype
