"""The labelling page's web application; it renders every page, and a little JavaScript replaces the page's middle.

/                 campaigns and blind comparisons that wait for people
/enter?key=TOKEN  turns the token of a link into a cookie
/waiting          the list of the first page, anew
/c/NAME           the labelling page of a campaign, or as /c/CAMPAIGN~ID of a blind comparison; /next, /judge, /undo
                  and /report below it answer with the middle of the page
/owner            the owner's pages; see ``owner.py``
/i/TOKEN          an image, under a name that reveals nothing and differs for every rater
"""

import contextlib
import hmac
import sys
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import jinja2
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from d3po_core.errors import D3POError
from d3po_core.page.access import AccessError, Raters
from d3po_core.page.comparing import ComparisonDesk
from d3po_core.page.completion import OnComplete
from d3po_core.page.desk import Desk, GoneError, Priority, UnfitError
from d3po_core.page.desks import NO_CAMPAIGN, Desks, Listed, MakeDesk
from d3po_core.page.gate import LOCAL_HOSTS, Guard, Pace
from d3po_core.page.messages import Judged, Reported, Undone
from d3po_core.page.owner import add_owner_pages
from d3po_core.page.view import View, ended
from d3po_core.people.guideline import Guideline, guideline_text, render_guideline
from d3po_core.people.journal import ConflictError
from d3po_core.people.tally import Deck
from d3po_core.store.images import aspect
from d3po_core.ways import WAYS

COOKIE = "d3po_label"
COOKIE_SECONDS = 60 * 60 * 24 * 90
WATCH_SECONDS = 2.0
MEDIA = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png",
         ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}  # fmt: skip
HERE = Path(__file__).resolve().parent


class _Page:
    """State that the routes share: campaigns, raters, templates, and the table of image names."""

    def __init__(self, data: Path, make_desk: MakeDesk, per_second: float) -> None:
        self._data, self.raters, self.desks = data, Raters(data), Desks(data / "runs", make_desk)
        self.pace, self.tries = Pace(per_second, 3 * per_second), Pace(2, 20)
        self.closed = ""
        self._images: dict[tuple[str, str], Path] = {}
        self._named: set[tuple[str, str]] = set()
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self._templates.filters["shown"] = self.shown
        self._templates.globals["ways"] = WAYS
        self.static = {path.name: path.read_bytes() for path in sorted((HERE / "static").iterdir())}

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.text(template, **values), status, headers={"cache-control": "no-store"})

    def text(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)

    def rater(self, request: Request) -> str | None:
        return self.raters.rater_of(request.cookies.get(COOKIE, ""))

    def desk(self, rater: str, name: str) -> Desk:
        """The desk of that name, if it is there and the rater may judge it."""
        desk = self.desks.desk(name)
        if not self.raters.admits(rater, desk.campaign):
            raise HTTPException(404, NO_CAMPAIGN)
        return desk

    def admits(self, rater: str, one: Listed) -> bool:
        """Return whether the rater may see a campaign or comparison; nobody may if its invitations are damaged."""
        with contextlib.suppress(D3POError):
            return self.raters.admits(rater, one.desk.campaign if one.desk else self.desks.runs / one.name)
        return False

    def shown(self, text: str) -> str:
        """A message for raters, without the path of the data folder."""
        return text.replace(f"{self._data}/", "")

    def image_url(self, rater: str, deck: Deck, sample_id: str) -> str:
        token = self.raters.opaque(rater, deck.campaign.name, deck.sampling, sample_id)
        self._images[rater, token] = deck.campaign / deck.image_paths[sample_id]
        return f"/i/{token}"

    def image(self, rater: str, token: str) -> Path | None:
        if (rater, token) not in self._images:  # the page is older than a restart: name all images that it may show
            for deck in self.desks.decks():
                if (rater, deck.sampling) not in self._named:
                    self._named.add((rater, deck.sampling))
                    for sample_id in deck.image_paths:
                        self.image_url(rater, deck, sample_id)
                    self.guideline(rater, deck)
        return self._images.get((rater, token))

    def guideline(self, rater: str, deck: Deck) -> Guideline:
        """The deck's guideline as HTML; its images get names as those of the questions do."""

        def url(path: Path) -> str:
            token = self.raters.opaque(rater, deck.campaign.name, "guideline", str(path))
            self._images[rater, token] = path
            return f"/i/{token}"

        return render_guideline(guideline_text(deck.config.judge.people, deck.mode), deck.campaign, url)

    def entries(self, rater: str) -> tuple[str, int]:
        """The list of the first page, and how many entries wait for the rater; those come first."""
        entries = []
        for one in (one for one in self.desks.listed() if self.admits(rater, one)):
            view = one.desk.view(rater) if one.desk else View("waiting", problem=one.problem)
            over = one.desk is not None and not one.desk.blind and ended(view, one.desk.campaign)
            if not (one.desk and one.desk.blind and view.state == "done"):
                entries.append((one, view, over))
        entries.sort(key=lambda entry: (entry[1].state != "question", entry[2]))
        waiting = sum(view.state == "question" for _, view, _ in entries)
        template = self._templates.get_template("entries.html")
        return template.render(entries=entries, problem=self.desks.problem), waiting

    def middle(self, rater: str, desk: Desk) -> str:
        """The page's middle for the rater's current view."""
        view = desk.view(rater)
        images, ahead = (
            [self.image_url(rater, view.deck, sample_id) for sample_id in ids] if view.deck else []
            for ids in (view.shown, view.ahead)
        )
        guideline = self.guideline(rater, view.deck) if view.deck else None
        template = self._templates.get_template("middle.html")
        first = view.deck.campaign / view.deck.image_paths[view.shown[0]] if view.deck and view.shown else None
        return template.render(
            view=view,
            images=images,
            aspect=aspect(first) if first else 1.0,
            ahead=ahead,
            rater=rater,
            desk=desk,
            guideline=guideline,
            over=not desk.blind and ended(view, desk.campaign),
        )


def create_app(
    data: Path,
    on_complete: OnComplete,
    priority: Priority | None = None,
    mode: str | None = None,
    hosts: Iterable[str] = LOCAL_HOSTS,
    per_second: float = 20.0,
    retry_seconds: float = 10.0,
    on_compared: OnComplete = lambda *_: None,
    grace_seconds: float = 0.0,
) -> Guard:
    """The labelling page over the campaigns of a data folder, as an ASGI application.

    Args:
        data: the data folder; campaigns are in ``runs`` below it.
        on_complete: called once with (campaign's name, round number), in a thread, when people have judged enough of
            a round; called again later if it raises.
        priority: see ``desk.Desk``.
        mode: how people judge, in place of the configuration's.
        hosts: names by which the page may be reached.
        per_second: judgements per second that a rater may send; bursts may be three times as large.
        retry_seconds: pause after ``on_complete`` or ``on_compared`` raised.
        grace_seconds: how long ``on_complete`` waits after a round's last answer, which can be taken back until then.
        on_compared: called likewise when people have judged a blind comparison of a round; it wakes no run.
    """

    def make_desk(folder: Path, comparison: str | None) -> Desk:
        if comparison is None:
            return Desk(folder, on_complete, priority, mode, retry_seconds, grace_seconds)
        return ComparisonDesk(folder, comparison, on_compared, retry_seconds)

    page = _Page(data, make_desk, per_second)
    ended = threading.Event()

    def watch() -> None:
        # Rounds also end without a request: by imported judgements, or before this server started.
        while not ended.wait(WATCH_SECONDS):
            page.desks.watch()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ended.clear()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        yield
        ended.set()
        watcher.join()
        for desk in page.desks.open():
            desk.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_pages(app, page)
    _add_actions(app, page)
    add_owner_pages(app, page)
    _add_errors(app, page)
    return Guard(app, hosts)


def _add_pages(app: FastAPI, page: _Page) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"service": "d3po label"}

    @app.get("/enter")
    def enter(request: Request, key: str = "", instead: str = "") -> Response:
        rater = page.raters.rater_of(key)
        if rater is None:  # count only wrong tries, so that nobody can block another's link
            if not page.tries.allows(request.client.host if request.client else ""):
                raise HTTPException(429, "Too many tries; wait a moment.")
            raise HTTPException(401, "This link is not valid (any more). Ask whoever sent it for a new one.")
        current = page.rater(request)
        if current is None and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            # The browser sends no strict cookie with a cross-site request, but does with one from our own page.
            return page.html("enter.html", rater=rater, url=f"/enter?key={quote(key)}")
        agreed = page.raters.opaque("instead", current or "", rater)  # no other site's page knows it
        if current not in (None, rater) and not hmac.compare_digest(agreed.encode(), instead.encode(errors="replace")):
            return page.html(
                "other.html", rater=rater, current=current, url=f"/enter?key={quote(key)}&instead={agreed}"
            )
        # A page that moves on by itself: browsers send no strict cookie along a redirect from another site.
        response = page.html("enter.html", rater=rater, url="/")
        response.set_cookie(COOKIE, key, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", path="/")
        return response

    @app.get("/")
    def start(request: Request) -> Response:
        rater = _signed_in(page, request)
        entries, waiting = page.entries(rater)
        return page.html("start.html", rater=rater, entries=entries, waiting=waiting)

    @app.get("/waiting")
    def waiting(request: Request) -> Response:
        entries, count = page.entries(_signed_in(page, request))
        return JSONResponse({"html": entries, "waiting": count}, headers={"cache-control": "no-store"})

    @app.get("/c/{name}")
    def label(request: Request, name: str) -> Response:
        rater = _signed_in(page, request)
        desk = page.desk(rater, name)
        return page.html("label.html", rater=rater, name=name, desk=desk, middle=page.middle(rater, desk))

    @app.get("/i/{token}")
    def image(request: Request, token: str) -> Response:
        path = page.image(_signed_in(page, request), token)
        if path is None or path.suffix not in MEDIA or not path.is_file():
            raise HTTPException(404, "There is no such image.")
        # No date and no tag: they would reveal when the image was made.
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
        rater = _signed_in(page, request)
        return reply(rater, page.desk(rater, name))

    @app.post("/c/{name}/judge")
    def judge(name: str, judged: Judged, rater: Annotated[str, Depends(acting)]) -> Response:
        desk = page.desk(rater, name)
        answer = judged.values if judged.action == "answer" else None
        note = desk.judge(rater, judged.ticket, judged.submission, answer, judged.seconds)
        return reply(rater, desk, note)

    @app.post("/c/{name}/undo")
    def undo(name: str, undone: Undone, rater: Annotated[str, Depends(acting)]) -> Response:
        desk = page.desk(rater, name)
        return reply(rater, desk, desk.undo(rater, undone.entry, undone.submission))

    @app.post("/c/{name}/report")
    def report(name: str, said: Reported, rater: Annotated[str, Depends(acting)]) -> Response:
        desk = page.desk(rater, name)
        return reply(rater, desk, desk.report(rater, said.ticket, said.submission, said.image, said.reason))


def _add_errors(app: FastAPI, page: _Page) -> None:
    def answer(request: Request, status: int, text: str) -> Response:
        if request.method == "POST" or request.url.path.endswith(("/next", "/waiting")):
            return JSONResponse({"error": text}, status, headers={"cache-control": "no-store"})
        return page.html("message.html", status, text=text)

    @app.exception_handler(RequestValidationError)
    def odd(request: Request, _: RequestValidationError) -> Response:
        # Never repeat the input: it is private, and may not fit into an answer.
        return answer(request, 422, "This is not what the page sends; reload it.")

    @app.exception_handler(AccessError)
    def closed(request: Request, error: AccessError) -> Response:
        if str(error) != page.closed:  # print it once, however many requests come
            print(error, file=sys.stderr, flush=True)
            page.closed = str(error)
        return answer(request, 503, "Nobody can be let in at the moment; the page's own log says why.")

    @app.exception_handler(OSError)
    def unreadable(request: Request, error: OSError) -> Response:
        return answer(request, 503, f"The page's files cannot be used at the moment: {error.strerror}")

    @app.exception_handler(StarletteHTTPException)
    def refused(request: Request, error: StarletteHTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail))

    @app.exception_handler(GoneError)
    def gone(request: Request, error: GoneError) -> Response:
        return answer(request, 410, page.shown(str(error)))

    @app.exception_handler(ConflictError)
    @app.exception_handler(UnfitError)
    def unfit(request: Request, error: D3POError) -> Response:
        return answer(request, 422, page.shown(str(error)))

    @app.exception_handler(D3POError)
    def failed(request: Request, error: D3POError) -> Response:
        return answer(request, 503, page.shown(str(error)))


def _signed_in(page: _Page, request: Request) -> str:
    rater = page.rater(request)
    if rater is None:
        raise HTTPException(
            401, "Open the link you were sent. If it no longer works, ask whoever sent it for a new one."
        )
    return rater
