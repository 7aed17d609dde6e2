"""softar.largest: what argmax and topk say, found by the maxima of chunks; and what is built on it."""

import pytest
import torch

from softar.largest import LARGE, Largest, chunk_of
from softar.soft import TILE, entropy, mk_proba_dist

SIZES = [300, LARGE - 1, LARGE, LARGE + 64, 49152, 50257]


def scores(*shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = x.view(-1, shape[-1])
    rows[0, [7, shape[-1] - 1]] = 40.0  # a tie, across chunks
    rows[1, 5:] = -torch.inf
    return x


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_strided", [False, True])
def test_the_largest_are_those_of_topk(V, dtype, is_strided):
    x = scores(2, 3, V, dtype=dtype)
    x = x[:, -2:] if is_strided else x
    found = Largest(x)
    assert (found.chunks is None) == (V < LARGE or chunk_of(V) is None)
    assert torch.equal(found.id, x.argmax(-1))
    for k in (1, 2, 10, 60, V):
        ids = found.ids(k)
        assert torch.equal(x.gather(-1, ids), x.topk(k, -1).values)
        assert torch.equal(ids[..., 0], x.argmax(-1))
        assert all(len(set(row.tolist())) == k for row in ids.flatten(0, -2))


@pytest.mark.parametrize("V", [300, 49152])
def test_a_nan_is_the_largest(V):
    x = scores(3, V)
    x[2, 9] = torch.nan
    found = Largest(x)
    assert found.id.tolist() == x.argmax(-1).tolist() and found.id[2] == 9
    assert found.ids(4)[2, 0] == 9


@pytest.mark.parametrize("how", [dict(top_k=10), dict(top_k=10, min_p=0.05), dict(temperature=0)])
def test_mixtures_of_a_large_vocabulary_are_those_of_a_small_one(how):
    """The same logits, after others that nothing chooses."""
    x = (scores(4, 300) * 3).requires_grad_()
    wide = torch.cat([x, x.new_full((4, 49152 - 300), -50.0)], -1)
    small, large = mk_proba_dist(x, **how), mk_proba_dist(wide, **how)
    weight = torch.randn(10, generator=torch.Generator().manual_seed(1))
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(
            a[2:], b[2:]
        )  # row 1 has five that are not -inf
    if small.weights.requires_grad:
        grads = [
            torch.autograd.grad((s.weights[[0, 2, 3]] * weight).sum(), x)[0] for s in (small, large)
        ]
        assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("V", [1500, 4096, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_in_tiles_is_that_of_each_row(V, temperature):
    x = scores(3 * max(TILE // V, 1) + 2, V)
    x[-1, 0] = torch.nan
    tiled = entropy(x, temperature)
    p = (x.double() / temperature).softmax(-1)
    torch.testing.assert_close(
        tiled.double(), -torch.special.xlogy(p, p).sum(-1), atol=1e-4, rtol=0, equal_nan=True
    )
    one_by_one = torch.cat([entropy(row[None], temperature) for row in x])
    torch.testing.assert_close(tiled, one_by_one, atol=1e-5, rtol=1e-6, equal_nan=True)
    whole = entropy(x.clone().requires_grad_(), temperature).detach()  # gradients: all rows at once
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-6, equal_nan=True)
    assert entropy(x.view(1, *x.shape), temperature).shape == (1, len(x))
