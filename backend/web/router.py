"""All pages. One module each; a page that is new is named here, and in the menu if it has a place there."""

from fastapi import APIRouter

from web import datasets, docs_page, home, playground, runs, static_files

router = APIRouter()
for module in (static_files, datasets, docs_page, home, playground, runs):
    router.include_router(module.router)
