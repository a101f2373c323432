"""Deal groups out to raters: every group gets the raters it needs if that is possible, nobody gets too many.

It is a maximum flow with capacities. We raise all raters' loads together, so they end as equal as quotas allow. Names
end in their axis: R raters, G groups.
"""

import numpy as np


def split_groups(
    need_G: np.ndarray, may_RG: np.ndarray, quota_R: np.ndarray, load_R: np.ndarray, seed: int
) -> np.ndarray:
    """Boolean ``[R, G]``: who judges which group, each rater a group at most once.

    Args:
        need_G: how many further raters each group needs.
        may_RG: who may get which group; false where a rater has judged it already.
        quota_R: the most groups that each rater may get here.
        load_R: groups that each rater has already; those with few get groups first.
        seed: decides which groups a rater gets; the same arguments give the same answer.
    """
    dealt_RG = np.zeros(may_RG.shape, bool)
    left_G, total_R = need_G.copy(), load_R.copy()
    order_G = np.random.default_rng(seed).permutation(len(need_G))
    waiting = np.flatnonzero(quota_R > 0)
    while len(waiting):
        # A rater who finds no further group will never find one later (Berge's theorem), so drop them.
        rater = int(waiting[total_R[waiting].argmin()])
        given = _give_one(rater, dealt_RG, may_RG, left_G, order_G)
        total_R[rater] += given
        if not given or total_R[rater] - load_R[rater] >= quota_R[rater]:
            waiting = waiting[waiting != rater]
    return dealt_RG


def _give_one(
    rater: int, dealt_RG: np.ndarray, may_RG: np.ndarray, left_G: np.ndarray, order_G: np.ndarray
) -> bool:  # fmt: skip
    """Give a rater one group more; if all are taken, let others pass one on and take a free one instead."""
    taken_from: dict[int, tuple[int, int]] = {rater: (rater, -1)}  # rater -> who takes which group from them
    for one in (path := [rater]):
        wanted_G = may_RG[one] & ~dealt_RG[one]
        free = order_G[(wanted_G & (left_G > 0))[order_G]]
        if len(free):
            group = int(free[left_G[free].argmax()])
            left_G[group] -= 1
            while True:
                dealt_RG[one, group] = True
                if one == rater:
                    return True
                taker, passed = taken_from[one]
                dealt_RG[one, passed] = False
                one, group = taker, passed
        for other in range(len(dealt_RG)):
            passed_on = np.flatnonzero(dealt_RG[other] & wanted_G)
            if other not in taken_from and len(passed_on):
                taken_from[other] = (one, int(passed_on[0]))
                path.append(other)
    return False
