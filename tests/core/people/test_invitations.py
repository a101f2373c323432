"""Invitations: what the file holds after each change, and what a damaged one or a bad request does."""

import stat
from pathlib import Path

import pytest

from d3po_core.errors import D3POError
from d3po_core.people.invitations import FILE, invite, read_invitations, revoke, set_assignment, set_quota


def test_a_campaign_is_open_until_somebody_is_invited(tmp_path: Path) -> None:
    assert not read_invitations(tmp_path).closed
    assert not (tmp_path / FILE).exists()
    invite(tmp_path, "ann", 5)
    known = read_invitations(tmp_path)
    assert known.closed
    assert list(known.standing) == ["ann"]
    assert known.quota("ann") == 5


def test_a_revoked_rater_stays_named_and_can_be_invited_again(tmp_path: Path) -> None:
    invite(tmp_path, "ann", 5)
    ended = revoke(tmp_path, "ann")
    assert not ended.standing
    assert ended.raters["ann"].revoked
    assert revoke(tmp_path, "ann") == ended  # the first time counts
    assert read_invitations(tmp_path).closed
    assert invite(tmp_path, "ann").standing["ann"].quota == 5


def test_a_quota_is_kept_changed_and_removed(tmp_path: Path) -> None:
    invite(tmp_path, "ann", 5)
    assert invite(tmp_path, "ann").quota("ann") == 5
    assert set_quota(tmp_path, "ann", 7).quota("ann") == 7
    assert invite(tmp_path, "ann", 0).quota("ann") is None


def test_the_way_of_assignment_is_kept(tmp_path: Path) -> None:
    invite(tmp_path, "ann")
    set_assignment(tmp_path, "split")
    assert read_invitations(tmp_path).assignment == "split"
    invite(tmp_path, "bob")
    assert read_invitations(tmp_path).assignment == "split"


def test_the_file_is_private_and_holds_no_link(tmp_path: Path) -> None:
    invite(tmp_path, "ann")
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_what_cannot_be_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    for act, message in (
        (lambda: set_assignment(tmp_path, "split"), "nobody is invited"),
        (lambda: set_quota(tmp_path, "ann", 3), "not invited"),
        (lambda: invite(tmp_path, "a/b"), "without slashes"),
        (lambda: invite(tmp_path, "ann", -1), "expected a number of groups"),
    ):
        with pytest.raises(D3POError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"closed": true, "raters": {"ann": {"quota": 0}}}', b'{"more": 1}'])
def test_a_damaged_file_admits_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(D3POError, match="cannot be read"):
        read_invitations(tmp_path)
    with pytest.raises(D3POError, match="cannot be read"):
        invite(tmp_path, "bob")
    assert (tmp_path / FILE).read_bytes() == content
