"""All pages. One module each; a page that is new is named here, and in the menu if it has a place there."""

from fastapi import APIRouter

from web import adapters, datasets, docs_page, home, login, models, new_run, playground, runs, static_files

router = APIRouter()
for module in (static_files, docs_page, home, login, new_run, runs, playground, datasets, models, adapters):
    router.include_router(module.router)
router.include_router(new_run.posted)
router.include_router(login.posted)
