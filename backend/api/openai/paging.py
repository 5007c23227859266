"""Pages of lists, and their parameters."""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from core.errors import SettingRejected
from domain.openai.files import NoSuchPlace, Page, page

T = TypeVar("T")
After = Annotated[str | None, Query(max_length=300, description="The id of the item before the page.")]


def page_of(items: Sequence[T], id_of: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Return a page of a list.

    Raises:
        SettingRejected: The list has no item `after`.
    """
    try:
        return page(items, id_of, after, limit)
    except NoSuchPlace as error:
        raise SettingRejected(str(error), errors=[{"location": ["after"], "message": str(error)}]) from error
