"""A plan's counts are what finished rounds then did."""

from pathlib import Path

from d3po.tasks.judging import _derive
from d3po_core.config import CampaignConfig
from d3po_core.planning.work import count_updates, round_work
from d3po_core.records import DeriveRecord
from d3po_core.store.tables import partition, read_rows
from tests.tasks.conftest import HELD_OUT


def rows(config: CampaignConfig, table: str, number: int) -> list[dict[str, object]]:
    return read_rows(partition(config.folder, table, number) / "part.parquet")


def test_a_rounds_counts_are_the_planned_ones(config: CampaignConfig, campaign: Path) -> None:
    work = round_work(config, len(HELD_OUT))
    config = config.model_copy(update={"runs_dir": str(campaign.parent)})  # a copy, since pairs are derived again
    for number in (1, 2):
        derived: DeriveRecord = _derive(config, number)
        pairs = rows(config, "preferences", number)
        assert len(rows(config, "samples", number)) == work.images
        assert derived.num_pairs + derived.num_ties == work.pairs_judged
        assert len(pairs) <= work.pairs
        groups = len({pair["group_id"] for pair in pairs})
        assert len(rows(config, "updates", number)) == count_updates(groups, config.train) <= work.updates
        assert len(rows(config, "evaluations", number)) == work.held_out_images
