"""The ids of a campaign's images: made here, and taken apart by the patterns here.

``r<round>-g<group>-m<member>`` is an image of a round, ``r<round>-e<index>`` a held-out one.
"""

GROUP = r"r[0-9]+-g[0-9]+"
MEMBER = r"-m[0-9]+"
SAMPLE = GROUP + MEMBER
# With the round's number as the group n: no more digits than a whole number of 64 bits surely holds.
ROUND_OF_SAMPLE = rf"^r(?P<n>[0-9]{{1,9}})-g[0-9]+{MEMBER}$"


def group_id(round_number: int, index: int) -> str:
    """The id of a round's group."""
    return f"r{round_number}-g{index}"


def sample_id(group: str, member: int) -> str:
    """The id of a group's member."""
    return f"{group}-m{member}"


def held_out_id(round_number: int, index: int) -> str:
    """The id of a held-out image that a round's checkpoint drew."""
    return f"r{round_number}-e{index}"


def group_of(sample: str) -> str:
    """The group of a member; empty when the id is not of one."""
    return sample.rpartition("-m")[0]
