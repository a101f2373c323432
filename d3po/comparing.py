"""Checkpoints side by side as a DataFrame."""

from pathlib import Path
from typing import TYPE_CHECKING

from d3po_core.errors import D3POError

if TYPE_CHECKING:
    import pandas as pd


def comparison_table(campaign: Path, rounds: list[int]) -> "pd.DataFrame":
    """Return one row per scorer and round; differences and win rates are against the first round.

    Raises:
        D3POError: fewer than two rounds, or they share no held-out image.
    """
    import pandas as pd

    from d3po_core.evaluation.comparison import compare_scores, read_held_out
    from d3po_core.intervals import score_intervals

    if len(rounds) < 2:
        raise D3POError(f"compare: only round {rounds[0]} was named; name two or more, such as 'base' and 'latest'")
    held_out = read_held_out([(campaign, number) for number in rounds])
    rows = []
    for scorer, score_RI in held_out.scores.items():
        means = score_intervals(score_RI, held_out.prompts)
        for number, score_I, mean in zip(rounds, score_RI, means, strict=True):
            row = {"scorer": scorer, "round": number, "score": mean.mean, "low": mean.low, "high": mean.high}
            if number != rounds[0]:
                found = compare_scores(score_I, score_RI[0], held_out.prompts)
                for name, value in (("difference", found.difference), ("win_rate", found.win_rate)):
                    row |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
                row["verdict"] = found.verdict
            rows.append(row)
    return pd.DataFrame(rows).set_index(["scorer", "round"])
