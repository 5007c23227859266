"""Base of what the store keeps as JSON."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    """A frozen value that is stored as JSON.

    Older versions wrote fewer fields, and a newer one may have written more: a field that was not always there has a
    default, and unknown ones are left out.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", validate_by_name=True, ser_json_inf_nan="constants")

    def as_json(self) -> dict[str, Any]:
        """Return the fields that are set, as they are stored and as clients read them."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)
