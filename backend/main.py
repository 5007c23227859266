"""The server: `python main.py` listens on 127.0.0.1:8000."""

import sys

if sys.platform == "win32":  # before anything that only POSIX has is imported
    sys.exit("The server does not run natively on Windows. Use WSL 2 (`wsl --install`); a GPU works there too.")

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware.cors import CORSMiddleware

from api import adapters, compatibility, datasets, exports, hardware, models, peft, problems, service, training
from api.connection import Connection
from api.guard import Guard
from api.openai import routes as openai
from api.strict_json import StrictJson
from core.errors import StorageFull, StudioError
from core.home_lock import HomeTaken
from core.logging import configure_logging, get_logger
from core.settings import Settings, SettingsRejected, get_settings
from core.start_checks import check_host, make_cache_dir, open_home, unreadable_model_dirs
from core.version import VERSION
from services.adapter_service import get_adapter_service
from services.dataset_service import get_dataset_service
from services.engine_service import get_engines
from services.export_service import get_export_service
from services.file_service import get_file_service
from services.model_registry_service import get_model_registry_service
from services.models.shapes import get_model_shapes
from services.peft_service import get_peft_service
from services.training.dataset_analysis import get_dataset_analysis_service
from services.training_service import get_training_service
from store import sqlite_file
from store.database import get_database
from web import router as pages

_GRACE_S = 5  # for requests under way when the server is told to stop; event streams do not end by themselves


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await asyncio.to_thread(get_dataset_service().remove_leftovers)
    await asyncio.to_thread(get_adapter_service().remove_leftovers)
    await asyncio.to_thread(get_file_service().start)
    await asyncio.to_thread(get_training_service().start)
    await asyncio.to_thread(get_export_service().start)
    backup = asyncio.create_task(asyncio.to_thread(_back_up))
    await asyncio.to_thread(get_engines().start)
    look = asyncio.create_task(asyncio.to_thread(get_model_registry_service().log_left_out))
    yield
    await asyncio.gather(backup, look)
    await asyncio.to_thread(stop_services)


def _back_up() -> None:
    path = get_settings().sqlite_path
    if path is None:
        return
    try:
        if sqlite_file.back_up(path):
            get_logger(__name__).info("database.backed_up", path=str(sqlite_file.backup_of(path)))
    except (StorageFull, sqlite3.Error, OSError) as error:
        get_logger(__name__).warning("database.not_backed_up", reason=str(error))


def stop_services() -> None:
    """End the running job and exports as interrupted, every engine, and the database's connections."""
    # Training first: its checkpoint is what must be on the disk before whoever stopped the server loses patience.
    for training_service in filter(None, (get_training_service.made,)):
        training_service.close()
    for export_service in filter(None, (get_export_service.made,)):
        export_service.close()
    for file_service in filter(None, (get_file_service.made,)):
        file_service.close()
    for analysis_service in filter(None, (get_dataset_analysis_service.made,)):
        analysis_service.close()
    for peft_service in filter(None, (get_peft_service.made,)):
        peft_service.close()
    for shapes in filter(None, (get_model_shapes.made,)):
        shapes.close()
    for engines in filter(None, (get_engines.made,)):
        engines.close()
    for database in filter(None, (get_database.made,)):
        database.close()


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application."""
    settings = settings or get_settings()
    app = FastAPI(
        title="PEFT Studio",
        version=VERSION,
        summary="Parameter-efficient fine-tuning of language models over HTTP.",
        lifespan=_lifespan,
        docs_url=None,  # ours works without a network
        redoc_url=None,
        responses={"default": {"model": problems.Problem, "description": "A problem document (RFC 9457)."}},
    )
    problems.install(app)
    # compatibility before models: the latter's last route takes every path below /api/models.
    for module in (service, hardware, compatibility, models, peft, datasets, training, adapters, exports, openai):
        app.include_router(module.router)
    app.include_router(pages.router)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Location", "X-Request-ID"],
        )
    app.add_middleware(StrictJson)
    app.add_middleware(Guard, settings=settings, is_page=pages.is_page)
    return app


def _prepare(settings: Settings) -> IO[str]:
    """Try everything that could make a start fail, with one plain line for what does.

    Returns:
        The open lock file of the data directory; keep it.

    Raises:
        SettingsRejected, HomeTaken, DatabaseDamaged, OSError: The server cannot start; the message says why.
    """
    check_host(settings)
    lock = open_home(settings)
    make_cache_dir(settings)
    if settings.sqlite_path is not None:
        sqlite_file.check(settings.sqlite_path)
    configure_logging(settings)
    try:
        get_database()
    except (StudioError, SQLAlchemyError, OSError, ImportError) as error:  # the last: a driver that is not installed
        place = "PEFT_STUDIO_DATABASE_URL" if settings.database_url is not None else str(settings.sqlite_path)
        raise SettingsRejected((f"{place}: the database cannot be used: {error}",)) from error
    for folder, reason in unreadable_model_dirs(settings):
        get_logger(__name__).warning(
            "model_folder.left_out", variable="PEFT_STUDIO_MODEL_DIRS", path=str(folder), reason=reason
        )
    return lock


def main() -> int:
    """Serve until a signal; returns the exit code."""
    try:
        settings = get_settings()
        lock = _prepare(settings)
    except (SettingsRejected, HomeTaken, sqlite_file.DatabaseDamaged, OSError) as error:
        for line in str(error).splitlines():
            print(f"peft-studio: {line}", file=sys.stderr)  # noqa: T201
        return 2
    with lock:
        uvicorn.run(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            log_config=None,
            timeout_graceful_shutdown=_GRACE_S,
            server_header=False,
            http=Connection,
            ws="none",  # no route speaks it
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
