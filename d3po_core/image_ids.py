"""Make the ids of a campaign's images, patterns to parse them, and names of files of imported images.

``r<round>-g<group>-m<member>`` is an image of a round, ``r<round>-e<index>`` a held-out image.
"""

GROUP = r"r[0-9]+-g[0-9]+"
MEMBER = r"-m[0-9]+"
SAMPLE = GROUP + MEMBER
# Files of latents whose images come from a data set, so that nothing led to them.
IMPORTED_FILE = "dataset-"
# The file of judgements that came with such images, without its ending.
IMPORTED_JUDGEMENTS = "dataset"
# The regex group n is the round's number, with few enough digits for a 64-bit integer.
ROUND_OF_SAMPLE = rf"^r(?P<n>[0-9]{{1,9}})-g[0-9]+{MEMBER}$"


def group_id(round_number: int, index: int) -> str:
    """Return the id of a round's group."""
    return f"r{round_number}-g{index}"


def sample_id(group: str, member: int) -> str:
    """Return the id of a group's member."""
    return f"{group}-m{member}"


def held_out_id(round_number: int, index: int) -> str:
    """Return the id of a held-out image that a round's checkpoint drew."""
    return f"r{round_number}-e{index}"


def group_of(sample: str) -> str:
    """Return the group of a member; empty if the id is not a member's."""
    return sample.rpartition("-m")[0]


def number_of(group: str) -> int:
    """Return the number of a group in its round."""
    return int(group.rpartition("-g")[2])


def is_imported(trajectory_path: str) -> bool:
    """Return whether an image comes from a data set, by the file of its latent: it has no trajectory."""
    return trajectory_path.rpartition("/")[2].startswith(IMPORTED_FILE)


def round_of(image: str) -> int:
    """Return the number of the round that drew an image, a member's or a held-out one."""
    return int(image.partition("-")[0].removeprefix("r"))
