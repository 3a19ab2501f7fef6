"""The base of every typed config: immutable, unknown keys refused, wrong types never converted silently."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base class of all config sections; `mvit.config` turns its errors into messages that name key and remedy."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
