"""The owner's pages: what waits and for whom, agreement, invitations, quotas, how groups reach raters.

/owner/enter?key=TOKEN   turns the owner's token into a cookie that only these pages get
/owner                   all campaigns that people judge
/owner/c/NAME            one campaign; /next below it answers with the part that changes, and /invite, /link, /revoke,
                         /quota and /assignment act on it
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from d3po_core.errors import D3POError
from d3po_core.page.access import AccessError, Raters
from d3po_core.page.desk import described
from d3po_core.page.desks import NO_CAMPAIGN, Desks
from d3po_core.page.gate import LOCAL_HOSTS, Pace
from d3po_core.page.overview import Overviews, invitation_text
from d3po_core.people.invitations import MAX_QUOTA, Assignment, read_invitations, set_assignment, set_quota

COOKIE = "d3po_owner"
COOKIE_SECONDS = 60 * 60 * 24 * 90
NO_STORE = {"cache-control": "no-store"}
Name = Annotated[str, Field(max_length=400)]
Quota = Annotated[int, Field(ge=0, le=MAX_QUOTA)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Named(_Message):
    """The page's message about one rater; ``quota`` is the most groups per round, 0 for no limit."""

    rater: Name
    quota: Quota = 0


class Assigned(_Message):
    """The page's message about how groups reach raters."""

    assignment: Assignment


class Page(Protocol):
    """What the owner's pages need of the application."""

    raters: Raters
    desks: Desks
    tries: Pace

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page from a template."""

    def text(self, template: str, **values: Any) -> str:
        """A part of a page from a template."""


def add_owner_pages(app: FastAPI, page: Page) -> None:
    """Add the owner's pages to the application."""
    overviews = Overviews(page.raters)
    _add_pages(app, page, overviews)
    _add_actions(app, page, _Actions(page, overviews).act)


def _add_pages(app: FastAPI, page: Page, overviews: Overviews) -> None:
    def campaigns() -> str:
        rows = []
        for one in page.desks.listed():
            if not (one.desk and one.desk.blind):
                line, problem = None, one.problem
                if one.desk:
                    line, problem = overviews.line(one.desk.campaign)
                rows.append({"name": one.name, "line": line, "problem": problem, "there": one.desk is not None})
        return page.text("owner_campaigns.html", rows=rows, problem=page.desks.problem)

    @app.get("/owner/enter")
    def owner_enter(request: Request, key: str = "") -> Response:
        if not page.raters.is_owner(key):  # count only wrong tries, so that nobody can block the owner
            if not page.tries.allows(request.client.host if request.client else ""):
                raise HTTPException(429, "Too many tries; wait a moment.")
            raise HTTPException(401, "This is not the owner's link. d3po label prints it in a terminal.")
        # A page that moves on by itself: browsers send no strict cookie along a redirect from another site.
        response = page.html("owner_enter.html")
        response.set_cookie(COOKIE, key, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", path="/owner")
        return response

    @app.get("/owner")
    def owner_start(request: Request) -> Response:
        _require_owner(page, request)
        return page.html("owner.html", name="", base="/owner", live=campaigns())

    @app.get("/owner/next")
    def owner_start_next(request: Request) -> Response:
        _require_owner(page, request)
        return JSONResponse({"html": campaigns()}, headers=NO_STORE)

    @app.get("/owner/c/{name}")
    def owner_campaign(request: Request, name: str) -> Response:
        folder = _folder(page, request, name)
        return page.html("owner.html", name=name, base=f"/owner/c/{name}", live=_live(page, overviews, folder))

    @app.get("/owner/c/{name}/next")
    def owner_next(request: Request, name: str) -> Response:
        folder = _folder(page, request, name)
        return JSONResponse({"html": _live(page, overviews, folder)}, headers=NO_STORE)


class _Actions:
    """Carries out what the owner asks for, and answers with the part of the page that changed."""

    def __init__(self, page: Page, overviews: Overviews) -> None:
        self._page, self._overviews = page, overviews

    def act(self, request: Request, name: str, change: Callable[[Path], str], link_of: str | None = None) -> Response:
        """Change something in a campaign's folder; ``change`` returns a note, ``link_of`` is a rater to hand over."""
        folder = _folder(self._page, request, name)
        try:
            note = change(folder)
            more = {} if link_of is None else self._handed_over(request, folder, link_of)
        except AccessError:
            raise
        except D3POError as error:
            raise HTTPException(422, str(error).replace(f"{folder.parent.parent}/", "")) from None
        content = {"html": _live(self._page, self._overviews, folder), "note": note, **more}
        return JSONResponse(content, headers=NO_STORE)

    def _handed_over(self, request: Request, folder: Path, rater: str) -> dict[str, str]:
        """A rater's link, and a text with it; ``local`` is empty if other machines can use the link."""
        raters = self._page.raters
        if rater not in {*raters.admitted(folder), *read_invitations(folder).standing}:
            raise D3POError(f"{rater} may not judge {folder.name}; invite them first")
        # A campaign that was moved here brings invitations without links.
        link = f"{request.url.scheme}://{request.headers['host']}/enter?key={raters.token(rater, guest=True)}"
        local = "yes" if (request.url.hostname or "") in LOCAL_HOSTS else ""
        return {"rater": rater, "link": link, "text": invitation_text(rater, folder, link), "local": local}


def _add_actions(app: FastAPI, page: Page, act: Callable[..., Response]) -> None:
    @app.post("/owner/c/{name}/invite")
    def owner_invite(request: Request, name: str, sent: Named) -> Response:
        def change(folder: Path) -> str:
            page.raters.invite(folder, sent.rater, sent.quota)
            return f"{sent.rater} is invited."

        return act(request, name, change, link_of=sent.rater)

    @app.post("/owner/c/{name}/link")
    def owner_link(request: Request, name: str, sent: Named) -> Response:
        return act(request, name, lambda _: "", link_of=sent.rater)

    @app.post("/owner/c/{name}/revoke")
    def owner_revoke(request: Request, name: str, sent: Named) -> Response:
        def change(folder: Path) -> str:
            page.raters.revoke(folder, sent.rater)
            return f"The link of {sent.rater} no longer works; their answers stay."

        return act(request, name, change)

    @app.post("/owner/c/{name}/quota")
    def owner_quota(request: Request, name: str, sent: Named) -> Response:
        def change(folder: Path) -> str:
            set_quota(folder, sent.rater, sent.quota)
            return f"{sent.rater}: " + (f"at most {sent.quota} groups per round." if sent.quota else "no limit.")

        return act(request, name, change)

    @app.post("/owner/c/{name}/assignment")
    def owner_assignment(request: Request, name: str, sent: Assigned) -> Response:
        def change(folder: Path) -> str:
            set_assignment(folder, sent.assignment)
            split = sent.assignment == "split"
            return "Each group has its own raters now." if split else "Everybody may judge every group now."

        return act(request, name, change)


def _live(page: Page, overviews: Overviews, folder: Path) -> str:
    """The part of a campaign's page that changes; a failure is shown in its place."""
    try:
        return page.text("owner_live.html", problem=None, view=overviews.of(folder))
    except AccessError:
        raise
    except Exception as error:  # whatever the damage: show it, and look again later
        return page.text("owner_live.html", problem=described(error).replace(f"{folder.parent.parent}/", ""))


def _require_owner(page: Page, request: Request) -> None:
    if not page.raters.is_owner(request.cookies.get(COOKIE, "")):
        raise HTTPException(401, "Open the owner's link that d3po label prints in a terminal.")


def _folder(page: Page, request: Request, name: str) -> Path:
    _require_owner(page, request)
    desk = page.desks.desk(name)
    if desk.blind:
        raise HTTPException(404, NO_CAMPAIGN)
    return desk.campaign
