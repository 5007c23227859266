"""The methods that start from a decomposition: each has its row, and the factors are what the papers say."""

import pytest
import torch

from domain.peft.algorithms import SPECS
from domain.peft.config import DECOMPOSED
from engine.decompositions import DECOMPOSITIONS, orthonormal_factors, principal_factors


def test_every_decomposed_start_has_its_arithmetic_and_is_a_method() -> None:
    assert tuple(DECOMPOSITIONS) == DECOMPOSED
    assert {spec.fixed.get("init_weights") for spec in SPECS.values()} == {None, *DECOMPOSED}


def test_a_start_that_is_a_method_is_refused_with_every_method_that_does_not_fix_it() -> None:
    for spec in SPECS.values():
        refused = spec.refused.get("init_weights", {})
        assert set(refused) == (set() if "init_weights" in spec.fixed else set(DECOMPOSED))
        assert all(f"choose the algorithm '{start}'" in reason for start, reason in refused.items())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_principal_factors_leave_the_singular_values_beyond_the_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = principal_factors(weight, 4, 0.5)
    assert (a.shape, b.shape) == ((4, shape[1]), (shape[0], 4))
    left = torch.linalg.svdvals(weight - 0.5 * b @ a)
    torch.testing.assert_close(left[:2], torch.linalg.svdvals(weight)[4:])
    assert left[2:].max() < 1e-5


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_orthonormal_factors_have_an_orthonormal_b_and_give_the_first_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = orthonormal_factors(weight, 4, 0.5)
    torch.testing.assert_close(b.T @ b, torch.eye(4))
    torch.testing.assert_close((b @ a)[:, :4], weight[:, :4])
