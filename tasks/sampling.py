"""Sample: draw groups of images from the last checkpoint, with their trajectories."""

import pyarrow.parquet as pq
from prefect import task

from d3po.tasks import mirroring
from d3po.tasks.logs import run_logger
from d3po.tasks.scoring import scored_meanwhile
from d3po.tasks.stage import STAGE_OPTIONS, model_turn, progress
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.datasets.rounds import write_imported
from d3po_core.errors import D3POError
from d3po_core.models.memory import plan_in_words
from d3po_core.processes.engine import run_job
from d3po_core.records import SampleRecord
from d3po_core.reproducing.frozen import prompts_sha256
from d3po_core.sampling.job import SAMPLE, Shard, round_shards
from d3po_core.sampling.prompts import load_prompts
from d3po_core.store.files import atomic_path
from d3po_core.store.images import at_once, load_png, sheet
from d3po_core.store.integrity import LEFT_OUT, damages, listed_files
from d3po_core.store.stages import checkpoint_path, finish_stage, stage_path, start_of
from d3po_core.store.tables import joined, partition, write_table

SHEET_IMAGES = 64


@task(name="sample", **STAGE_OPTIONS)
def sample_images(config: CampaignConfig, round_number: int) -> SampleRecord:
    """Sample the round's groups with the previous round's checkpoint, and take those of a data set."""
    record = finish_stage(config.folder, round_number, "sample", SampleRecord, lambda: _sample(config, round_number))
    _draw_left_out(config, round_number)
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


def _sample(config: CampaignConfig, round_number: int) -> SampleRecord:
    shards = _sample_shards(config, round_number)
    paths = [*(shard.rows_path for shard in shards), *write_imported(config, round_number)]
    if plan := plan_in_words(config):
        run_logger().info(plan)
    table = joined("samples", [pq.ParquetFile(path).read() for path in paths])
    write_table(config.folder, "samples", round_number, table)
    contact_sheet = _contact_sheet(config, round_number, table["image_path"].to_pylist()[:SHEET_IMAGES])
    if not shards:
        return SampleRecord(num_samples=len(table), checkpoint=None, contact_sheet=contact_sheet)
    prompts = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    return SampleRecord(
        num_samples=len(table),
        checkpoint=checkpoint_path(start_of(config.folder, round_number)),
        contact_sheet=contact_sheet,
        num_prompts=len(prompts),
        prompts_sha256=prompts_sha256(prompts),
    )


def _sample_shards(config: CampaignConfig, round_number: int) -> list[Shard]:
    """Sample the missing shards of a round; return all of them."""
    shards = round_shards(config, round_number)
    if not shards:  # all groups come from a data set
        return shards
    total = config.sample.images_per_round
    done = sum(len(shard.members) for shard in shards if shard.rows_path.exists())
    with (
        scored_meanwhile(config, shards),  # outermost, so that nobody waits for a score while holding the GPU
        model_turn(config),
        progress(config, round_number, "sample", total, "image", done) as bar,
    ):
        run_job(SAMPLE, config, round_number, bar.update)
    return shards


def _draw_left_out(config: CampaignConfig, round_number: int) -> None:
    """Draw the images again that were left out of the mirror from which this campaign came, if training needs them.

    Raises:
        D3POError: they came out differently, as they may on another device; judgements belong to the first ones.
    """
    listed = listed_files(config.folder, round_number, "sample")
    kinds = ("images", "trajectories")
    folders = [config.folder / kind / f"round={round_number}" for kind in kinds]
    gone = [name for name in listed if name.startswith(kinds) and not (config.folder / name).exists()]
    if not gone or stage_path(config.folder, round_number, "train").exists():
        return
    run_logger().info("round %d: %d files were not in the mirror; its images are drawn again", round_number, len(gone))
    _sample_shards(config, round_number)
    write_imported(config, round_number)
    samples = pq.ParquetFile(partition(config.folder, "samples", round_number) / "part.parquet").read()
    _contact_sheet(config, round_number, samples["image_path"].to_pylist()[:SHEET_IMAGES])
    for folder in folders:
        (folder / LEFT_OUT).unlink(missing_ok=True)
    if found := damages(config.folder, [round_number], kinds):
        raise D3POError(
            f"round {round_number} of campaign {config.campaign!r}: {len(found)} files came out differently than on "
            "the lost machine, and judgements belong to those; drop the round (d3po discard-round) and set "
            "store.mirror_images and store.mirror_trajectories"
        )


def _contact_sheet(config: CampaignConfig, round_number: int, image_paths: list[str]) -> str:
    images = at_once(load_png, [config.folder / path for path in image_paths])
    relative = f"images/round={round_number}/contact_sheet.png"
    size = config.sample.group_size
    columns = size * max(1, 12 // size)  # whole groups side by side
    with atomic_path(config.folder / relative) as temporary:
        sheet(images, columns, cell=96).save(temporary, format="PNG")
    return relative
