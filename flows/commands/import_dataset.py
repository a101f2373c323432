"""The command ``d3po import-dataset``."""

import re
from pathlib import Path
from typing import Annotated

import typer

from d3po.flows.commands import completing
from d3po.flows.commands.parts import ConfigOption, SettingOption, loading
from d3po_core.errors import D3POError
from d3po_core.paths import path_from_here

KINDS = {"choice": "pairs", "rank": "rankings", "score": "groups with scores", "rating": "groups of good and bad"}


def import_dataset(
    files: Annotated[list[Path], typer.Argument(help="Parquet, CSV, JSON or JSON lines, or folders of them")],
    name: Annotated[str | None, typer.Option(help="Name of the data set; the first file's by default")] = None,
    deployment: Annotated[
        str,
        typer.Option(help="Deployment in prefect.yaml whose model encodes", autocompletion=completing.deployments),
    ] = "round",
    file: ConfigOption = None,
    setting: SettingOption = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the columns; recognised by default")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of the columns, ours=theirs: image=picture,prompt=words,score=stars")
    ] = None,
) -> None:
    """Import preferences that already exist, with their images; rounds can then train on them."""
    from d3po.flows.presets import deployment_config
    from d3po_core.datasets.sources import find_sources
    from d3po_core.datasets.stored import dataset_folder
    from d3po_core.judgement_files.importing import renaming

    name = name or re.sub(r"[^A-Za-z0-9_.-]", "-", files[0].resolve().stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise D3POError(
            f"--name {name!r}: expected up to 64 letters, digits, '_', '-' or '.', starting with a letter or digit, "
            "since it names a folder"
        )
    config = deployment_config(deployment, None, setting or [], file)
    sources = find_sources(files, layout, renaming(columns))
    with loading():
        from tqdm import tqdm

        from d3po_core.datasets.grouping import PROBLEMS
        from d3po_core.datasets.importing import import_dataset as import_all
    with tqdm(unit=" rows", desc=f"data set {name}", disable=None) as bar:
        found = import_all(dataset_folder(name), config, sources, bar.update)
    groups = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in found.groups.items())
    print(f"data set {name}: {groups} of {found.rows:,} rows; {found.images:,} images encoded, "
          f"{found.reused:,} used again")  # fmt: skip
    if found.problems:
        print(f"left out: {found.problems:,}, first {found.first_problem}; all are in "
              f"{path_from_here(found.folder / PROBLEMS)}")  # fmt: skip
    example = {"choice": "diffusion_dpo", "rank": "diffusion_dpo", "score": "rwr", "rating": "kto"}
    objective = next(example[kind] for kind in example if kind in found.groups)
    print(f"next: d3po run {deployment} --campaign NAME --set sample.dataset={name} --set train.objective={objective}")
