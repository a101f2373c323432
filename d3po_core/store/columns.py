"""What a row and a column of every table and view mean, in words; the site's reference is made of it."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One row of a reference table: its section and name, further cells, and what it means."""

    section: str
    name: str
    cells: tuple[str, ...]
    text: str


# The same column means the same wherever it stands.
SHARED = {
    "round": "the round, 0 for the base model; it comes from the folder's name",
    "sample_id": "the image: r3-g4-m1 is round 3, group 4, member 1; r3-e17 is held out",
    "group_id": "the group: images of one prompt in one round",
    "pair_id": "the pair",
    "winner_id": "the chosen image",
    "loser_id": "the rejected image",
    "prompt": "the prompt as it was given to the model",
    "seed": "the seed of the image's noise",
    "image_path": "the image's file, relative to the campaign's folder",
    "checkpoint": "the checkpoint, relative to the campaign's folder; null for the base model",
    "rater": "who judged: a person's name, or a scorer's",
    "rater_kind": "proxy, human, or gold for known answers",
    "judged_at": "when, UTC",
    "finished_at": "when it was finished, UTC",
    "position": "where the image stood on the page; 0 is first or left",
    "scorer": "the scorer's name",
    "score": "the score; higher is better",
    "weight": "weight of the pair in the loss, above 0 and at most 1",
    "num_raters": "raters whose votes decided the pair",
    "agreement": "how much the raters agree on the pair, above 0 and at most 1",
    "update": "number of the optimizer update within the round",
    "num_pairs": "pairs to train on",
    "margin_before": "mean log-ratio in favour of the winner before the update, nats per element",
    "pair_accuracy_before": "share of pairs and steps moved towards the winner before the update",
    "kl_before": "KL from the round's sampler before the update, nats per element and step",
    "clip_fraction": "share of pairs whose ratio was clipped",
    "drowned": "share of the trained weights whose gradient is below train.adam_eps",
    "mlflow_run_id": "the round's MLflow run",
    "config_sha256": "digest of the configuration",
    "git_commit": "commit of the code; null outside a git clone",
    "against": "the round compared with, 0 for the base",
    "against_id": "the reference's image of the same prompt and seed",
}
# Table or view -> what a row is, and the columns that are its own or mean something more here.
MEANINGS: dict[str, tuple[str, dict[str, str]]] = {
    "samples": ("an image of a round", {
        "member": "the image's place in its group, from 0",
        "split": "train or eval",
        "trajectory_path": "the file that holds the image's latents, relative to the campaign's folder",
        "trajectory_row": "the image's row in that file",
        "checkpoint": "the checkpoint that drew the image; null for the base model",
    }),
    "groups": ("a group of a round", {"dissimilarity": "how unlike its images are"}),
    "judgements": ("one thing that a rater said", {
        "kind": "score, rating, choice or rank",
        "other_id": "the second image of a choice; null otherwise",
        "value": "the score, rating or rank; for a choice, above 0 for the first image and below for the other; "
        "null for a skip or an answer taken back",
        "source": "where it comes from: a scorer, the page or an imported file",
        "seconds": "how long the answer took; null when not known",
    }),
    "preferences": ("a pair to train on", {}),
    "updates": ("an optimizer update", {
        "epoch": "pass over the round's images",
        "num_pairs": "pairs that the update saw",
        "loss": "loss of its pairs before the update",
        "grad_norm": "global norm of the gradients before clipping",
        "seconds": "how long the update took",
    }),
    "update_steps": ("an update at one denoising step", {
        "step": "index of the denoising step, from 0",
        "timestep": "the model's timestep at that step",
    }),
    "evaluations": ("a held-out image and one score", {"checkpoint": "the checkpoint that drew it; null for the base"}),
    "comparisons": ("one thing a rater said of a held-out image beside a reference's, seen blind", {
        "comparison": "the comparison that asked",
        "value": "above 0 for the round's image, below for the reference's, 0 for a tie; null for a skip",
        "seconds": "how long the answer took; null when not known",
    }),
    "rounds": ("a finished round", {
        "checkpoint_in": "the checkpoint that sampled the round; null for the base",
        "checkpoint_out": "the checkpoint that the round made; null in round 0",
        "lora_sha256": "digest of the trained weights' file, a LoRA or the whole network",
        "num_samples": "images sampled for training",
        "num_ties": "pairs of images that nobody won",
        "eval_scorer": "the scorer of the held-out score",
        "eval_score_mean": "held-out score: mean over prompts",
        "eval_score_low": "lower end of its 95 % interval",
        "eval_score_high": "upper end of its 95 % interval",
        "loss_mean": "mean loss of the round's updates",
        "sample_seconds": "seconds of sampling, all attempts together",
        "judge_seconds": "seconds of judging by scorers",
        "derive_seconds": "seconds of turning judgements into pairs",
        "train_seconds": "seconds of training",
        "evaluate_seconds": "seconds of evaluation",
        "publish_seconds": "seconds of publishing",
        "label_seconds": "seconds of waiting for people; null when none judged",
        "diversity": "how unlike held-out images of one prompt are",
        "drift": "KL from the base over a trajectory, nats per element",
        "win_rate_base": "share of held-out images better than the base's",
        "win_rate_base_low": "lower end of its 95 % interval",
        "win_rate_base_high": "upper end of its 95 % interval",
        "win_rate_before": "share better than those of the round it started from",
        "win_rate_before_low": "lower end of its 95 % interval",
        "win_rate_before_high": "upper end of its 95 % interval",
        "win_rate_champion": "share better than the champion's",
        "win_rate_champion_low": "lower end of its 95 % interval",
        "win_rate_champion_high": "upper end of its 95 % interval",
        "champion": "the champion's round after this one",
        "verdict": "what the guard decided",
        "findings": "what the guard found",
        "pair_accuracy_after": "share of pairs and steps moved towards the winner after the last update",
        "margin_after": "mean log-ratio in favour of the winner after the last update, nats per element",
        "kl_after": "KL from the round's sampler after the last update, nats per element and step",
    }),
    "pairs": ("a preference with all that is known of it", {
        "checkpoint": "the checkpoint that drew both images; null for the base",
        "winner_image": "the chosen image's file",
        "loser_image": "the rejected image's file",
        "winner_scores": "map from scorer to the winner's score",
        "loser_scores": "map from scorer to the loser's score",
        "proxies_for": "scorers for the winner",
        "proxies_against": "scorers for the loser",
        "proxies_tied": "scorers that tie",
        "people_for": "people for the winner",
        "people_against": "people for the loser",
        "people_tied": "people who tie",
    }),
    "votes": ("what a rater's last word says of two images of a group", {
        "first_id": "the first image",
        "second_id": "the second image",
        "first_member": "the first image's place in the group",
        "second_member": "the second image's place in the group",
        "vote": "1 for the first image, -1 for the second, 0 for a tie",
    }),
    "raters": ("a rater in a round", {
        "num_judgements": "questions answered",
        "num_skipped": "questions skipped",
        "num_taken_back": "answers taken back",
        "num_groups": "groups judged",
        "num_votes": "votes on pairs",
        "num_ties": "votes that are ties",
        "votes_kept": "votes that a preference followed",
        "votes_lost": "votes that a preference went against",
        "seconds": "seconds spent in all",
        "median_seconds": "median seconds per answer",
        "first_at": "first answer, UTC",
        "last_at": "last answer, UTC",
    }),
    "checkpoints": ("a finished round's checkpoint", {
        "sha256": "digest of the trained weights' file",
        "score": "held-out score: mean over prompts",
        "score_low": "lower end of its 95 % interval",
        "score_high": "upper end of its 95 % interval",
        "scores": "map from scorer to mean held-out score",
    }),
    "human_comparisons": ("a rater's last word on a held-out image beside a reference's, seen blind", {
        "image": "the round's image",
        "against_image": "the reference's image",
        "vote": "1 for the round's image, -1 for the reference's, 0 for a tie",
        "position": "where the round's image stood; 0 is left",
        "seconds": "how long the answer took; null when not known",
    }),
}  # fmt: skip


def meaning(table: str, column: str) -> str:
    """What a column of a table or view means; empty when nobody wrote it down."""
    return MEANINGS.get(table, ("", {}))[1].get(column) or SHARED.get(column, "")
