"""A campaign in a notebook: its rounds, images and tables as DataFrames, its checkpoints in a diffusers pipeline."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.reading import campaign_at
from d3po_core.store.at_hand import bring_paths

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image


class Campaign:
    """A campaign to read; nothing here changes it, so a run may train it meanwhile.

    Args:
        name: the campaign's name, the path of its folder if that lies outside the data folder, or the address of its
            mirror, such as ``s3://bucket/prefix/mine``; then files come when they are needed.

    Raises:
        D3POError: there is no such campaign; the message lists those that exist.
    """

    def __init__(self, name: str) -> None:
        self.config: CampaignConfig = campaign_at(name)

    def __repr__(self) -> str:
        """Return the campaign's name and folder."""
        return f"<campaign {self.name!r} in {self.folder}>"

    @property
    def name(self) -> str:
        """Return the campaign's name."""
        return self.config.campaign

    @property
    def folder(self) -> Path:
        """Return the campaign's folder."""
        return self.config.folder

    @property
    def rounds(self) -> "pd.DataFrame":
        """Return one row per finished round, indexed by round; the columns are those of the table ``rounds``."""
        return self.sql("SELECT * FROM rounds ORDER BY round").set_index("round")

    @property
    def champion(self) -> int:
        """Return the champion's round; 0 is the base model.

        Raises:
            D3POError: no round is finished yet.
        """
        return self.round("champion")

    def round(self, name: str | int) -> int:
        """Return the number of the round that ``base``, ``latest``, ``champion`` or a number names.

        Raises:
            D3POError: no finished round has that name.
        """
        from d3po_core.evaluation.comparison import round_named

        return round_named(self.folder, str(name))

    def sql(self, query: str) -> "pd.DataFrame":
        """Return the rows of one SELECT over the campaign's tables and views.

        Raises:
            D3POError: it is not a SELECT, or cannot be answered.
        """
        from d3po_core.people.on_page import ask_with_page

        with ask_with_page(self.folder, str(query)) as answer:
            return answer.df()

    def images(
        self, round: str | int | None = None, prompt: str | None = None, held_out: bool | None = None
    ) -> "pd.DataFrame":
        """Return one row per image, indexed by its id: round, prompt, seed, checkpoint, won, lost, judged, score, path.

        Args:
            round: the round that drew it: a number or name; None for all.
            prompt: text that the prompt contains, in any case.
            held_out: True for held-out images, False for those sampled for training; None for both.

        Raises:
            D3POError: no finished round has that name, or the campaign's tables cannot be read.
        """
        from d3po_core.browser.gallery import Filters

        if held_out not in (None, True, False):
            raise D3POError(f"images: held_out is {held_out!r}; expected True, False or None")
        kinds = {None: None, True: "held-out", False: "train"}
        prompt = None if prompt is None else str(prompt)
        number = None if round is None else int(round) if str(round).isdecimal() else self.round(round)
        filters = Filters(round=number, kind=kinds[held_out], prompt=prompt, order="oldest")  # type: ignore[arg-type]
        found = self._gallery.everything(filters)
        found["path"] = [self.folder / path for path in found.pop("image_path")]
        return found.drop(columns="place").set_index("sample_id")

    def image(self, sample_id: str) -> "Image.Image":
        """Return an image by its id, such as ``r3-g4-m1``.

        Raises:
            D3POError: there is no such image, or its file is gone or damaged.
        """
        from PIL import Image

        path = self._gallery.image_path(str(sample_id))
        if path is not None and bring_paths([path]):
            raise D3POError(f"image {sample_id!r} is not in the mirror of campaign {self.name!r}, since "
                            "store.mirror_images was off; draw it again: d3po regenerate")  # fmt: skip
        if path is None or not path.is_file():
            raise D3POError(f"image {sample_id!r} is not in campaign {self.name!r}, or its file was removed; "
                            "campaign.images().index lists all")  # fmt: skip
        try:
            with Image.open(path) as image:
                return image.copy()
        except (OSError, Image.DecompressionBombError) as error:
            raise D3POError(f"{path}: cannot be read ({error}); restore it from a copy") from None

    def story(self, sample_id: str) -> Any:
        """Return all records of one image: see ``d3po_core.queries.lookup.ImageStory``."""
        from d3po_core.queries.lookup import image_story

        return image_story(self.folder, str(sample_id))

    def compare(self, *checkpoints: str | int) -> "pd.DataFrame":
        """Return one row per scorer and checkpoint: mean score and difference from the first, with 95 % intervals.

        Args:
            checkpoints: names or numbers of rounds; by default ``base``, ``champion`` and ``latest``.

        Raises:
            D3POError: fewer than two different rounds, or one that is not finished.
        """
        from d3po.comparing import comparison_table

        names = checkpoints or ("base", "champion", "latest")
        return comparison_table(self.folder, list(dict.fromkeys(self.round(name) for name in names)))

    def load(self, round: str | int = "champion", pipeline: Any = None) -> Any:
        """Return a diffusers pipeline with a round's weights, on the CPU.

        Args:
            round: ``base``, ``latest``, ``champion`` or a number.
            pipeline: the base model if it is loaded already; None loads it as the campaign did.

        Raises:
            D3POError: the base model or the checkpoint cannot be read, or the checkpoint changed since training.
        """
        from d3po.loading import load_pipeline

        return load_pipeline(self.folder, self.round(round), pipeline)

    @cached_property
    def _gallery(self) -> Any:
        from d3po_core.browser.gallery import Gallery

        return Gallery(self.folder)
