"""`reduce_partials`: shares that a plain chain of fp32 additions loses, which random inputs cannot show."""

import torch

from lora_kernels.kernels.interpreter import repaired
from lora_kernels.kernels.reduce_partials import BLOCK, Reduction, reduce_partials

ULP_OF_ONE = 2.0**-23


def reduced(partials: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    out = torch.full(partials.shape[1:], float("nan"))
    with repaired():
        reduce_partials([Reduction(partials, out, scale)])
    return out


def test_shares_below_half_a_unit_in_the_last_place_add_up():
    partials = torch.full((64, BLOCK + 3), 2.0**-25)
    partials[0] = 1.0
    exact = 1.0 + 63 * 2.0**-25
    chain = partials[0].clone()
    for share in partials[1:]:
        chain += share
    assert chain.eq(1.0).all()  # what is lost without compensation: 16 units in the last place
    assert (reduced(partials).double() - exact).abs().max() <= ULP_OF_ONE


def test_inf_stays_inf_and_nan_stays_nan():
    partials = torch.ones(4, 3)
    partials[1, 0], partials[2, 1], partials[0, 2] = float("inf"), float("nan"), -float("inf")
    found = reduced(partials, scale=2.0)
    assert found[0] == float("inf")
    assert found[1].isnan()
    assert found[2] == -float("inf")


def test_reductions_that_share_a_launch_are_those_that_do_not():
    generator = torch.Generator().manual_seed(0)
    shapes = {(3, 2 * BLOCK + 1): torch.float32, (5, 7): torch.bfloat16, (1, BLOCK, 3): torch.float32}
    partials = [torch.randn(shape, generator=generator) for shape in shapes]
    for count in (1, 2, 3):
        together = [
            Reduction(p, torch.full(p.shape[1:], float("nan"), dtype=dtype), scale)
            for p, dtype, scale in zip(partials[:count], shapes.values(), (2.0, 1.0, 0.5), strict=False)
        ]
        alone = [each._replace(out=torch.full_like(each.out, float("nan"))) for each in together]
        with repaired():
            reduce_partials(together)
            for each in alone:
                reduce_partials([each])
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.out, other.out)
            torch.testing.assert_close(
                one.out.double(), one.scale * one.partials.double().sum(0), rtol=2**-8, atol=1e-6
            )
