"""Put people's judgements into the mirror while they judge: the run sleeps then, and has no process."""

import threading
from pathlib import Path

from d3po.tasks.logs import run_logger
from d3po_core.config import CampaignConfig
from d3po_core.mirror.opening import push
from d3po_core.mirror.state import STATE_FILE, read_state
from d3po_core.store.campaign import CAMPAIGN_FILE, campaign_named

LOOK_SECONDS = 5.0
WATCHED = ("labels.sqlite*", "invitations.json", "comparisons/*.json", "comparisons/round=*/*.parquet",
           "image_reports/round=*/*.parquet", "judgements/round=*/*.parquet")  # fmt: skip
Seen = dict[Path, tuple[object, ...]]


def watch_people(runs: Path, over: threading.Event) -> None:
    """Until ``over`` is set, look every few seconds for new judgements in mirrored campaigns, and put them."""
    put: Seen = {}
    said: dict[Path, str] = {}
    while not over.wait(LOOK_SECONDS):
        put_judgements(runs, put, said)


def put_judgements(runs: Path, put: Seen, said: dict[Path, str]) -> None:
    """Put what people said since the last call; a failure is told once, and tried again.

    Args:
        runs: the folder of the campaigns.
        put: what was put already, by campaign; brought up to date.
        said: the last problem of each campaign; brought up to date.
    """
    for path in runs.glob(f"*/{STATE_FILE}"):
        campaign = path.parent
        now = _fingerprint(campaign)
        if not now or put.get(campaign) == now or not (campaign / CAMPAIGN_FILE).exists():
            continue
        try:
            push(mirrored_config(campaign))
        except Exception as error:  # people go on judging whatever the store says
            if said.get(campaign) != str(error):
                run_logger().warning("judgements are kept here and put into the mirror later: %s", error)
            said[campaign] = str(error)
            continue
        put[campaign] = now
        said.pop(campaign, None)


def mirrored_config(campaign: Path) -> CampaignConfig:
    """Return a campaign's configuration with the mirror that its folder met last."""
    return campaign_named(str(campaign)).model_copy(update={"store": read_state(campaign).config})


def _fingerprint(campaign: Path) -> tuple[object, ...]:
    """Return what changes whenever people said something new."""
    found = sorted(path for pattern in WATCHED for path in campaign.glob(pattern))
    return tuple((path.name, (status := path.stat()).st_mtime_ns, status.st_size) for path in found)
