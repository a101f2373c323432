"""A campaign's configuration: frozen, validated, and saved with the campaign."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from d3po_core.paths import data_folder, resolve_path
from d3po_core.sizes import Size, given
from d3po_core.urls import schema_pattern
from d3po_core.ways import Mode


def _expect_names(field: str, names: Iterable[str], expected: Iterable[str], what: str) -> None:
    unknown = [name for name in names if name not in expected]
    if unknown:
        expected = ", ".join(dict.fromkeys(expected))
        raise ValueError(f"{field} names {', '.join(map(repr, unknown))}; expected one of {what}: {expected}")


def _listed(value: Any) -> Any:
    """Names typed as one text, separated by commas, as a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """Sizes, each of two numbers."""
    if isinstance(value, list | tuple) and all(isinstance(size, list | tuple) and len(size) == 2 for size in value):
        return value
    raise ValueError(f"sample.sizes is {value!r}; write pairs of height and width, such as [[512, 768], [768, 512]]")


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
MomentDecay = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=8, le=8192)]
Sizes = Annotated[tuple[tuple[Side, Side], ...], BeforeValidator(_pairs)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The diffusion model to align, and which of its weights to train."""

    path: str = Field("data/shapes/model", description="Hub id or folder of a diffusers pipeline")
    revision: str | None = Field(None, description="Revision on the hub; ignored for a folder")
    variant: str | None = Field(None, description="Variant of the model's files, such as fp16")
    single_file_config: str | None = Field(
        None, description="If path is a single .safetensors file: hub id or folder of its configuration"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="What a UNet predicts; read from its files by default. Set it if they do not say or disagree"
    )
    zero_terminal_snr: bool | None = Field(
        None, description="Whether a UNet's last timestep is pure noise; read from its files by default"
    )
    start_from: str | None = Field(
        None, description="LoRA to go on from: hub id, folder or .safetensors file; of another program too"
    )
    start_as: Literal["continue", "merge"] = Field(
        "continue", description="Go on training that LoRA, or merge it into the base model first"
    )
    train: Literal["lora", "full"] = Field(
        "lora", description="Train a LoRA, or all weights of the network (with a far lower train.learning_rate)"
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA")
    lora_alpha: float | None = Field(None, gt=0, le=65536, description="LoRA scale numerator; the rank by default")
    lora_targets: Names = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="Layers of the network that get a LoRA"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device that the model runs on")
    precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Half precision in the network's passes; trained weights and log_probs stay in single"
    )
    memory: Literal["auto", "fast", "balanced", "medium", "small"] = Field(
        "fast",
        description="fast: all on the GPU; balanced: idle parts moved off it; medium, small: also recompute, few rows; "
        "auto: measure the GPU and take what fits",
    )
    compile: bool = Field(False, description="Compile the network's blocks: slower start, faster passes on a GPU")

    @model_validator(mode="after")
    def _start_is_clear(self) -> Self:
        if self.start_as == "merge" and not self.start_from:
            raise ValueError("model.start_as is 'merge' and model.start_from names no LoRA to merge; name one")
        if self.start_from and self.train == "full" and self.start_as == "continue":
            raise ValueError("model.train is 'full', which trains no LoRA to continue; set model.start_as to 'merge'")
        return self


class ComputeConfig(_Section):
    """The processes that sample, train and evaluate, and where they run."""

    processes: int = Field(1, ge=1, le=1024, description="Processes that sample, train and evaluate, one per GPU")
    address: str | None = Field(
        None, description="Ray cluster: auto, or the head's host:port; by default Ray is private to this machine"
    )
    min_processes: int = Field(1, ge=1, le=1024, description="Fewest processes that training goes on with after a loss")
    start_seconds: float = Field(300.0, gt=0, le=1e6, description="Longest wait for the processes to start")
    hang_seconds: float = Field(
        3600.0, gt=0, le=1e6, description="Silence after which a process counts as hanging; longer than any compilation"
    )


class SampleConfig(_Section):
    """How a round's images are made."""

    prompts: str = Field("data/prompts/shapes_train.txt", description="Text, CSV or Parquet file of prompts")
    prompt_column: str = Field("prompt", description="Column that holds the prompts of a CSV or Parquet file")
    groups_per_round: int = Field(
        16, ge=1, le=1_000_000, description="Prompts drawn per round; each gives one group of images"
    )
    group_size: int = Field(8, ge=2, le=64, description="Images per group, all of one prompt")
    share_initial_latent: bool = Field(True, description="Start all images of a group from the same initial latent x_T")
    num_steps: int = Field(10, ge=2, le=1000, description="Denoising steps T")
    guidance_scale: float = Field(1.0, ge=1.0, le=50, description="Classifier-free guidance; 1 turns it off")
    eta: float = Field(
        1.0, ge=1e-3, le=1, description="Noise per step: DDIM's eta, or a flow's noise level, which has its own default"
    )
    batch_size: int = Field(64, ge=1, le=65536, description="Images per pass through the network")
    latent_dtype: Literal["float32", "float16"] = Field("float32", description="Number format of stored trajectories")
    height: Side | None = Field(
        None, description="Height of the images in pixels, set with width; the network's native size by default"
    )
    width: Side | None = Field(None, description="Width of the images in pixels, set with height")
    sizes: Sizes = Field(
        (), description="Several sizes instead, such as [[512, 768], [768, 512]] (height, width); each group draws one"
    )
    negative_prompt: str = Field(
        "", max_length=8000, description="What guidance leads away from; needs guidance by two passes. Empty by default"
    )
    long_prompts: Literal["error", "truncate", "chunk"] = Field(
        "truncate",
        description="Prompts longer than a text encoder reads: error: stop before the round; truncate: warn, the rest "
        "is not read; chunk: read them window by window (Stable Diffusion 1, 2 and XL)",
    )
    dataset: str | None = Field(
        None, description="Name or folder of a data set (d3po import-dataset) that groups come from; sampled by default"
    )
    dataset_share: float = Field(
        1.0, gt=0, le=1, description="With dataset: share of a round's groups that come from it; the rest are sampled"
    )

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if given(self.height, self.width, "sample") and self.sizes:
            raise ValueError("sample.sizes is set, and so are sample.height and sample.width; set one or the other")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError("sample.sizes names a size twice; expected each once")
        return self

    @model_validator(mode="after")
    def _negative_prompt_is_used(self) -> Self:
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                "sample.negative_prompt is set and sample.guidance_scale is 1, which turns guidance off; raise the "
                "scale, or leave the negative prompt out"
            )
        return self

    @model_validator(mode="after")
    def _share_is_used(self) -> Self:
        if self.dataset is None and self.dataset_share != 1:
            raise ValueError(
                f"sample.dataset_share is {self.dataset_share} but sample.dataset is not set; name a data set, or "
                "leave the share out"
            )
        return self

    @property
    def image_sizes(self) -> tuple[Size | None, ...]:
        """Return the sizes of which each group has one; None is the network's native size."""
        return self.sizes or (given(self.height, self.width, "sample"),)

    @property
    def imported_groups(self) -> int:
        """Return the number of groups that a round draws from the data set."""
        return max(1, round(self.dataset_share * self.groups_per_round)) if self.dataset else 0

    @property
    def sampled_groups(self) -> int:
        """Return the number of groups that a round samples."""
        return self.groups_per_round - self.imported_groups

    @property
    def images_per_round(self) -> int:
        """Return the number of images sampled for training per round."""
        return self.sampled_groups * self.group_size


class PeopleConfig(_Section):
    """How people judge a round, and how long the run waits for them."""

    mode: Mode = Field(
        "mark_bad", description="What a rater does: compare two images, mark the bad, pick the best or rank a group"
    )
    guideline: str = Field(
        "Which images show what the prompt says?",
        max_length=8000,
        description="What raters should look for, in Markdown; an image is ![text](r1-g0-m2) or a file of the "
        "campaign's folder. If unset, each mode asks its own question",
    )
    blur_reported: bool = Field(
        True, description="Blur images that another rater reported as unsafe or broken until they are clicked"
    )
    combine: Literal["majority", "dawid_skene", "bradley_terry"] = Field(
        "majority", description="How votes of several raters on a pair become one weighted preference"
    )
    raters_per_group: int = Field(1, ge=1, le=100, description="Raters needed before a group counts as done")
    enough: float = Field(
        1.0, gt=0, le=1, description="Share of the groups for people that must be done before the round continues"
    )
    share: float = Field(
        0.25, gt=0, le=1, description="With labeller 'mixed': share of groups that people judge, the least certain ones"
    )
    accuracy_floor: float = Field(
        0.6, ge=0, le=1, description="Leave out raters whose share of right gold answers is surely lower"
    )
    deadline_hours: float | None = Field(
        None, gt=0, le=100_000, description="Longest wait for people; no limit by default"
    )
    after_deadline: Literal["go_on", "proxy", "fail"] = Field(
        "go_on", description="At the deadline: go on with the judgements so far, let proxies judge the rest, or fail"
    )


class JudgeConfig(_Section):
    """Who judges, and how judgements become preferences."""

    labeller: Literal["proxy", "human", "mixed"] = Field(
        "proxy", description="Proxy scorers, people, or both: people judge the groups that proxies are least sure of"
    )
    scorers: Names = Field(
        ("prompt_alignment",), min_length=1, description="Scorer names (docs/scorers.md), or package.module:function"
    )
    combine: Literal["pareto", "majority", "weighted"] = Field(
        "pareto",
        description="How several scorers pick a winner. pareto: some for it, none against; majority: more for than "
        "against; weighted: the higher weighted sum of standardised scores",
    )
    scorer_weights: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        {}, description="With combine 'weighted': weight per scorer; 1 by default"
    )
    pairs: Literal["all", "best_worst"] = Field("all", description="Which pairs of a group to use")
    rewards: Literal["auto", "scores", "win_rate", "bradley_terry"] = Field(
        "auto",
        description="Where objectives without pairs take an image's number from: its scores, its share of won pairs or "
        "its Bradley-Terry strength. auto: win rate where people decide, scores elsewhere",
    )
    people: PeopleConfig = PeopleConfig()

    @model_validator(mode="after")
    def _weights_are_used(self) -> Self:
        if self.scorer_weights and self.combine != "weighted":
            raise ValueError(
                f"judge.scorer_weights is {self.scorer_weights} but judge.combine is {self.combine!r}; "
                "set judge.combine to 'weighted', or leave the weights out"
            )
        _expect_names("judge.scorer_weights", self.scorer_weights, self.scorers, "judge.scorers")
        return self


class ScoringConfig(_Section):
    """Locations of learned and remote scorers, and how to call them."""

    models: dict[str, str] = Field(
        {},
        description="Scorer name -> hub id or folder of its weights, or http(s) URL of a scoring server",
        # Only in the schema: earlier versions' configurations stay readable, and load_scorer refuses inline secrets.
        json_schema_extra={"additionalProperties": {"type": "string", "pattern": schema_pattern()}},
    )
    batch_size: int = Field(32, ge=1, le=4096, description="Images per call of a scorer")
    gpus: int = Field(
        0, ge=0, le=1024, description="Processes, one per GPU, that run learned scorers while others sample (needs Ray)"
    )
    while_sampling: bool = Field(
        True, description="Score images while others are sampled: by servers and, with a GPU, by built-in scorers"
    )
    timeout_seconds: float = Field(60.0, gt=0, le=3600, description="Time limit of a server for one batch")
    tries: int = Field(5, ge=1, le=100, description="Number of tries if a server is down or busy; pauses grow")

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        for name in self.models:
            # A scorer's name is also a rater's name in SQL and a metric's in MLflow.
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", name):
                raise ValueError(
                    f"scoring.models names {name!r}; expected up to 64 letters, digits, '_', '-' or '.', starting with "
                    "a letter"
                )
        return self


# For log_probs that are sums (arXiv 2311.13231, Section 5; DPO for language models uses the same value).
PAPERS_BETA = 0.1


class TrainConfig(_Section):
    """How the policy learns from preferences."""

    objective: str = Field("d3po", description="What is learned; d3po: Eq. 14. All: docs/explanation/objectives.md")
    settings: dict[str, bool | int | float | str] = Field(
        {}, description="Settings of another objective than d3po, by name, such as {beta: 5000}"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="AdamW, or AdamW with 8-bit moments: a quarter of their memory (extra adam8bit)"
    )
    learning_rate: float = Field(2e-3, ge=1e-12, le=1, description="AdamW learning rate")
    weight_decay: float = Field(1e-4, ge=0, le=10, description="AdamW weight decay")
    adam_betas: tuple[MomentDecay, MomentDecay] = Field((0.9, 0.999), description="AdamW moment decays")
    adam_eps: float = Field(1e-8, ge=1e-30, le=1, description="AdamW's eps; weights with smaller gradients hardly move")
    max_grad_norm: float = Field(1.0, gt=0, le=1e12, description="Clip gradients to this global norm")
    beta: float = Field(
        300.0,
        gt=0,
        le=1e12,
        description="Inverse temperature of Eq. 14; with log_prob 'mean' it is the paper's beta x C*H*W. "
        "Default: 300 with 'mean'; 0.1, as in the paper, with 'sum'",
    )
    reference: Literal["round_start", "base"] = Field(
        "round_start", description="Reference policy: the round's sampler (Section 5.2) or the base (Algorithm 1)"
    )
    clip: Literal["one_sided", "two_sided", "none"] = Field(
        "none", description="Clamp of the policy ratio; one_sided clamps only a winner's rise and a loser's fall"
    )
    clip_range: float = Field(0.1, gt=0, lt=1, description="Clamp the ratio to 1 -/+ this")
    log_prob: Literal["mean", "sum"] = Field("mean", description="How log_prob is reduced over C, H, W")
    timestep_weighting: Literal["equal_gradient", "none"] = Field(
        "equal_gradient", description="Scale steps so that each moves the noise prediction equally"
    )
    updates_per_round: int | Literal["one_per_group"] = Field(
        4, description="Optimizer steps per round, or one per group that has a pair"
    )
    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the round's images")
    steps_per_image: int | None = Field(
        None, ge=1, le=1000, description="Denoising steps per image and pass, drawn at random; all by default"
    )
    micro_batch: int = Field(64, ge=1, le=65536, description="Image-steps per pass through the network")
    carry_optimizer: bool = Field(True, description="Keep AdamW's moments from round to round")
    save_every_seconds: float = Field(60.0, ge=0, le=1e9, description="Seconds between saves of a running round")
    measured_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the steps to replay after training, to measure what the round's pairs taught; 0: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _beta_fits_log_prob(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("log_prob") == "sum" and "beta" not in values:
            return {**values, "beta": PAPERS_BETA}
        return values

    @model_validator(mode="after")
    def _updates_fill_epochs(self) -> Self:
        updates = self.updates_per_round
        if isinstance(updates, int) and (updates < 1 or updates % self.epochs):
            raise ValueError(
                f"updates_per_round is {updates} and epochs is {self.epochs}; expected a positive multiple of epochs"
            )
        return self


class EvaluateConfig(_Section):
    """Fixed held-out prompts and seeds on which all checkpoints are compared."""

    prompts: str = Field("data/prompts/shapes_eval.txt", description="Text, CSV or Parquet file of held-out prompts")
    prompt_column: str = Field("prompt", description="Column that holds the prompts of a CSV or Parquet file")
    images_per_prompt: int = Field(8, ge=1, le=10_000, description="Fixed seeds per prompt")
    max_prompts: int = Field(64, ge=1, le=1_000_000, description="Held-out prompts to use, from the start of the file")
    scorers: Names = Field((), description="Scorers for evaluation; the judge's by default")
    unseen: Names = Field((), description="Scorers that training never sees; they show what the judge misses")
    drift_images: int = Field(
        32, ge=0, le=1_000_000, description="Held-out images used to measure the drift from the base"
    )
    grid_prompts: int = Field(6, ge=1, le=32, description="Prompts in the image grid")
    height: Side | None = Field(
        None,
        description="Height of the held-out images in pixels, set with width; as sampled by default, or the network's "
        "native size if sample.sizes has several",
    )
    width: Side | None = Field(None, description="Width of the held-out images in pixels, set with height")

    @model_validator(mode="after")
    def _size_is_whole(self) -> Self:
        given(self.height, self.width, "evaluate")
        return self


class GuardConfig(_Section):
    """When not to trust a round's checkpoint, and what to do then."""

    policy: Literal["warn", "reject", "stop"] = Field(
        "warn", description="Only warn, start the next round from the champion again, or stop the campaign"
    )
    score_tolerance: float = Field(0.0, ge=0, description="Tolerated fall of the held-out score, in score units")
    min_diversity: float = Field(
        0.5, ge=0, le=1, description="Least allowed diversity within a prompt, as a share of the base model's"
    )
    max_drift: float | None = Field(
        None,
        gt=0,
        description="Largest allowed KL from the base over a trajectory, in nats per element; no limit by default",
    )
    max_clip_fraction: float = Field(0.9, gt=0, le=1, description="Largest allowed share of pairs with a clipped ratio")


class StoreConfig(_Section):
    """A second home for the campaign: object storage from which another machine can go on."""

    mirror: str | None = Field(
        None,
        description="Address of the mirror: s3://BUCKET/PREFIX, gs://..., az://... or file:///FOLDER (extra mirror)",
    )
    mirror_images: bool = Field(False, description="Put images in the mirror too")
    mirror_trajectories: bool = Field(False, description="Put trajectories in the mirror too; they are large")
    lease_seconds: float = Field(
        120.0, ge=1, le=86_400, description="Another machine may take the campaign over this long after the last sign"
    )
    timeout_seconds: float = Field(10.0, gt=0, le=600, description="Time limit of one request to the mirror")


class CampaignConfig(_Section):
    """All settings of a campaign."""

    campaign: str = Field("shapes", description="Name of the campaign and of its folder in runs_dir")
    runs_dir: str | None = Field(None, description="Folder of the campaigns; runs in the data folder by default")
    accept_changes: bool = Field(
        False, description="Go on even if a file of the model or of a scorer changed since the campaign began"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all randomness in the campaign")
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    sample: SampleConfig = SampleConfig()
    judge: JudgeConfig = JudgeConfig()
    scoring: ScoringConfig = ScoringConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guard: GuardConfig = GuardConfig()
    store: StoreConfig = StoreConfig()

    # On a worker: the campaign's folder there, and the digest of the run's own configuration.
    _elsewhere: tuple[Path, str] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.campaign):
            raise ValueError(
                f"campaign is {self.campaign!r}; expected up to 64 letters, digits, '_', '-' or '.', "
                "starting with a letter or digit, since it names a folder"
            )
        used = (*self.judge.scorers, *self.evaluation_scorers)
        _expect_names("scoring.models", self.scoring.models, used, "the scorers that judge or evaluate")
        return self

    @property
    def folder(self) -> Path:
        """Return the campaign's folder."""
        if self._elsewhere:
            return self._elsewhere[0]
        runs = resolve_path(self.runs_dir) if self.runs_dir else data_folder() / "runs"
        return runs / self.campaign

    @property
    def evaluation_scorers(self) -> tuple[str, ...]:
        """Return the scorers of the held-out images; rounds report the first."""
        return tuple(dict.fromkeys([*(self.evaluate.scorers or self.judge.scorers), *self.evaluate.unseen]))

    @property
    def held_out_size(self) -> Size | None:
        """Return the size of the held-out images; None is the network's native size."""
        sampled = self.sample.image_sizes
        own = given(self.evaluate.height, self.evaluate.width, "evaluate")
        return own or (sampled[0] if len(sampled) == 1 else None)

    def sha256(self) -> str:
        """Return the digest of the resolved configuration, the same for equal configurations."""
        if self._elsewhere:
            return self._elsewhere[1]
        values = self.model_dump(mode="json")
        for section, names in LATER_FIELDS.items():
            unset = getattr(CampaignConfig(), section).model_dump(mode="json")
            values[section] = {k: v for k, v in values[section].items() if k not in names or v != unset[k]}
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def on_worker(self, folder: Path, sha256: str) -> Self:
        """Return this configuration for a worker, with the campaign's folder there and the run's digest."""
        there = self.model_copy()
        there._elsewhere = folder, sha256
        return there


# Fields that decide what a campaign's numbers mean: rounds are comparable only while these stay unchanged.
FIXED_FIELDS = (
    "seed", "model.path", "model.revision", "model.variant", "model.single_file_config", "model.prediction_type",
    "model.zero_terminal_snr", "model.start", "model.train", "model.lora", "evaluate", "sample.num_steps",
    "sample.guidance_scale", "sample.eta", "sample.height", "sample.width", "sample.sizes", "sample.negative_prompt",
    "sample.long_prompts",
)  # fmt: skip

# Fields that came later, by section: while they have their defaults, a configuration keeps the digest it had before.
LATER_FIELDS = {
    "model": ("start_from", "start_as"),
    "sample": ("height", "width", "sizes", "negative_prompt", "long_prompts", "dataset", "dataset_share"),
    "evaluate": ("height", "width"),
}  # fmt: skip

# Fields whose relative values start at the project folder; so do those of scoring.models.
PATH_FIELDS = (
    "model.path", "model.single_file_config", "model.start_from", "sample.prompts", "evaluate.prompts", "runs_dir",
)  # fmt: skip

# Fields that may change even within a round, since they change no number beyond rounding.
FREE_FIELDS = (
    "accept_changes",
    "compute.processes", "compute.address", "compute.min_processes", "compute.start_seconds", "compute.hang_seconds",
    "scoring.gpus",
    "train.save_every_seconds", "scoring.batch_size", "scoring.while_sampling", "scoring.timeout_seconds",
    "scoring.tries",
    "store.mirror", "store.mirror_images", "store.mirror_trajectories", "store.lease_seconds", "store.timeout_seconds",
)  # fmt: skip

# The published code's choices, except its learning rate, 3e-5 for Stable Diffusion, which depends on the model.
PUBLISHED: dict[str, Any] = {
    "sample": {"group_size": 2},
    "judge": {"pairs": "all"},
    "train": {
        "beta": 0.1,
        "reference": "base",
        "clip": "two_sided",
        "clip_range": 0.1,
        "log_prob": "mean",
        "timestep_weighting": "none",
        "updates_per_round": "one_per_group",
    },
}


def is_url(where: str) -> bool:
    """Return whether a scorer's place is a server rather than weights."""
    return where.startswith(("http://", "https://"))
