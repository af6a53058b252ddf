"""The base of all models of config.yaml. The package that uses a section defines its model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SettingsSection(BaseModel):
    """A section of config.yaml, which documents the keys. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
