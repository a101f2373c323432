"""The meaning of each table's and view's rows and columns; the site's reference is made from it."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One row of a reference table: section, name, further cells and meaning."""

    section: str
    name: str
    cells: tuple[str, ...]
    text: str


# These columns mean the same in every table and view.
SHARED = {
    "round": "round number from the folder's name; 0 is the base model",
    "sample_id": "image id: r3-g4-m1 is round 3, group 4, member 1; r3-e17 is held-out image 17 of round 3",
    "group_id": "group id; a group holds images of one prompt in one round",
    "pair_id": "pair id",
    "winner_id": "id of the chosen image",
    "loser_id": "id of the rejected image",
    "prompt": "prompt given to the model",
    "seed": "seed of the image's noise",
    "height": "the image's height in pixels; null in rounds of earlier versions",
    "width": "the image's width in pixels; null in rounds of earlier versions",
    "image_path": "image file, relative to the campaign's folder",
    "checkpoint": "checkpoint, relative to the campaign's folder; null for the base model",
    "rater": "name of the person or scorer who judged",
    "rater_kind": "proxy, human, or gold for known answers",
    "judged_at": "time of the judgement, UTC",
    "finished_at": "time it finished, UTC",
    "position": "place of the image on the page; 0 is first or left",
    "scorer": "name of the scorer",
    "score": "score; higher is better",
    "weight": "weight of the pair in the loss, above 0 and at most 1",
    "num_raters": "number of raters whose votes decided the pair",
    "agreement": "how much the raters agree on the pair, above 0 and at most 1",
    "update": "number of the optimizer update within the round",
    "num_pairs": "number of pairs to train on",
    "margin_before": "mean log-ratio in favour of the winner before the update, nats per element; for objectives on "
    "final images, how much further the winner's error fell below the reference's than the loser's",
    "pair_accuracy_before": "share of pairs and steps moved towards the winner before the update",
    "kl_before": "KL from the round's sampler before the update, nats per element and step",
    "clip_fraction": "share of pairs whose ratio was clipped",
    "num_units": "number of pairs or images that the loss is a mean over",
    "winner_error_before": "mean rise of the winners' error over the reference's before the update: minus log-ratio",
    "loser_error_before": "mean rise of the losers' error over the reference's before the update",
    "gradient_factor": "mean share of the gradient at work: sigmoid(-margin) for logistic losses, 0 if a clip stops it",
    "drowned": "share of the trained weights whose gradient is below train.adam_eps",
    "mlflow_run_id": "id of the round's MLflow run",
    "config_sha256": "digest of the configuration",
    "git_commit": "commit of the code; null outside a git clone",
    "both_bad": "whether the rater called both images of the choice bad, a tie; null where that was not asked",
    "against": "round compared against; 0 is the base",
    "against_id": "id of the reference's image of the same prompt and seed",
}
# Table or view -> what a row is, and the columns that are its own or mean something else here.
MEANINGS: dict[str, tuple[str, dict[str, str]]] = {
    "samples": ("an image of a round", {
        "member": "place of the image in its group, from 0",
        "split": "train or eval",
        "trajectory_path": "file with the image's latents, relative to the campaign's folder; dataset-*: of a data set",
        "trajectory_row": "row of the image in that file",
        "checkpoint": "checkpoint that drew the image; null for the base model, and for images of a data set",
    }),
    "groups": ("a group of a round", {"dissimilarity": "how different its images look"}),
    "judgements": ("one judgement by a rater", {
        "kind": "score, rating, choice or rank",
        "other_id": "second image of a choice; null otherwise",
        "value": "score, rating or rank; for a choice, above 0 for the first image and below 0 for the second; "
        "null for a skip or an answer taken back",
        "source": "origin of the judgement: a scorer, the page, an imported file or a data set",
        "seconds": "seconds the answer took; null if unknown",
    }),
    "preferences": ("a pair to train on", {}),
    "image_labels": ("an image of a round, for objectives that learn from single images", {
        "reward": "its score, win rate or strength, by judge.rewards; null if unknown",
        "good": "whether it is good or bad; null if neither",
    }),
    "updates": ("an optimizer update", {
        "epoch": "pass over the round's images",
        "num_pairs": "number of pairs in the update",
        "loss": "loss of its pairs or images before the update",
        "grad_norm": "global norm of the gradients before clipping",
        "seconds": "seconds the update took",
    }),
    "update_steps": ("an update at one denoising step", {
        "step": "index of the denoising step, from 0",
        "timestep": "the model's timestep at that step; if sizes have steps of their own, the first size's",
    }),
    "evaluations": ("a held-out image and one score", {"checkpoint": "checkpoint that drew it; null for the base"}),
    "comparisons": ("one rater's blind answer on a held-out image and a reference's", {
        "comparison": "comparison that asked the question",
        "value": "above 0 for the round's image, below 0 for the reference's, 0 for a tie; null for a skip",
        "seconds": "seconds the answer took; null if unknown",
    }),
    "image_reports": ("a rater's report of an image; the last one of a rater counts", {
        "reason": "unsafe, broken, or withdrawn if the rater took the report back",
        "image_sha256": "digest of the image file that was reported",
        "reported_at": "time of the report, UTC",
    }),
    "rounds": ("a finished round", {
        "checkpoint_in": "checkpoint that sampled the round; null for the base",
        "checkpoint_out": "checkpoint that the round made; null in round 0",
        "lora_sha256": "digest of the trained weights' file, a LoRA or the whole network",
        "num_samples": "number of images sampled for training",
        "num_ties": "number of pairs that ended in a tie",
        "eval_scorer": "scorer of the held-out score",
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
        "label_seconds": "seconds of waiting for people; null if none judged",
        "diversity": "how different the held-out images of one prompt look",
        "drift": "KL from the base over a trajectory, nats per element",
        "win_rate_base": "share of held-out images better than the base's",
        "win_rate_base_low": "lower end of its 95 % interval",
        "win_rate_base_high": "upper end of its 95 % interval",
        "win_rate_before": "share of held-out images better than those of the round it started from",
        "win_rate_before_low": "lower end of its 95 % interval",
        "win_rate_before_high": "upper end of its 95 % interval",
        "win_rate_champion": "share of held-out images better than the champion's",
        "win_rate_champion_low": "lower end of its 95 % interval",
        "win_rate_champion_high": "upper end of its 95 % interval",
        "champion": "round that is the champion after this one",
        "verdict": "the guard's decision",
        "findings": "the guard's findings",
        "pair_accuracy_after": "share of pairs and steps moved towards the winner after the last update",
        "margin_after": "mean log-ratio in favour of the winner after the last update, nats per element",
        "winner_error_after": "mean rise of the winners' error after the last update: minus log-ratio of stored steps",
        "loser_error_after": "the same of the losers; if both rise, the policy leaves both",
        "kl_after": "KL from the round's sampler after the last update, nats per element and step",
    }),
    "pairs": ("a preference with its images, scores and votes", {
        "checkpoint": "checkpoint that drew both images; null for the base",
        "winner_image": "file of the chosen image",
        "loser_image": "file of the rejected image",
        "winner_scores": "map from scorer to the winner's score",
        "loser_scores": "map from scorer to the loser's score",
        "proxies_for": "number of scorers for the winner",
        "proxies_against": "number of scorers for the loser",
        "proxies_tied": "number of scorers that tie",
        "people_for": "number of people for the winner",
        "people_against": "number of people for the loser",
        "people_tied": "number of people who tie",
    }),
    "votes": ("a rater's final vote on two images of a group", {
        "first_id": "id of the first image",
        "second_id": "id of the second image",
        "first_member": "place of the first image in the group",
        "second_member": "place of the second image in the group",
        "vote": "1 for the first image, -1 for the second, 0 for a tie",
        "both_bad": "whether the rater chose that both images are bad",
    }),
    "raters": ("a rater in a round", {
        "num_judgements": "number of questions answered",
        "num_skipped": "number of questions skipped",
        "num_taken_back": "number of answers taken back",
        "num_groups": "number of groups judged",
        "num_votes": "number of votes on pairs",
        "num_ties": "number of votes that are ties",
        "num_both_bad": "number of those that call both images bad",
        "votes_kept": "number of votes that a preference followed",
        "votes_lost": "number of votes that a preference went against",
        "seconds": "total seconds spent",
        "median_seconds": "median seconds per answer",
        "first_at": "time of the first answer, UTC",
        "last_at": "time of the last answer, UTC",
    }),
    "reported_images": ("an image and a rater who reports it, withdrawn reports left out", {
        "reason": "unsafe or broken",
        "reported_at": "time of the report, UTC",
    }),
    "checkpoints": ("a finished round's checkpoint", {
        "sha256": "digest of the trained weights' file",
        "score": "held-out score: mean over prompts",
        "score_low": "lower end of its 95 % interval",
        "score_high": "upper end of its 95 % interval",
        "scores": "map from scorer to mean held-out score",
    }),
    "human_comparisons": ("a rater's final, blind vote on a held-out image and a reference's", {
        "image": "file of the round's image",
        "against_image": "file of the reference's image",
        "vote": "1 for the round's image, -1 for the reference's, 0 for a tie",
        "position": "place of the round's image; 0 is left",
        "seconds": "seconds the answer took; null if unknown",
    }),
    "page_judgements": ("an answer or a skip that the labelling page holds and no table yet", {
        "mode": "pair, mark_bad, best or rank",
        "sample_ids": "the images, in the order on the page",
        "answer": "one number per image; mark_bad: 0 is bad; best and rank: 1 is best; pair: above 0 is better; null "
        "for a skip",
        "skipped": "whether the rater skipped the question",
        "taken_back": "whether the rater took it back",
        "seconds": "seconds the answer took; null if unknown",
    }),
}  # fmt: skip


def meaning(table: str, column: str) -> str:
    """Return the meaning of a table's or view's column; empty if none is written."""
    return MEANINGS.get(table, ("", {}))[1].get(column) or SHARED.get(column, "")
