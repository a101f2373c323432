"""The browser's web application: pages rendered here, without JavaScript; it only reads.

/enter?key=SECRET            turns the secret of the printed link into a cookie
/                            all campaigns
/c/NAME                      images of a campaign, with filters
/c/NAME/story/SAMPLE_ID      everything known about an image
/c/NAME/small/SAMPLE_ID      a thumbnail; /c/NAME/image/SAMPLE_ID the image itself
"""

import hmac
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import jinja2
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from d3po_core.browser.gallery import ORDERS, PAGE_SIZE, Filters, Gallery
from d3po_core.browser.thumbnails import thumbnail
from d3po_core.errors import D3POError
from d3po_core.image_ids import is_imported
from d3po_core.page.gate import Guard
from d3po_core.paths import data_folder
from d3po_core.queries.lookup import image_story
from d3po_core.report.campaigns import campaign_states
from d3po_core.store.campaign import campaign_names

COOKIE = "d3po_browse"
LAST_PAGE = 10**9  # a database counts images in 64 bits
# The filters are a plain form; everything else stays as strict as on the labelling page.
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HERE = Path(__file__).resolve().parent


class _Shelf:
    """State that the routes share: the galleries that were opened, and the templates."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._galleries: dict[str, Gallery] = {}
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self._templates.filters["options"] = lambda values: [(value, value) for value in values]

    def gallery(self, name: str) -> Gallery:
        """The gallery of a campaign.

        Raises:
            HTTPException: there is no such campaign.
        """
        # Compare with the folders that exist, so that a name never becomes a path.
        if name not in campaign_names():
            raise HTTPException(404, f"There is no campaign {name!r}.")
        return self._galleries.setdefault(name, Gallery(self.runs / name))

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = self._templates.get_template(template).render(**values)
        whole = text.encode(errors="backslashreplace")  # a folder's name may be no UTF-8
        return HTMLResponse(whole, status, headers={"cache-control": "no-store", "content-security-policy": POLICY})


def create_app(secret: str) -> Guard:
    """Return the browser over the campaigns of the data folder, as an ASGI application.

    Args:
        secret: what the link must hold to be let in.
    """
    shelf = _Shelf(data_folder() / "runs")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_door(app, secret)
    _add_pages(app, shelf, secret)
    _add_images(app, shelf, secret)
    _add_errors(app, shelf)
    return Guard(app, remedy="open the page as http://127.0.0.1:PORT")


def _add_door(app: FastAPI, secret: str) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"service": "d3po browse"}

    @app.get("/enter")
    def enter(key: str = "") -> Response:
        if not _same(key, secret):
            raise HTTPException(401, "This link is not valid any more. Open the one that d3po browse printed last.")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, key, httponly=True, samesite="lax", path="/")
        return response

    @app.get("/static/style.css")
    def style() -> Response:
        return FileResponse(HERE / "static" / "style.css", headers={"cache-control": "no-cache"})


def _add_pages(app: FastAPI, shelf: _Shelf, secret: str) -> None:
    inside = [Depends(_keyholder(secret))]

    @app.get("/", dependencies=inside)
    def campaigns() -> Response:
        return shelf.html("campaigns.html", campaigns=campaign_states(), runs=shelf.runs)

    @app.get("/c/{name}", dependencies=inside)
    def images(name: str, filters: Annotated[Filters, Depends(_filters)], page: int = 1) -> Response:
        gallery, page = shelf.gallery(name), min(max(page, 1), LAST_PAGE)
        found = gallery.page(filters, page)
        chosen = {key: value for key, value in asdict(filters).items() if value is not None}
        return shelf.html(
            "gallery.html", name=name, filters=filters, found=found, number=page,
            last=max(1, -(-found.total // PAGE_SIZE)), query=urlencode(chosen), orders=list(ORDERS),
            rounds=gallery.rounds(), scorers=gallery.scorers(), filtered=chosen.keys() - {"order"},
        )  # fmt: skip

    @app.get("/c/{name}/story/{sample_id}", dependencies=inside)
    def story(name: str, sample_id: str) -> Response:
        gallery = shelf.gallery(name)
        if gallery.image_path(sample_id) is None:
            raise HTTPException(404, f"There is no image {sample_id!r} in campaign {name!r}.")
        found = image_story(gallery.campaign, sample_id)
        imported = is_imported(found.image.get("trajectory_path", ""))
        return shelf.html("story.html", name=name, id=sample_id, story=found, imported=imported)


def _add_images(app: FastAPI, shelf: _Shelf, secret: str) -> None:
    inside = [Depends(_keyholder(secret))]
    kept = {"cache-control": "private, max-age=3600"}

    def path_of(name: str, sample_id: str) -> Path:
        path = shelf.gallery(name).image_path(sample_id)
        if path is None or not path.is_file():
            raise HTTPException(404, "There is no such image, or its file was removed.")
        return path

    @app.get("/c/{name}/small/{sample_id}", dependencies=inside)
    def small(name: str, sample_id: str) -> Response:
        made = thumbnail(path_of(name, sample_id))
        if made is None:
            raise HTTPException(404, "The image's file cannot be read; d3po check lists damaged files.")
        return Response(made[0], media_type=made[1], headers=kept)

    @app.get("/c/{name}/image/{sample_id}", dependencies=inside)
    def image(name: str, sample_id: str) -> Response:
        return FileResponse(path_of(name, sample_id), headers=kept)


def _add_errors(app: FastAPI, shelf: _Shelf) -> None:
    @app.exception_handler(StarletteHTTPException)
    def refused(_: Request, error: StarletteHTTPException) -> Response:
        return shelf.html("message.html", error.status_code, text=str(error.detail))

    @app.exception_handler(RequestValidationError)
    def odd(_: Request, error: RequestValidationError) -> Response:
        fields = ", ".join(sorted({str(problem["loc"][-1]) for problem in error.errors()}))
        return shelf.html("message.html", 422, text=f"These filters have a value that does not fit: {fields}.")

    @app.exception_handler(D3POError)
    def failed(_: Request, error: D3POError) -> Response:
        return shelf.html("message.html", 503, text=str(error))


def _filters(request: Request) -> Filters:
    """Filters of the form; an empty field does not filter.

    Raises:
        RequestValidationError: a value does not fit its field.
    """
    from pydantic import TypeAdapter, ValidationError

    given = {key: value for key, value in request.query_params.items() if value and key != "page"}
    try:
        found = TypeAdapter(Filters).validate_python({"order": "newest"} | given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    if found.order not in ORDERS:
        raise RequestValidationError([{"loc": ("order",)}])
    return found


def _keyholder(secret: str) -> Any:
    def check(request: Request) -> None:
        if not _same(request.cookies.get(COOKIE, ""), secret):
            raise HTTPException(401, "Open the link that d3po browse printed.")

    return check


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())
