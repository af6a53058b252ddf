"""Install processors as plug-ins: a module and its entry point in PYTHONPATH."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

MODULE_TEMPLATE = """
from pydantic import BaseModel
from jobledger.workers.processor import Results

class AnyFields(BaseModel):
    model_config = {"extra": "allow"}

class ValidProcessor:
    job_type = "JOB_TYPE"
    isolation = "inline"
    preload = ()
    Parameters = AnyFields
    Settings = AnyFields

    def __init__(self, settings):
        pass

    async def run(self, job):
        return Results()
"""
"""A complete processor `ValidProcessor` that the code after it can modify."""


def install_plugin(
    directory: Path,
    job_type: str,
    code: str = "",
    *,
    attribute: str = "ValidProcessor",
    template: str = MODULE_TEMPLATE,
) -> None:
    """Install a processor to `directory`, which must be in PYTHONPATH."""
    module = f"plugin_{job_type.replace('-', '_')}"
    directory.mkdir(exist_ok=True)
    (directory / f"{module}.py").write_text(template.replace("JOB_TYPE", job_type) + dedent(code), encoding="utf-8")
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    entry_point = f"[jobledger.processors]\n{job_type} = {module}:{attribute}\n"
    (info / "entry_points.txt").write_text(entry_point, encoding="utf-8")
