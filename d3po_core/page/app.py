"""The web application of the labelling page; every page is rendered here, and a little JavaScript exchanges its middle.

/                 campaigns and blind comparisons that wait for people
/enter?key=TOKEN  turns the token of a link into a cookie
/c/NAME           the labelling page of a campaign, or as /c/CAMPAIGN~ID of a blind comparison; /next, /judge and /undo
                  below it answer with the middle of the page
/i/TOKEN          an image, by a name that says nothing about it and is another one for every rater
"""

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from d3po_core.blind import comparisons_of
from d3po_core.campaign import CAMPAIGN_FILE
from d3po_core.config import load_config
from d3po_core.errors import D3POError
from d3po_core.journal import ConflictError
from d3po_core.page.access import Raters
from d3po_core.page.comparing import ComparisonDesk, desk_name
from d3po_core.page.completion import OnComplete
from d3po_core.page.desk import Desk, GoneError, Priority, UnfitError
from d3po_core.page.guard import LOCAL_HOSTS, Guard, Pace
from d3po_core.tally import Deck

COOKIE = "d3po_label"
COOKIE_SECONDS = 60 * 60 * 24 * 90
WATCH_SECONDS = 2.0
MEDIA = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png",
         ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}  # fmt: skip
HERE = Path(__file__).resolve().parent

Submission = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Judged(BaseModel):
    """What the page sends when a rater has judged or skipped."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    ticket: Annotated[str, Field(max_length=400)]
    submission: Submission
    action: Literal["answer", "skip"]
    values: Annotated[list[float], Field(max_length=64)] = []
    seconds: Annotated[float | None, Field(ge=0)] = None


class Undone(BaseModel):
    """What the page sends when a rater takes back an entry."""

    model_config = ConfigDict(extra="forbid", strict=True)

    submission: Submission
    entry: Annotated[int, Field(ge=0)]


class _Page:
    """What the routes share: campaigns, raters, templates, and the table of image names."""

    def __init__(self, data: Path, make_desk: Callable[[Path, str | None], Desk], per_second: float) -> None:
        self.runs, self.raters, self._make_desk = data / "runs", Raters(data), make_desk
        self.pace, self.tries = Pace(per_second, 3 * per_second), Pace(2, 20)
        self.desks: dict[str, Desk] = {}
        self._lock = threading.Lock()
        self._images: dict[str, Path] = {}
        self._named: set[tuple[str, str]] = set()
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self.static = {path.name: path.read_bytes() for path in sorted((HERE / "static").iterdir())}

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = self._templates.get_template(template).render(**values)
        return HTMLResponse(text, status, headers={"cache-control": "no-store"})

    def rater(self, request: Request) -> str | None:
        return self.raters.rater_of(request.cookies.get(COOKIE, ""))

    def campaigns(self) -> list[str]:
        """Campaigns with people as judges."""
        names = []
        for path in sorted(self.runs.glob(f"*/{CAMPAIGN_FILE}")):
            with contextlib.suppress(D3POError, OSError, ValueError, KeyError):
                config = load_config(json.loads(path.read_text())["config"], str(path))
                if config.judge.labeller != "proxy" or self.desk(path.parent.name).current():
                    names.append(path.parent.name)
        return names

    def comparisons(self) -> list[str]:
        """Blind comparisons of all campaigns, by the names of their desks; some may be done."""
        return list(self._comparisons())

    def _comparisons(self) -> dict[str, tuple[Path, str]]:
        found = {}
        for path in sorted(self.runs.glob(f"*/{CAMPAIGN_FILE}")):
            with contextlib.suppress(D3POError):
                for one in comparisons_of(path.parent):
                    found[desk_name(path.parent, one)] = (path.parent, one.id)
        return found

    def desk(self, name: str) -> Desk:
        with self._lock:
            if name not in self.desks:
                # Compared with what is there, never joined to a path.
                there: dict[str, tuple[Path, str | None]] = {
                    path.parent.name: (path.parent, None) for path in self.runs.glob(f"*/{CAMPAIGN_FILE}")
                }
                there |= self._comparisons() if "~" in name else {}
                if name not in there:
                    raise HTTPException(404, "There is no campaign of that name.")
                self.desks[name] = self._make_desk(*there[name])
            return self.desks[name]

    def image_url(self, rater: str, deck: Deck, sample_id: str) -> str:
        token = self.raters.opaque(rater, deck.campaign.name, deck.sampling, sample_id)
        self._images[token] = deck.campaign / deck.image_paths[sample_id]
        return f"/i/{token}"

    def image(self, rater: str, token: str) -> Path | None:
        if token not in self._images:  # a page from before a restart: name all images that it may show
            for deck in filter(None, [desk.current() for desk in list(self.desks.values())]):
                if (rater, deck.sampling) not in self._named:
                    self._named.add((rater, deck.sampling))
                    for sample_id in deck.image_paths:
                        self.image_url(rater, deck, sample_id)
        return self._images.get(token)

    def middle(self, rater: str, desk: Desk) -> str:
        """The page's middle for what the rater sees now."""
        view = desk.view(rater)
        images, ahead = (
            [self.image_url(rater, view.deck, sample_id) for sample_id in ids] if view.deck else []
            for ids in (view.shown, view.ahead)
        )
        template = self._templates.get_template("middle.html")
        return template.render(view=view, images=images, ahead=ahead, rater=rater, desk=desk)


def create_app(
    data: Path,
    on_complete: OnComplete,
    priority: Priority | None = None,
    mode: str | None = None,
    hosts: Iterable[str] = LOCAL_HOSTS,
    per_second: float = 20.0,
    retry_seconds: float = 10.0,
    on_compared: OnComplete = lambda *_: None,
) -> Guard:
    """The labelling page over the campaigns of a data folder, as an ASGI application.

    Args:
        data: the data folder; campaigns are in ``runs`` below it.
        on_complete: called once with (campaign's name, round number), in a thread, when people have judged enough of
            a round; called again later if it raises.
        priority: see ``desk.Desk``.
        mode: how people judge, in place of the configuration's.
        hosts: names by which the page may be reached.
        per_second: how many judgements a second a rater may send; three times as many at once.
        retry_seconds: pause after ``on_complete`` or ``on_compared`` raised.
        on_compared: called likewise when people have judged a blind comparison of a round; wakes nothing.
    """

    def make_desk(folder: Path, comparison: str | None) -> Desk:
        if comparison is None:
            return Desk(folder, on_complete, priority, mode, retry_seconds)
        return ComparisonDesk(folder, comparison, on_compared, retry_seconds)

    page = _Page(data, make_desk, per_second)
    ended = threading.Event()

    def watch() -> None:
        # Rounds end without a request too: by judgements that are brought in, or before this server was started.
        while not ended.wait(WATCH_SECONDS):
            for name in [*page.campaigns(), *page.comparisons()]:
                with contextlib.suppress(D3POError, HTTPException):
                    page.desk(name).current()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ended.clear()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        yield
        ended.set()
        watcher.join()
        for desk in page.desks.values():
            desk.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_pages(app, page)
    _add_actions(app, page)
    _add_errors(app, page)
    return Guard(app, hosts)


def _add_pages(app: FastAPI, page: _Page) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"service": "d3po label"}

    @app.get("/enter")
    def enter(request: Request, key: str = "") -> Response:
        if not page.tries.allows(request.client.host if request.client else ""):
            raise HTTPException(429, "Too many tries; wait a moment.")
        rater = page.raters.rater_of(key)
        if rater is None:
            raise HTTPException(401, "This link is not valid (any more). Ask for a new one: d3po label --rater NAME")
        # A page that goes on by itself, not a redirect: a strict cookie is not sent along a redirect from elsewhere.
        response = page.html("enter.html", rater=rater)
        response.set_cookie(COOKIE, key, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", path="/")
        return response

    @app.get("/")
    def start(request: Request) -> Response:
        rater = _signed_in(page, request)
        desks = {name: page.desk(name) for name in [*page.campaigns(), *page.comparisons()]}
        entries = [(name, desk, desk.view(rater)) for name, desk in desks.items()]
        waiting = [entry for entry in entries if not (entry[1].blind and entry[2].state == "done")]
        return page.html("start.html", rater=rater, entries=waiting)

    @app.get("/c/{name}")
    def label(request: Request, name: str) -> Response:
        rater = _signed_in(page, request)
        desk = page.desk(name)
        return page.html("label.html", rater=rater, name=name, desk=desk, middle=page.middle(rater, desk))

    @app.get("/i/{token}")
    def image(request: Request, token: str) -> Response:
        path = page.image(_signed_in(page, request), token)
        if path is None or path.suffix not in MEDIA or not path.is_file():
            raise HTTPException(404, "There is no such image.")
        # No date and no tag: they would say when the image was made.
        headers = {"cache-control": "private, max-age=86400, immutable"}
        return Response(path.read_bytes(), media_type=MEDIA[path.suffix], headers=headers)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in page.static:
            raise HTTPException(404, "There is no such file.")
        headers = {"cache-control": "no-cache"}
        return Response(page.static[name], media_type=MEDIA[Path(name).suffix], headers=headers)


def _add_actions(app: FastAPI, page: _Page) -> None:
    def acting(request: Request) -> str:
        rater = _signed_in(page, request)
        if not page.pace.allows(rater):
            raise HTTPException(429, "That was very fast; it is sent again in a moment.")
        return rater

    def reply(rater: str, desk: Desk, note: str = "") -> JSONResponse:
        return JSONResponse({"html": page.middle(rater, desk), "note": note}, headers={"cache-control": "no-store"})

    @app.get("/c/{name}/next")
    def following(request: Request, name: str) -> Response:
        return reply(_signed_in(page, request), page.desk(name))

    @app.post("/c/{name}/judge")
    def judge(name: str, judged: Judged, rater: Annotated[str, Depends(acting)]) -> Response:
        desk = page.desk(name)
        answer = judged.values if judged.action == "answer" else None
        note = desk.judge(rater, judged.ticket, judged.submission, answer, judged.seconds)
        return reply(rater, desk, note)

    @app.post("/c/{name}/undo")
    def undo(name: str, undone: Undone, rater: Annotated[str, Depends(acting)]) -> Response:
        desk = page.desk(name)
        return reply(rater, desk, desk.undo(rater, undone.entry, undone.submission))


def _add_errors(app: FastAPI, page: _Page) -> None:
    def answer(request: Request, status: int, text: str) -> Response:
        if request.method == "POST" or request.url.path.endswith("/next"):
            return JSONResponse({"error": text}, status, headers={"cache-control": "no-store"})
        return page.html("message.html", status, text=text)

    @app.exception_handler(StarletteHTTPException)
    def refused(request: Request, error: StarletteHTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail))

    @app.exception_handler(GoneError)
    def gone(request: Request, error: GoneError) -> Response:
        return answer(request, 410, str(error))

    @app.exception_handler(ConflictError)
    @app.exception_handler(UnfitError)
    def unfit(request: Request, error: D3POError) -> Response:
        return answer(request, 422, str(error))

    @app.exception_handler(D3POError)
    def failed(request: Request, error: D3POError) -> Response:
        return answer(request, 503, str(error))


def _signed_in(page: _Page, request: Request) -> str:
    rater = page.rater(request)
    if rater is None:
        raise HTTPException(401, "Open the link that d3po label printed for you.")
    return rater
