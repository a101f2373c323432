"""Import people's judgements: check everything before writing anything, and write a whole file or none."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d3po_core.errors import D3POError
from d3po_core.image_ids import ROUND_OF_SAMPLE
from d3po_core.judgement_files.checks import check_judgements
from d3po_core.judgement_files.delimited import CUT_OFF, fingerprint, shown
from d3po_core.judgement_files.formats import JudgementFile, Reading, load_order, read_judgement_file
from d3po_core.judgement_files.outcome import outcome
from d3po_core.judgement_files.report import ImportReport
from d3po_core.judgement_files.rules import Scope
from d3po_core.people.rater_names import composed, name_problem
from d3po_core.store.campaign import CAMPAIGN_FILE, campaign_id
from d3po_core.store.files import disk_errors, exclusive
from d3po_core.store.integrity import noted_names, require_files
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import connect, partition, write_table

MANIFEST = "manifest.json"
_SAMPLES = "samples/round="
GOLD_RATER = "gold"


def import_file(
    campaign_folder: Path,
    path: Path,
    round_number: int | None = None,
    rater: str | None = None,
    dry_run: bool = False,
    accept_valid: bool = False,
    gold: bool = False,
    late: bool = False,
    order: str | None = None,
    scale: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    control: str | None = None,
    left: str | None = None,
) -> ImportReport:
    """Check a file of judgements and, if it is right, add it to a round. It only adds a file, so it needs no lock.

    Args:
        campaign_folder: the campaign's folder.
        path: the file, in one of the formats of docs/judgements.md.
        round_number: the round; by default the one that the file's ids name, else the last sampled one.
        rater: who judged the rows that do not say it.
        dry_run: check and report only.
        accept_valid: write the good rows of a file that has bad ones.
        gold: the judgements are known answers to gold questions.
        late: keep judgements of a round whose preferences are already derived.
        order: of a positional list: a manifest's path, or ``sampled`` for groups and members as they were sampled.
        scale: words of an ordered scale of ratings, the worst first.
        columns: the file's name of each column, by ours, such as ``{"winner": "better"}``.
        control: which control of Label Studio counts.
        left: which column of Label Studio's tasks stood on the left.

    Raises:
        D3POError: the file as a whole, the campaign or the round do not fit; nothing is written then.
    """
    positions = _order(campaign_folder, path, round_number, order)
    file = read_judgement_file(path, Reading(positions, columns or {}, control, left, scale))
    _check_manifest(campaign_folder, path)
    number = _round_of(campaign_folder, file, round_number)
    file, elsewhere = _of_round(campaign_folder, file, number)
    derived = _check_not_derived(campaign_folder, number, late)
    rater = _rater(file, rater, gold)
    identity = json.dumps([file.sha256, rater, gold, positions, list(scale)])
    source = f"import-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    target = partition(campaign_folder, "judgements", number) / f"{source}.parquet"
    checked = check_judgements(file, _scope(campaign_folder, number, rater, gold, scale), source)
    if fingerprint(path) != file.fingerprint:
        raise D3POError(f"{path.name}: changed while it was checked; {CUT_OFF}")
    rows, num_known = _not_on_record(campaign_folder, number, checked.rows, file)
    if not len(checked.rows) and not checked.num_bad:
        raise D3POError(f"{path.name}: holds no judgement; fill in {file.labels.get('said', 'it')} and import it again")
    already = target.exists()
    written = None
    accepted = len(checked.rows) > 0 and (accept_valid or not checked.num_bad)
    if accepted and not dry_run and not already and len(rows):
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.parent):  # else two imports of one file could both find it missing
            already = target.exists()
            if not already:
                written = write_table(campaign_folder, "judgements", number, rows, name=source)
    counts = pc.value_counts(checked.rows["rater"].combine_chunks()) if len(checked.rows) else []
    return ImportReport(
        file=path.name, campaign=campaign_folder.name, round_number=number, format=file.format, noun=file.noun,
        num_rows=len(file.table) + len(file.problems), num_good=len(checked.rows), num_bad=checked.num_bad,
        num_empty=checked.num_empty, raters={str(c["values"]): c["counts"].as_py() for c in counts},
        problems=checked.problems, written=written, already=already,
        late=derived or stage_path(campaign_folder, number, "derive").exists(),
        accepted=accepted, num_repeated=checked.num_repeated, num_known=0 if already else num_known,
        elsewhere=elsewhere,
        notes=(*file.notes, *outcome(checked.rows, file), *_whose(path, file)),
    )  # fmt: skip


def renaming(said: str | None) -> dict[str, str]:
    """Parse a text such as ``winner=better,loser=worse`` into the file's column names by ours.

    Raises:
        D3POError: a part has no ``=``.
    """
    parts = [part.partition("=") for part in said.split(",")] if said else []
    wrong = next((ours for ours, sign, theirs in parts if not (ours.strip() and sign and theirs.strip())), None)
    if wrong is not None:
        raise D3POError(f"--columns {shown(wrong)}: expected ours=theirs, such as winner=better,loser=worse")
    return {ours.strip(): theirs.strip() for ours, _, theirs in parts}


def sampled_rounds(campaign_folder: Path) -> list[int]:
    """Completely sampled rounds, in order; a round stays listed if its table was lost."""
    files = {path.relative_to(campaign_folder).as_posix() for path in campaign_folder.glob(f"{_SAMPLES}*/part.parquet")}
    files |= {name for name in noted_names(campaign_folder) if name.startswith(_SAMPLES)}
    return sorted(int(name.removeprefix(_SAMPLES).partition("/")[0]) for name in files)


def read_samples(campaign_folder: Path, round_number: int) -> pa.Table:
    """sample_id, group_id, member, prompt and image_path of a round, in sampling order.

    Raises:
        D3POError: the round has no samples.
    """
    path = partition(campaign_folder, "samples", round_number) / "part.parquet"
    if round_number not in sampled_rounds(campaign_folder):
        known = ", ".join(map(str, sampled_rounds(campaign_folder))) or "none"
        raise D3POError(
            f"round {round_number} of campaign {campaign_folder.name!r} has no images; rounds that have: {known}"
        )
    require_files(campaign_folder, [path.relative_to(campaign_folder).as_posix()])
    return pq.ParquetFile(path).read(columns=["sample_id", "group_id", "member", "prompt", "image_path"])


def sampled_order(samples: pa.Table) -> list[list[str]]:
    """Sample ids per group; groups and members in sampling order."""
    groups: dict[str, list[str]] = {}
    for group, sample in zip(samples["group_id"].to_pylist(), samples["sample_id"].to_pylist(), strict=True):
        groups.setdefault(group, []).append(sample)
    return list(groups.values())


def _order(folder: Path, path: Path, round_number: int | None, order: str | None) -> list[list[str]] | None:
    if order == "sampled":
        number = round_number if round_number is not None else max(sampled_rounds(folder), default=1)
        return sampled_order(read_samples(folder, number))
    if order is not None:
        return load_order(Path(order))
    manifest = path.parent / MANIFEST  # a sheet's folder holds it
    return load_order(manifest) if _manifest(manifest) and path.suffix == ".json" and path.name != MANIFEST else None


def _manifest(path: Path) -> dict[str, object]:
    """A sheet's manifest; empty if the file is something else."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and "campaign_id" in found and "order" in found else {}


def _check_manifest(folder: Path, path: Path) -> None:
    manifest = _manifest(path.parent / MANIFEST)
    if manifest and (folder / CAMPAIGN_FILE).exists() and manifest["campaign_id"] != campaign_id(folder):
        raise D3POError(
            f"{path.name}: is of a sheet of campaign {shown(str(manifest.get('campaign')))}, started at another time "
            f"than {folder.name!r}; import it into its own --campaign"
        )


def _round_of(folder: Path, file: JudgementFile, asked: int | None) -> int:
    sampled = sampled_rounds(folder)
    if not sampled:
        raise D3POError(f"campaign {folder.name!r} in {folder} has no images to judge yet; sample a round first")
    number = asked
    if number is None:
        named = pc.struct_field(pc.extract_regex(file.table["sample_id"], ROUND_OF_SAMPLE), "n")
        rounds = pc.value_counts(pc.drop_null(named).combine_chunks()).to_pylist()
        number = int(max(rounds, key=lambda r: (r["counts"], r["values"]))["values"]) if rounds else sampled[-1]
    if number not in sampled:
        raise D3POError(
            f"{file.name}: is of round {number}, of which campaign {folder.name!r} has no images; "
            f"rounds that have: {', '.join(map(str, sampled))}; is it the file of another campaign?"
        )
    return number


def _of_round(folder: Path, file: JudgementFile, number: int) -> tuple[JudgementFile, dict[int, int]]:
    """The file without rows of the campaign's other rounds, and the number of those per round."""
    own, other = (
        pc.cast(pc.struct_field(pc.extract_regex(file.table[name], ROUND_OF_SAMPLE), "n"), pa.int64())
        for name in ("sample_id", "other_id")
    )
    of_one = pc.or_kleene(pc.is_null(file.table["other_id"]), pc.equal(own, other))
    rounds = pc.if_else(pc.fill_null(of_one, False), pc.fill_null(own, number), pa.scalar(number))  # else an error
    others = [other for other in sampled_rounds(folder) if other != number]
    away = pc.is_in(rounds, pa.array(others, pa.int64()))
    if pc.all(away).as_py() or not pc.any(away).as_py():  # if all rows are, the checks report it
        return file, {}
    counts = {count["values"]: count["counts"] for count in pc.value_counts(rounds.filter(away)).to_pylist()}
    return replace(file, table=file.table.filter(pc.invert(away))), counts


def _not_on_record(folder: Path, number: int, rows: pa.Table, file: JudgementFile) -> tuple[pa.Table, int]:
    """The rows not yet on record with the same time, and the number of the others."""
    if not len(rows) or file.table["judged_at"].null_count == len(file.table):
        return rows, 0
    numbered = rows.append_column("place", pa.array(range(len(rows)), pa.int64()))
    with connect(folder) as connection:
        connection.register("read_rows", numbered)
        fresh = connection.sql(
            """SELECT place FROM read_rows n WHERE NOT EXISTS (
                   FROM judgements j WHERE j.round = $round AND j.rater = n.rater AND j.sample_id = n.sample_id
                   AND j.other_id IS NOT DISTINCT FROM n.other_id AND j.judged_at = n.judged_at
                   AND j.value IS NOT DISTINCT FROM n.value AND j.kind = n.kind
                   AND coalesce(j.both_bad, false) = coalesce(n.both_bad, false)) ORDER BY place""",
            params={"round": number},
        ).to_arrow_table()["place"]
    return rows.take(fresh.combine_chunks()), len(rows) - len(fresh)


def _whose(path: Path, file: JudgementFile) -> list[str]:
    """A warning if nothing tells which campaign the file belongs to."""
    told = any(file.table[name].null_count < len(file.table) for name in ("campaign", "campaign_id", "prompt"))
    if told or _manifest(path.parent / MANIFEST):
        return []
    return ["nothing in the file says which campaign it is of (no column campaign or prompt), and images of another "
            "one may have the same names"]  # fmt: skip


def _check_not_derived(folder: Path, number: int, late: bool) -> bool:
    derived = stage_path(folder, number, "derive").exists()
    if derived and not late:
        raise D3POError(
            f"the preferences of round {number} of campaign {folder.name!r} are derived already: its training would "
            "not change; add --late to keep these judgements on record all the same"
        )
    return derived


def _scope(folder: Path, number: int, rater: str | None, gold: bool, scale: Sequence[str]) -> Scope:
    with connect(folder) as connection:
        raters = connection.sql(
            "SELECT DISTINCT rater, rater_kind FROM judgements WHERE round = $round", params={"round": number}
        ).to_arrow_table()
        names = connection.sql("SELECT DISTINCT rater FROM judgements").to_arrow_table()["rater"].to_pylist()
        ((last,),) = connection.execute(
            "SELECT max(judged_at)::TIMESTAMP FROM judgements WHERE round = $round AND rater_kind != 'proxy'",
            {"round": number},
        ).fetchall()
    # A later import must count as said later, even if the clock was set back.
    now = datetime.now(UTC).replace(tzinfo=None)
    now = max(now, last + timedelta(microseconds=1)) if last else now
    own_id = campaign_id(folder) if (folder / CAMPAIGN_FILE).exists() else ""
    return Scope(
        folder.name, number, read_samples(folder, number), rater, "gold" if gold else "human", raters,
        now, scale, sorted(names), own_id,
    )  # fmt: skip


def _rater(file: JudgementFile, rater: str | None, gold: bool) -> str | None:
    if rater is None:
        if not gold and len(file.table) and file.table["rater"].null_count == len(file.table):
            raise D3POError(f"{file.name}: does not say who judged; add a column rater, or --rater NAME")
        return GOLD_RATER if gold else None
    name = composed(rater)
    if not name:
        raise D3POError("--rater is empty; expected a name")
    if problem := name_problem(name):
        raise D3POError(f"--rater {shown(name)}: is no name; {problem}")
    return name
