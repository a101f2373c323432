"""Groups dealt out to raters: as many as a maximum flow finds, within every quota, and evenly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from d3po_core.people.splitting import split_groups

NO_QUOTA = 2**31


def most_possible(need_G: np.ndarray, may_RG: np.ndarray, quota_R: np.ndarray) -> int:
    """The value of the maximum flow source -> raters -> groups -> sink, by scipy."""
    raters, groups = may_RG.shape
    size = raters + groups + 2
    edges = np.zeros((size, size), np.int32)
    edges[0, 1 : raters + 1] = np.minimum(quota_R, groups)
    edges[1 : raters + 1, raters + 1 : -1] = may_RG
    edges[raters + 1 : -1, -1] = need_G
    return int(maximum_flow(csr_array(edges), 0, size - 1).flow_value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_split_gives_more_and_all_limits_hold(data: st.DataObject) -> None:
    raters, groups = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    need_G, quota_R = draw.integers(0, 4, groups), draw.integers(0, 7, raters)
    may_RG, load_R = draw.random((raters, groups)) < draw.choice([0.3, 0.6, 1.0]), draw.integers(0, 5, raters)
    dealt_RG = split_groups(need_G, may_RG, quota_R, load_R, seed=1)
    assert not (dealt_RG & ~may_RG).any()
    assert (dealt_RG.sum(1) <= quota_R).all()
    assert (dealt_RG.sum(0) <= need_G).all()
    assert dealt_RG.sum() == most_possible(need_G, may_RG, quota_R)


@pytest.mark.parametrize(("groups", "needed"), [(21, 1), (200, 3), (7, 2)])
def test_without_quotas_twenty_raters_get_equally_many(groups: int, needed: int) -> None:
    dealt_RG = split_groups(
        np.full(groups, needed), np.ones((20, groups), bool), np.full(20, NO_QUOTA), np.zeros(20, int), seed=3
    )
    assert (dealt_RG.sum(0) == needed).all()
    loads = dealt_RG.sum(1)
    assert loads.max() - loads.min() <= 1


def test_who_has_judged_less_gets_more() -> None:
    load_R = np.array([6, 0, 3])
    dealt_RG = split_groups(np.ones(9, int), np.ones((3, 9), bool), np.full(3, NO_QUOTA), load_R, seed=0)
    assert (dealt_RG.sum(1) + load_R).tolist() == [6, 6, 6]


def test_a_full_rater_passes_a_group_on_so_that_another_finds_one() -> None:
    # The second may judge only the group that the first, dealt to first, would take.
    for seed in range(8):
        may_RG = np.array([[True, True], [True, False]])
        assert split_groups(np.ones(2, int), may_RG, np.ones(2, int), np.zeros(2, int), seed).sum() == 2


def test_the_same_arguments_give_the_same_split_and_another_seed_another() -> None:
    arguments = np.ones(30, int), np.ones((5, 30), bool), np.full(5, NO_QUOTA), np.zeros(5, int)
    one, again, other = (split_groups(*arguments, seed) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()
