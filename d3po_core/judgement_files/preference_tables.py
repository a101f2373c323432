"""Read published preference data sets as rows of choices and ranks.

Sources: the columns of Pick-a-Pic v2 (huggingface.co/datasets/yuvalkirstain/pickapic_v2), the files of HPDv2
(huggingface.co/datasets/ymhao/HPDv2: train.json, test.json), and ImageReward's test file (data/test.json of
github.com/THUDM/ImageReward).
"""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

# Columns that name the better and the worse image of a pair.
WINNERS = (("winner", "loser"), ("chosen", "rejected"), ("image_w", "image_l"), ("good_jpg", "bad_jpg"))
PICK_A_PIC = ("image_0_uid", "image_1_uid", "label_0", "label_1")
PICK_A_PIC_OTHERS = {"user_id": "rater", "created_at": "judged_at", "caption": "prompt", "round": "round"}
# Keys of records with a list of images, and the key of the value of each image.
_LISTS = {"HPDv2 pairs": ("image_path", "human_preference"), "HPDv2 ranks": ("image_path", "rank"),
          "ImageReward": ("generations", "ranking")}  # fmt: skip
LIST_KEYS = frozenset(key for keys in _LISTS.values() for key in keys)


def winner_columns(found: set[str]) -> tuple[str, str] | None:
    """The columns of the better and the worse image, None if the table lacks them."""
    return next((names for names in WINNERS if set(names) <= found), None)


def pick_a_pic_choices(columns: dict[str, pa.ChunkedArray]) -> list[str | None]:
    """The choice in each row of Pick-a-Pic: first, second or tie; None if ``has_label`` is false."""
    first, second = columns["label_0"].to_pylist(), columns["label_1"].to_pylist()
    labelled = columns["has_label"].to_pylist() if "has_label" in columns else ["true"] * len(first)
    return [
        None if has is not None and has.strip().lower() in ("false", "0") else _choice(a, b)
        for a, b, has in zip(first, second, labelled, strict=True)
    ]


def _choice(first: str | None, second: str | None) -> str | None:
    if not first and not second:
        return None
    try:
        better, worse = float(first or "nan"), float(second or "nan")
    except ValueError:
        better = worse = math.nan
    if math.isnan(better) or math.isnan(worse):
        return f"{first} and {second}"  # no choice; the checks report it with its row
    return "tie" if better == worse else "first" if better > worse else "second"


def list_format(items: list[Any]) -> str | None:
    """The format of records with lists of images, None if they have none."""
    for name, keys in _LISTS.items():
        if any(isinstance(item, dict) and all(isinstance(item.get(key), list) for key in keys) for item in items):
            return name
    return None


def rows_of_lists(items: list[Any], chosen: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and record of each judgement in records with lists; a text tells why an item has none."""
    images_key, said_key = _LISTS[chosen]
    for number, item in enumerate(items, 1):
        images = item.get(images_key) if isinstance(item, dict) else None
        said = item.get(said_key) if isinstance(item, dict) else None
        if not isinstance(images, list) or not isinstance(said, list) or len(images) != len(said):
            yield number, f"has no lists {images_key} and {said_key} of equal length"
        elif chosen == "HPDv2 pairs":
            yield number, _pair(item, images, said)
        else:
            for rater, ranks in _rankings(item, said):
                if len(ranks) != len(images):
                    yield number, f"has {len(ranks)} ranks for {len(images)} images"
                    continue
                for image, rank in zip(images, ranks, strict=True):
                    yield number, {"sample_id": image, "said": rank, "rater": rater, "prompt": item.get("prompt")}


def _pair(item: dict[str, Any], images: list[Any], said: list[Any]) -> dict[str, Any] | str:
    if len(images) != 2:
        return f"has {len(images)} images; expected a pair"
    choice = _choice(*(None if value is None else str(value) for value in said))
    same = {"rater": item.get("user_hash"), "prompt": item.get("prompt")}
    return {"sample_id": images[0], "other_id": images[1], "said": choice, **same}


def _rankings(item: dict[str, Any], consensus: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Each person's ranks if the record has them, else the consensus."""
    people, ranks = item.get("user_hash"), item.get("raw_annotations")
    if isinstance(people, list) and isinstance(ranks, list) and len(people) == len(ranks) > 0:
        return [(who, ranked if isinstance(ranked, list) else []) for who, ranked in zip(people, ranks, strict=True)]
    return [(people if isinstance(people, str) else None, consensus)]
