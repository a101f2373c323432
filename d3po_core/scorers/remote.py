"""A scorer behind HTTP: a batch of images goes out, their scores come back.

    POST URL     {"images": [PNG in base64, ...], "prompts": [text, ...]}     as many images as prompts
    200          {"scores": [number, ...]}                                    one for each image, higher is better

A server that is away, too slow, busy (429) or broken (5xx) is asked again, after 1, 2, 4, ... seconds or what its
``Retry-After`` says, a minute at most. Any other answer is an error at once. The same images may so be sent twice.
"""

import base64
import io
import time
from typing import Any

import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from d3po_core.errors import D3POError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)

    scores: list[FiniteFloat]


class RemoteScorer:
    """Asks one server, in batches, over one connection that stays open."""

    def __init__(self, name: str, url: str, batch_size: int, timeout_seconds: float, tries: int) -> None:
        self.name, self.url = name, url
        self._batch_size, self._tries = batch_size, tries
        try:
            if not httpx.URL(url).host:
                raise httpx.InvalidURL("it names no host")
        except httpx.InvalidURL as error:
            raise D3POError(
                f"scoring.models.{name} is {url!r}: not a URL ({error}); expected http://host/path"
            ) from None
        self._client = httpx.Client(timeout=timeout_seconds)

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Scores ``[B]`` of uint8 images ``[B, height, width, 3]``.

        Raises:
            D3POError: no answer, or not the answer that the protocol asks for.
        """
        size = self._batch_size
        parts = [self._ask(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _ask(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        response = self._post({"images": [_png(image) for image in images], "prompts": prompts})
        try:
            scores = _Answer.model_validate_json(response.content).scores
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise self._error(
                f"answered {_shortened(response)}; expected {{'scores': [number, ...]}} ({place}: {problem['msg']})"
            ) from None
        if len(scores) != len(images):
            raise self._error(f"answered {len(scores)} scores for {len(images)} images; expected one for each")
        return np.array(scores)

    def _post(self, content: dict[str, Any]) -> httpx.Response:
        pause, trouble = FIRST_PAUSE, ""
        for left in reversed(range(self._tries)):
            wanted = ""
            try:
                response = self._client.post(self.url, json=content)
                if response.status_code == httpx.codes.OK:
                    return response
                trouble = f"answered {response.status_code}: {_shortened(response)}"
                if response.status_code != httpx.codes.TOO_MANY_REQUESTS and not response.is_server_error:
                    raise self._error(trouble)
                wanted = response.headers.get("Retry-After", "")
            except httpx.TransportError as error:
                trouble = f"did not answer ({type(error).__name__}: {error})"
            if left:
                time.sleep(min(float(wanted) if wanted.isdigit() else pause, LONGEST_PAUSE))
                pause *= 2
        raise self._error(f"{trouble}, asked {self._tries} times; is it running? Then run again: nothing is lost")

    def _error(self, problem: str) -> D3POError:
        return D3POError(f"scorer {self.name!r}: {self.url} {problem}")


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _shortened(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:200] or "nothing"
