"""Lists from the 8-bit item table are those of the fp32 table, however alike the items are."""

import numpy as np
import pytest
import torch

from compress.item_table import Int8Table, certified_top_k
from slmrec.errors import ConfigError


def table_and_users(kind):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2000, 64, generator=generator)
    if kind == "near duplicates":  # hundreds of items whose scores differ in the last digits alone
        table = table[:20].repeat(100, 1) + 1e-5 * torch.randn(2000, 64, generator=generator)
    if kind == "one large entry":
        table[:, 0] += 50
    users = torch.randn(70, 64, generator=generator)
    if kind == "constant rows":  # rounding of long sums all in one direction, and scores that almost tie
        table = (1 + 1e-4 * torch.randn(2000, 1, generator=generator)).expand(2000, 1024).contiguous()
        users = (1 + torch.rand(70, 1, generator=generator)).expand(70, 1024).contiguous()
    return table, users


def exact_lists(table, users, excluded, k):
    scores = (users.double() @ table.double().T).numpy()
    scores[excluded.numpy()] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k] + 1, -np.sort(-scores, axis=1)[:, :k]


@pytest.mark.parametrize("kind", ["random", "near duplicates", "one large entry", "constant rows"])
@pytest.mark.parametrize("candidates", [10, 40, 500, 2000])
def test_lists_are_exact_whatever_the_candidates(kind, candidates):
    table, users = table_and_users(kind)
    excluded = torch.rand(70, 2000, generator=torch.Generator().manual_seed(1)) < 0.05
    items, scores, certified = certified_top_k(
        table, Int8Table.of(table), users, excluded, k=10, candidates=candidates
    )  # fmt: skip
    wanted, best = exact_lists(table, users, excluded, 10)
    np.testing.assert_allclose(scores.numpy(), best, rtol=1e-5, atol=1e-4)
    own = (users.double() @ table.double().T).gather(1, items - 1).numpy()
    np.testing.assert_allclose(own, best, rtol=1e-5, atol=1e-4)  # near duplicates may trade places within rounding
    if kind == "random":
        assert (items.numpy() == wanted).all()
    full = (users @ table.T).masked_fill(excluded, -torch.inf)
    for row in certified.nonzero()[:, 0].tolist():
        left = full[row].clone()
        left[items[row] - 1] = -torch.inf
        rounding = Int8Table.of(table).rounding * users[row].norm()
        assert left.max() <= scores[row, -1] + rounding, "what is left out of a certified list scores no better"
    if candidates == 2000:
        assert certified.all()


def test_bounds_hold_and_are_not_idle():
    table, users = table_and_users("random")
    rounded = Int8Table.of(table)
    gaps = (rounded.scores(users).double() - users.double() @ table.double().T).abs()
    bounds = users.norm(dim=1, keepdim=True) * rounded.error
    assert (gaps <= bounds).all()
    assert gaps.max() > 0.1 * bounds.mean()


def test_enough_candidates_certify_and_too_few_do_not():
    table, users = table_and_users("random")
    nothing = torch.zeros(70, 2000, dtype=torch.bool)
    shares = [
        float(certified_top_k(table, Int8Table.of(table), users, nothing, k=10, candidates=c)[2].float().mean())
        for c in (10, 60)
    ]
    assert shares[0] < 0.5
    assert shares[1] > 0.95


def test_fewer_candidates_than_items_asked_for_are_refused():
    table, users = table_and_users("random")
    nothing = torch.zeros(70, 2000, dtype=torch.bool)
    with pytest.raises(ConfigError, match="9 candidates cannot hold the best 10"):
        certified_top_k(table, Int8Table.of(table), users, nothing, k=10, candidates=9)


def test_ties_fall_to_the_smaller_id():
    table = torch.ones(50, 4)
    nothing = torch.zeros(3, 50, dtype=torch.bool)
    items, _, certified = certified_top_k(table, Int8Table.of(table), torch.ones(3, 4), nothing, k=5, candidates=20)
    assert items.tolist() == [[1, 2, 3, 4, 5]] * 3
    assert not certified.any()


def test_an_excluded_item_is_never_a_candidate():
    table, users = table_and_users("random")
    excluded = torch.zeros(70, 2000, dtype=torch.bool)
    best = certified_top_k(table, Int8Table.of(table), users, excluded, k=1, candidates=50)[0][:, 0]
    excluded[torch.arange(70), best - 1] = True
    items, _, _ = certified_top_k(table, Int8Table.of(table), users, excluded, k=5, candidates=50)
    assert not (items == best[:, None]).any()
