"""A scorer behind HTTP: send a batch of images, receive their scores.

    POST URL     {"images": [PNG in base64, ...], "prompts": [text, ...]}     as many images as prompts
    200          {"scores": [number, ...]}                                    one per image, higher is better

If a server is down, too slow, busy (429) or broken (5xx), the client retries after 1, 2, 4, ... seconds or after its
``Retry-After``, at most a minute. It may so send the same images twice. Any other answer raises at once.

The timeout bounds the whole exchange, so it also catches a server that trickles bytes. An answer may have at most
LARGEST_ANSWER bytes.
``${NAME}`` in the URL is replaced by that environment variable; messages show the name, the server gets the value.
"""

import base64
import concurrent.futures
import io
import threading
import time
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from d3po_core.errors import D3POError
from d3po_core.urls import NAMED, filled_in

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
LARGEST_ANSWER = 4 * 1024 * 1024  # bytes; a score takes about 20


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)

    scores: list[FiniteFloat]


class _Response(NamedTuple):
    status: int
    retry_after: str
    content: bytes

    @property
    def shortened(self) -> str:
        return " ".join(self.content.decode(errors="replace").split())[:200] or "nothing"


class RemoteScorer:
    """Sends batches to one server over one connection that stays open."""

    def __init__(self, name: str, url: str, batch_size: int, timeout_seconds: float, tries: int) -> None:
        self.name, self.url = name, url
        self._batch_size, self._tries = batch_size, tries
        try:
            if not httpx.URL(NAMED.sub("name", url)).host:
                raise httpx.InvalidURL("it names no host")
        except httpx.InvalidURL as error:
            raise D3POError(
                f"scoring.models.{name} is {url!r}: not a URL ({error}); expected http://host/path"
            ) from None
        self._timeout = timeout_seconds
        self._address = filled_in(url, f"scoring.models.{name}")
        self._client = httpx.Client(timeout=timeout_seconds)

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return scores ``[B]`` of uint8 images ``[B, height, width, 3]``.

        Raises:
            D3POError: the server did not answer, or its answer breaks the protocol.
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
                f"answered {response.shortened}; expected {{'scores': [number, ...]}} ({place}: {problem['msg']})"
            ) from None
        if len(scores) != len(images):
            raise self._error(f"answered {len(scores)} scores for {len(images)} images; expected one for each")
        return np.array(scores)

    def _post(self, content: dict[str, Any]) -> _Response:
        pause, trouble = FIRST_PAUSE, ""
        for left in reversed(range(self._tries)):
            wanted = ""
            try:
                response = self._exchange(content)
                if response.status == httpx.codes.OK:
                    return response
                trouble = f"answered {response.status}: {response.shortened}"
                if response.status != httpx.codes.TOO_MANY_REQUESTS and not httpx.codes.is_server_error(
                    response.status
                ):
                    raise self._error(trouble)
                wanted = response.retry_after
            except httpx.RequestError as error:
                trouble = f"did not answer ({type(error).__name__}: {error})"
            if left:
                seconds = float(wanted) if wanted.isascii() and wanted.isdigit() else pause
                time.sleep(min(seconds, LONGEST_PAUSE))
                pause *= 2
        raise self._error(f"{trouble}, asked {self._tries} times; is it running? Then run again: nothing is lost")

    def _exchange(self, content: dict[str, Any]) -> _Response:
        """Return the server's answer, which must arrive completely within the timeout."""
        found: concurrent.futures.Future[_Response] = concurrent.futures.Future()

        def ask(client: httpx.Client) -> None:
            try:
                found.set_result(self._read(client, content))
            except BaseException as error:  # re-raised in the waiting thread
                found.set_exception(error)

        # httpx limits each read, not the total. Only a watching thread can end a trickling answer.
        threading.Thread(target=ask, args=(self._client,), daemon=True).start()
        try:
            return found.result(self._timeout)
        except TimeoutError:
            self._client.close()
            self._client = httpx.Client(timeout=self._timeout)
            raise httpx.ReadTimeout(f"no whole answer within {self._timeout:g} s") from None

    def _read(self, client: httpx.Client, content: dict[str, Any]) -> _Response:
        answer = bytearray()
        with client.stream("POST", self._address, json=content, headers={"Accept-Encoding": "identity"}) as response:
            for part in response.iter_bytes():
                answer += part
                if len(answer) > LARGEST_ANSWER:
                    raise self._error(
                        f"answered more than {LARGEST_ANSWER} bytes; expected {{'scores': [number, ...]}}"
                    )
            return _Response(response.status_code, response.headers.get("Retry-After", ""), bytes(answer))

    def _error(self, problem: str) -> D3POError:
        return D3POError(f"scorer {self.name!r}: {self.url} {problem}")


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
