"""Every route under /v1."""

from fastapi import APIRouter

from api.openai import chat, files, fine_tuning, models, uploads
from api.openai.schemas import ErrorAnswer
from domain.openai.errors import PREFIX

router = APIRouter(
    prefix=PREFIX, responses={"default": {"model": ErrorAnswer, "description": "An error in OpenAI's envelope."}}
)
for module in (files, uploads, fine_tuning, models, chat):
    router.include_router(module.router)
