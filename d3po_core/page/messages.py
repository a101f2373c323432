"""Messages from the labelling page; any other input is refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from d3po_core.people.reports import Reason

# A longer time means that the rater was away; the page then sends null.
MAX_SECONDS = 60 * 60 * 24
Submission = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Judged(BaseModel):
    """The page's message when a rater has judged or skipped."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    ticket: Annotated[str, Field(max_length=400)]
    submission: Submission
    action: Literal["answer", "skip"]
    values: Annotated[list[float], Field(max_length=64)] = []
    seconds: Annotated[float | None, Field(ge=0, le=MAX_SECONDS)] = None


class Undone(BaseModel):
    """The page's message when a rater takes back an entry."""

    model_config = ConfigDict(extra="forbid", strict=True)

    submission: Submission
    entry: Annotated[int, Field(ge=0, lt=2**63)]


class Reported(BaseModel):
    """The page's message when a rater reports an image, or takes the report back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ticket: Annotated[str, Field(max_length=400)]
    submission: Submission
    image: Annotated[int, Field(ge=0, lt=64)]
    reason: Reason
