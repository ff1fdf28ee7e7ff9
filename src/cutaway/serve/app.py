"""The application: the page's files, and what they ask of the model, with an OpenAPI document.

A page to come (features, graphs, chat) brings its files into `page/`, its records into `wire.py` and a router of its
own that `create_app` includes; the guard, the errors and the lock on the model are here already.
"""

from importlib.resources import files

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cutaway import __version__
from cutaway.artifacts.errors import CutawayError
from cutaway.draw.page import HEADER
from cutaway.draw.style import asset, stylesheet
from cutaway.model.language_model import LanguageModel
from cutaway.serve.guard import Guard
from cutaway.serve.live import LiveModel
from cutaway.serve.wire import Look, ModelCard, Outcome, Pattern, Problem, Question, Reading, Trial

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def create_app(lm: LanguageModel) -> FastAPI:
    """The live page of a model as an ASGI application, for 127.0.0.1 and localhost alone.

    Args:
        lm: the model; it is run by one request at a time.

    Returns:
        The application; its OpenAPI document is at /api/openapi.json.

    Example:
        >>> app = create_app(cutaway.load("atlas"))
        >>> sorted(app.openapi()["paths"])
        ['/api/change', '/api/look', '/api/model', '/api/read']
    """
    app = FastAPI(
        title="cutaway, live",
        description="Look into one model and change it. Every request carries its whole state; nothing is kept.",
        version=__version__,
        docs_url=None,  # Swagger's page fetches its script from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.add_middleware(Guard)
    app.include_router(_page())
    app.include_router(_look_router(LiveModel(lm)))

    def refused(_request: Request, error: Exception) -> Response:
        return _problem(422, str(error))

    def malformed(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
        return _problem(422, f"{where}: {str(first['msg'])[:1].lower()}{str(first['msg'])[1:]}.")

    def not_there(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, f"{error.detail}; this server has / and /api/openapi.json.")

    def defect(_request: Request, error: Exception) -> Response:
        return _problem(500, f"cutaway failed here ({type(error).__name__}); its terminal says where.")

    app.add_exception_handler(CutawayError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, not_there)
    app.add_exception_handler(Exception, defect)
    return app


def _problem(status: int, sentence: str) -> Response:
    return JSONResponse({"error": " ".join(sentence.splitlines())}, status)


def _page() -> APIRouter:
    """The page's files, each at its own name; they are read once."""
    router = APIRouter(include_in_schema=False)
    texts = {"cutaway.css": f"{stylesheet()}\n{asset('frame.css')}", "theme.js": asset("theme.js")}
    texts |= {
        file.name: file.read_text(encoding="utf-8")
        for file in files("cutaway.serve").joinpath("page").iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }
    texts["index.html"] = texts["index.html"].replace("<header></header>", HEADER)

    def serve(path: str, text: str, kind: str) -> None:
        router.add_api_route(path, lambda: Response(text, media_type=_TYPES[kind]), methods=["GET"])

    for name, text in texts.items():
        serve("/" if name == "index.html" else f"/{name}", text, name.rpartition(".")[2])
    return router


def _look_router(live: LiveModel) -> APIRouter:
    """What the first page asks: read a text, change the run, look at a head."""
    router = APIRouter(prefix="/api", tags=["look"], responses={422: {"model": Problem}})

    @router.get("/model")
    def model() -> ModelCard:
        """The model that is served, and texts to begin with."""
        return live.card()

    @router.post("/read")
    def read(question: Question) -> Reading:
        """Tokens, lens and attribution of a text."""
        return live.read(question)

    @router.post("/change")
    def change(trial: Trial) -> Outcome:
        """The answer under edits, beside noise of the same size in the same places."""
        return live.change(trial)

    @router.post("/look")
    def look(look: Look) -> Pattern:
        """Where one head looks, under the edits."""
        return live.look(look)

    return router
