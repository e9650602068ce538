"""`serve`: the page and its answers over HTTP, on this machine unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from aiohttp import web

from common.errors import UserError
from preference.study.store import CLIPS, AnswerSheet, read_study
from preference.study.trials import QUESTIONS


def application(folder: Path) -> web.Application:
    """The web application of the study in `folder`; answers are kept there.

    Raises:
        UserError: no study there.
    """
    study = read_study(folder)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("preference.study"), autoescape=True)
    page = environment.get_template("study.html").render(questions=QUESTIONS, frame_rate=study.frame_rate)
    files = {pair.file for pair in study.pairs}

    async def index(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    async def clip(request: web.Request) -> web.FileResponse:
        name = request.match_info["name"]
        if name not in files:
            raise web.HTTPNotFound
        return web.FileResponse(folder / CLIPS / name)

    async def session(request: web.Request) -> web.Response:
        sheet = AnswerSheet(folder, study, request.query.get("rater", ""))
        return _json({"trials": [trial.shown() for trial in sheet.trials], "answers": sheet.answers})

    async def answer(request: web.Request) -> web.Response:
        try:
            given = await request.json()
            rater, trial, question, choice = (given[name] for name in ("rater", "trial", "question", "choice"))
            number = int(trial)
        except (ValueError, KeyError, TypeError):
            raise UserError("an answer has rater, trial, question and choice") from None
        sheet = AnswerSheet(folder, study, str(rater))
        sheet.answer(number, question, choice)
        return _json({"answers": sheet.answers})

    app = web.Application(middlewares=[_errors])
    app.add_routes([web.get("/", index), web.get("/clips/{name}", clip)])
    app.add_routes([web.get("/session", session), web.post("/answer", answer)])
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except UserError as error:
        return _json({"error": str(error)}, status=400)
    return response


def _json(document: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(document, status=status, headers={"Cache-Control": "no-store"})


def serve(folder: Path, host: str, port: int) -> None:
    """Serve until interrupted. One process: answers of all raters pass through it one after the other."""
    app = application(folder)

    async def announce(_: web.Application) -> None:
        if host not in ("127.0.0.1", "::1", "localhost"):
            print("there is no password: whoever reaches this address can answer", flush=True)

    app.on_startup.append(announce)
    try:
        web.run_app(app, host=host, port=port, access_log=None)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
