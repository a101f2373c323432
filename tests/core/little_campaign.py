"""A campaign's folder written by hand: tiny images, known scores, no model."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.images import save_png
from d3po_core.store.stages import checkpoint_path, stage_path
from d3po_core.store.tables import SCHEMAS, partition, table_from_rows, write_table

NOON = datetime(2026, 5, 1, 12)
SCORER = "brightness"


@dataclass
class LittleCampaign:
    """Rounds are added in order; scores of a round are ``[prompts, seeds]`` for each scorer."""

    folder: Path
    prompts: list[str]
    seeds: int = 2
    size: int = 8
    first_seed: int = 100
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = CampaignConfig(campaign=self.folder.name).model_dump(mode="json") | self.config
        self.folder.mkdir(parents=True)
        (self.folder / CAMPAIGN_FILE).write_text(json.dumps({"id": "0" * 32, "config": self.config}))

    def add_round(
        self,
        number: int,
        scores: np.ndarray | dict[str, np.ndarray],
        pairs: int = 1,
        images: bool = True,
        **columns: Any,
    ) -> None:
        """Evaluate, and from round 1 on sample, judge, pair and train; ``columns`` change the row of ``rounds``."""
        by_scorer = scores if isinstance(scores, dict) else {SCORER: scores}
        drawn = np.random.default_rng(number)
        evaluated = []
        for scorer, values in by_scorer.items():
            for index, score in enumerate(np.ravel(values)):
                sample = f"r{number}-e{index}"
                path = f"images/round={number}/{sample}.png"
                evaluated.append(
                    {"sample_id": sample, "prompt": self.prompts[index // self.seeds],
                     "seed": self.first_seed + index, "scorer": scorer, "score": float(score), "image_path": path,
                     "checkpoint": checkpoint_path(number)}
                )  # fmt: skip
                if images:
                    save_png(drawn.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8), self.folder / path)
        self.write("evaluations", number, evaluated)
        if number:
            self._train(number, pairs, drawn)
        config = stage_path(self.folder, number, "config")
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps(self.config))
        self.write("rounds", number, [self._round(number, by_scorer, pairs) | columns])

    def write(self, table: str, number: int, rows: list[dict[str, Any]], name: str = "part") -> None:
        write_table(self.folder, table, number, table_from_rows(table, rows), name)

    def judge(self, number: int, rater: str, kind: str, values: dict[str, float], rater_kind: str = "human") -> None:
        """One judgement an image, under the rater's name."""
        rows = [
            {"rater": rater, "rater_kind": rater_kind, "kind": kind, "sample_id": sample, "other_id": None,
             "value": value, "judged_at": NOON, "source": "test", "seconds": 2.0, "position": None}
            for sample, value in values.items()
        ]  # fmt: skip
        others = len(list(partition(self.folder, "judgements", number).glob("*.parquet")))
        self.write("judgements", number, rows, name=f"{rater_kind}-{others}")

    def _train(self, number: int, pairs: int, drawn: np.random.Generator) -> None:
        """Groups of two images; in ``pairs`` of them the first member scores 1 and wins, in one more both score 0."""
        samples, preferences, values = [], [], {}
        for group in range(pairs + 1):
            ids = [f"r{number}-g{group}-m{member}" for member in (0, 1)]
            for member, sample in enumerate(ids):
                path = f"images/round={number}/{sample}.png"
                save_png(drawn.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8), self.folder / path)
                samples.append(
                    {"sample_id": sample, "group_id": f"r{number}-g{group}", "member": member,
                     "prompt": self.prompts[group % len(self.prompts)], "split": "train", "seed": member,
                     "image_path": path, "trajectory_path": "t", "trajectory_row": 0,
                     "checkpoint": checkpoint_path(number - 1)}
                )  # fmt: skip
                values[sample] = float(group < pairs and member == 0)
            preferences.append(
                {"pair_id": f"r{number}-g{group}-0>1", "group_id": f"r{number}-g{group}", "winner_id": ids[0],
                 "loser_id": ids[1], "weight": 1.0, "num_raters": 1, "agreement": 1.0}
            )  # fmt: skip
        self.write("samples", number, samples)
        self.write("preferences", number, preferences[:pairs])
        self.judge(number, SCORER, "score", values, rater_kind="proxy")
        update = dict.fromkeys(SCHEMAS["updates"].names, 0.1) | {"finished_at": NOON}
        self.write("updates", number, [update | {"update": 0, "epoch": 0, "num_pairs": pairs, "num_units": pairs}])

    def _round(self, number: int, by_scorer: dict[str, np.ndarray], pairs: int) -> dict[str, Any]:
        scorer, values = next(iter(by_scorer.items()))
        mean = float(np.mean(values))
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["rounds"].names)
        row |= {name: 0.5 for name in row if name.endswith("_seconds")}
        return row | {
            "checkpoint_in": checkpoint_path(max(number - 1, 0)), "checkpoint_out": checkpoint_path(number),
            "lora_sha256": f"{number:064x}" if number else None, "num_samples": 2 * (pairs + 1) if number else 0,
            "num_pairs": pairs if number else 0, "num_ties": 1 if number else 0, "eval_scorer": scorer,
            "eval_score_mean": mean, "eval_score_low": mean, "eval_score_high": mean, "config_sha256": "c" * 64,
            "git_commit": "a1" * 20, "mlflow_run_id": f"{number:032x}", "finished_at": NOON,
            "loss_mean": 0.7 if number and pairs else None, "clip_fraction": 0.0 if number and pairs else None,
            "kl_after": 0.1 if number and pairs else None,
        }  # fmt: skip
