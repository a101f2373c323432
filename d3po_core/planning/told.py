"""A plan in words: the table of ``d3po plan``, and the three lines that ``d3po run`` begins with."""

from pathlib import Path

from d3po_core.paths import path_from_here
from d3po_core.planning.plan import Plan
from d3po_core.scorers.finding import BUILT_IN
from d3po_core.sizes import in_words


def three_lines(plan: Plan) -> list[str]:
    """Return what the run does, how long it takes, and where."""
    return [
        f"what      campaign {plan.campaign}, {_rounds(plan)}: {_counts(plan)}",
        f"how long  {_time(plan)}",
        f"where     {_machine(plan)}; {_disk(plan)}; to download: {_download(plan)}",
    ]


def sections(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan's lines, each with a name."""
    work = plan.work
    judges = ", ".join(plan.scorers) or "people"
    stages = [
        *([("data set", f"{work.imported:,} groups, with their judgements")] if work.imported else []),
        *([("sample", f"{work.images:,} images: {work.groups:,} groups of {work.images // work.groups}, "
                      f"{plan.prompts:,} prompts to draw from")] if work.groups else []),
        ("size", _sizes(plan)),
        *([("judge", f"{work.pairs_judged:,} pairs, by {judges}")] if work.groups else []),
        *([("label", "people judge; the run sleeps meanwhile")] if "label" in work.stages else []),
        ("train", f"up to {work.pairs:,} pairs and {work.updates:,} updates; pairs that tie teach nothing"),
        ("evaluate", f"{work.held_out_images:,} held-out images of {plan.held_out_prompts:,} prompts"),
    ]  # fmt: skip
    done = [("finished", ", ".join(plan.finished_stages))] if plan.finished_stages else []
    return [
        ("rounds", _rounds(plan)), *done, *stages,
        ("time", _time(plan)), ("GPU memory", _memory(plan)), ("machine", _machine(plan)),
        ("disk", _disk(plan)), ("download", _download(plan)),
    ]  # fmt: skip


def duration(seconds: float) -> str:
    """Return seconds as a rounded time, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes, such as ``2.1 MB`` or ``35 GB``."""
    unit = next((unit for unit in (1e9, 1e6) if count >= unit), 1e3)
    value = count / unit
    return f"{value:.0f} " * (value >= 10) + f"{value:.1f} " * (value < 10) + {1e9: "GB", 1e6: "MB", 1e3: "kB"}[unit]


def _rounds(plan: Plan) -> str:
    later = [number for number in plan.rounds if number]
    if not plan.rounds:
        return "no round to do"
    base = "the base (only evaluated), then " if 0 in plan.rounds else ""
    return f"{base}{f'round {later[0]}' if len(later) == 1 else f'rounds {later[0]} to {later[-1]}'}"


def _counts(plan: Plan) -> str:
    work = plan.work
    imported = f"{work.imported:,} groups of a data set, " if work.imported else ""
    return (f"{imported}{work.images:,} images, up to {work.pairs:,} pairs, up to {work.updates:,} updates, "
            f"{work.held_out_images:,} held-out images per round")  # fmt: skip


def _sizes(plan: Plan) -> str:
    native = "the model's native size"
    sampled, held_out = [in_words(size) if size else native for size in plan.sizes], plan.held_out_size
    drawn = f"{' or '.join(sampled)} pixels (height x width)" if plan.sizes[0] else sampled[0]
    other = "" if plan.sizes == [held_out] else f"; held-out {in_words(held_out) if held_out else native}"
    return f"{drawn}{', drawn per group' if len(sampled) > 1 else ''}{other}"


def _time(plan: Plan) -> str:
    timing, per_round, whole = plan.timing, plan.timing.seconds, plan.seconds
    if per_round is None or whole is None:
        return f"unknown: {timing.source}"
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in timing.stages.items())
    once = f", about {duration(timing.once)} once to compile" if timing.once else ""
    left_out = ["start-up", *(["people's time"] if "label" in plan.work.stages else [])]
    slow = [name for name in plan.scorers if name not in BUILT_IN]
    left_out += [f"judging by {', '.join(slow)}"] if slow and "judge" not in timing.stages else []
    whole_run = f"about {duration(whole)} in all, without {' and '.join(left_out)}"
    return f"{whole_run}: {duration(per_round)} per round ({stages}){once}; {timing.source}"


def _memory(plan: Plan) -> str:
    if plan.peak_gb is None:
        return "no measurement of such a model in such a mode" if plan.gpu else "none, the model runs on the CPU"
    if plan.gpu and plan.peak_gb * 1e9 <= plan.gpu.total_bytes:
        return f"peak {plan.peak_gb:g} GB when measured"
    if plan.gpu is None:
        return f"peak {plan.peak_gb:g} GB when measured; there is no GPU here"
    return (f"peak {plan.peak_gb:g} GB when measured, and this GPU has {size(plan.gpu.total_bytes)}: batches that do "
            "not fit are halved; model.memory saves more")  # fmt: skip


def _machine(plan: Plan) -> str:
    if plan.gpu is None:
        return f"the CPU, {plan.cores} cores"
    return f"{plan.gpu.name}, {size(plan.gpu.total_bytes)}"


def _disk(plan: Plan) -> str:
    return f"{path_from_here(Path(plan.folder))}: up to {size(plan.disk_bytes)} per round, {size(plan.free_bytes)} free"


def _download(plan: Plan) -> str:
    sizes = {name: "size unknown" if count is None else size(count) for name, count in plan.downloads.items()}
    return ", ".join(f"{name} ({told})" for name, told in sizes.items()) or "nothing"
