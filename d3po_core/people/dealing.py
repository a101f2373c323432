"""Deal a round's groups out to the invited raters, and note who got what.

The split is a note in the journal, so that every page and a restarted one deal out the same groups. It is dealt anew
when somebody is invited or revoked, or a quota changes; groups that a rater has begun stay with the rater.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from d3po_core.people.invitations import Invitations
from d3po_core.people.journal import Journal
from d3po_core.people.shares import begun, group_ids
from d3po_core.people.splitting import split_groups
from d3po_core.people.tally import ANSWERED, Tally

NOTE = "split"
NO_QUOTA = 2**31


class Split(NamedTuple):
    """Groups per rater, and the invitations that they were dealt out for."""

    made_for: str
    groups: Mapping[str, frozenset[str]]


def lacking(tally: Tally, invitations: Invitations) -> int:
    """Number of groups that lack raters even if everybody invited fills their quota."""
    need_G, dealt_RG = _deal(tally, invitations)
    return int((dealt_RG.sum(0) < need_G).sum())


def agreed_split(journal: Journal, tally: Tally, invitations: Invitations) -> Split | None:
    """The split of the deck's groups, dealt out now if invitations changed since; None if groups are not split.

    Raises:
        D3POError: the journal cannot be written.
    """
    if invitations.assignment != "split" or not invitations.standing:
        return None
    made_for = _made_for(invitations)
    known = read_split(journal, tally.deck.sampling)
    if known and known.made_for == made_for:
        return known
    raters, ids_G = list(invitations.standing), group_ids(tally)
    _, dealt_RG = _deal(tally, invitations)
    groups = {
        rater: frozenset(ids_G[dealt_G | begun(tally, rater)].tolist())
        for rater, dealt_G in zip(raters, dealt_RG, strict=True)
    }
    text = json.dumps({"for": made_for, "groups": {rater: sorted(ids) for rater, ids in groups.items()}})
    journal.note(tally.deck.sampling, NOTE, text)
    return Split(made_for, groups)


def read_split(journal: Journal, sampling: str) -> Split | None:
    """The split that was noted last, None if there is none."""
    text = journal.read_note(sampling, NOTE)
    if text is None:
        return None
    known = json.loads(text)
    return Split(known["for"], {rater: frozenset(ids) for rater, ids in known["groups"].items()})


def _made_for(invitations: Invitations) -> str:
    text = json.dumps({name: one.quota for name, one in invitations.standing.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deal(tally: Tally, invitations: Invitations) -> tuple[np.ndarray, np.ndarray]:
    """[G] raters that groups need beyond those who began them, and [R, G] a way to deal those out."""
    deck, raters = tally.deck, list(invitations.standing)
    size = (len(raters), deck.num_groups)
    begun_RG = np.array([begun(tally, rater) for rater in raters], bool).reshape(size)
    people_Q = deck.group_of < deck.num_groups
    by_others_Q = tally.counts.copy()
    for rater in raters:
        by_others_Q -= tally.status(rater) == ANSWERED
    by_others_G = np.full(deck.num_groups, NO_QUOTA)
    np.minimum.at(by_others_G, deck.group_of[people_Q], by_others_Q[people_Q])
    need_G = np.maximum(deck.config.judge.people.raters_per_group - by_others_G - begun_RG.sum(0), 0)
    load_R = begun_RG.sum(1)
    quota_R = np.array([NO_QUOTA if one.quota is None else one.quota for one in invitations.standing.values()], int)
    seed = int(hashlib.sha256(deck.sampling.encode()).hexdigest()[:8], 16)
    return need_G, split_groups(need_G, ~begun_RG, np.maximum(quota_R - load_R, 0), load_R, seed)
