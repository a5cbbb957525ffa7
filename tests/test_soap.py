"""SOAP and its variants: their numbers against a reference, their bases and guards."""

import pytest

from optax_kron import scale_by_soap
from tests.reference import shampoo as reference
from tests.test_shampoo import assert_close, gradients, run

EXACT = {"factor_dtype": "float64", "momentum": 0.9, "decay": 0.8, "factor_decay": 0.7}
VARIANTS = ("soap", "kl_shampoo", "kl_soap")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("is_complex", [False, True])
def test_ten_steps_are_those_of_the_reference(shape, every, variant, is_complex):
    stream = gradients(shape, steps=10, is_complex=is_complex)
    stage = reference.Soap(shape, variant=variant, every=every)
    settings = EXACT | {"variant": variant, "refresh_every": every, "floor": 0.0}
    updates, states = run(scale_by_soap(**settings), stream)
    assert int(states[-1].failed_refreshes) == 0
    for actual, G in zip(updates, stream, strict=True):
        # In its own basis a first gradient is diagonal but for rounding, 1e-16 or so, and Adam
        # divides what is beside the diagonal by √V + 1e-8.
        assert_close(actual, stage.step(G), rtol=1e-5)
