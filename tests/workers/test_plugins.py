"""Tests of plug-ins: a bad plug-in makes only its own job type unusable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installation import Installation, http_client
from tests.support.plugins import MODULE_TEMPLATE, install_plugin

BAD_PLUGINS = {
    "exits": ("import sys; sys.exit(3)", "SystemExit"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "leaves": ("raise GeneratorExit", "GeneratorExit"),
    "recurses": ("def f(): return f()\nf()", "RecursionError"),
    "misspelt": ("def f(:", "SyntaxError"),
    "raises": ("raise RuntimeError('no licence file')", "no licence file"),
    "mute": ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "no error text"),
    "needs": ("import a_package_that_is_missing", "install the package with 'a_package_that_is_missing'"),
    "sleeps": ("import time; time.sleep(1000)", "to import: do not do work at import"),
    "loops": ("while True: pass", "to import: do not do work at import"),
    "function": ("def ValidProcessor(settings): pass", "expected a job function"),
    "synchronous": ("ValidProcessor.run = lambda self, job: Results()", "`run` must be asynchronous"),
    "hidden": (
        "def make():\n    class P(BaseModel): pass\n    return P\nValidProcessor.Parameters = make()",
        "`Parameters` cannot be imported as plugin_hidden:make.<locals>.P",
    ),
    "retries": ("ValidProcessor.retry = 3", "`retry` must be a jobledger.Retry or None, not 3"),
    "timely": ("ValidProcessor.timeout = 'soon'", "`timeout`: timeout must be a duration"),
    "timeless": ("ValidProcessor.timeout = 0", "`timeout`: timeout must be more than 0 and at most 7 days, got 0"),
    "versioned": ("ValidProcessor.version = 1.5", "`version` must be text or an integer, not 1.5"),
    "typeless": ("del ValidProcessor.job_type", "`job_type` None must equal"),
    "mistyped": ("ValidProcessor.job_type = 'echo'", "`job_type` 'echo' must equal"),
    "runless": ("del ValidProcessor.run", "run(self, job)` is missing"),
    "isolated": ("ValidProcessor.isolation = 'thread'", "`isolation` must be"),
    "unisolated": ("del ValidProcessor.isolation", "`isolation` must be"),
    "parameterless": ("del ValidProcessor.Parameters", "`Parameters` must be"),
    "unset": ("ValidProcessor.Settings = dict", "`Settings` must be"),
    "schemaless": (
        "class P(BaseModel):\n    @classmethod\n"
        "    def model_json_schema(cls, *a, **k): raise RuntimeError('no schema')\nValidProcessor.Parameters = P",
        "no schema",
    ),
    "argless": ("ValidProcessor.__init__ = lambda self: None", "expected `__init__(self, settings)`"),
    "preloads": ("ValidProcessor.preload = ('a_package_that_is_missing.x',)", "is not installed"),
    "preloadless": ("ValidProcessor.preload = 'os'", "`preload` must be a tuple"),
}
PRELOADED = {
    "dies": "import os; os._exit(9)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "fails": "raise RuntimeError('no graphics card')",
    "works": "",
}
SHARED_DIRECTORIES = {
    "raise": "raise ValueError('no directory for shared files')",
    "none": "return None",
    "text": "return '/tmp'",
    "later": "return 1 / 0 if current_thread() is main_thread() else []",  # fails only in the job process
    "nowhere": "return [Path('/proc/nope/x')]",
}
LIST = """
import json, jobledger.workers.registry as registry
registry.LOAD_SECONDS = 1
print(json.dumps([sorted(registry.load_processors()), registry.get_unusable_job_types()]))
"""


def test_registry_with_bad_plugins_names_each_and_loads_the_others(tmp_path: Path) -> None:
    for job_type, (code, _) in BAD_PLUGINS.items():
        install_plugin(tmp_path, job_type, code)
    install_plugin(tmp_path, "attributeless", attribute="Missing")
    install_plugin(tmp_path, "healthy")
    for number in (1, 2):
        info = tmp_path / f"twin{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twin{number}\nVersion: 1.0\n")
        entries = f"twice = plugin_healthy:ValidProcessor{number}\necho = plugin_healthy:Echo{number}"
        (info / "entry_points.txt").write_text(f"[jobledger.processors]\n{entries}\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    completed = subprocess.run(
        [sys.executable, "-c", LIST], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    usable, unusable = json.loads(completed.stdout)
    assert usable == ["echo", "healthy", "session"]
    assert set(unusable) == {*BAD_PLUGINS, "attributeless", "twice"}
    for job_type, (_, reason) in BAD_PLUGINS.items():
        assert reason in unusable[job_type], (job_type, unusable[job_type])
    assert "uninstall all but one" in unusable["twice"]


def test_up_with_bad_plugins_runs_the_other_job_types(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = tmp_path / "plugins"
    install_plugin(plugins, "raises", BAD_PLUGINS["raises"][0])
    install_plugin(plugins, "healthy")
    with_settings = "class S(BaseModel):\n    endpoint: str\nValidProcessor.Settings = S"
    install_plugin(plugins, "unconfigured", with_settings)
    install_plugin(plugins, "misconfigured", with_settings, template=MODULE_TEMPLATE)
    for job_type, library in PRELOADED.items():
        (plugins / f"library_{job_type}.py").write_text(library, encoding="utf-8")
        install_plugin(
            plugins, job_type, f"ValidProcessor.isolation = 'process'\nValidProcessor.preload = ('library_{job_type}',)"
        )
    for name, code in SHARED_DIRECTORIES.items():
        shared_code = (
            f"from pathlib import Path\nfrom threading import current_thread, main_thread\ndef shared():\n    {code}\n"
        )
        shared_code += "ValidProcessor.isolation = 'process'\nValidProcessor.shared_directories = staticmethod(shared)"
        install_plugin(plugins, f"sharing-{name}", shared_code)
    monkeypatch.setenv("PYTHONPATH", str(plugins))
    sections = {"misconfigured": {"endpoint": 7}, "raises": {"any": "thing"}}
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path / "installation", mongodb=mongodb, processors=sections) as installation:
        up = installation.start_up_command()
        with http_client(up) as client:
            for job_type in ("echo", "healthy", "works"):
                response = client.post(
                    "/api/events/jobs", json={"job_type": job_type, "parameters": {}}, headers={"Prefer": "wait=60"}
                )
                assert response.json()["job"]["status"] == "completed", response.text
            for job_type, reason in {
                "raises": "no licence file",
                "unconfigured": "processors.unconfigured.endpoint: Field required",
                "misconfigured": "processors.misconfigured.endpoint",
                "dies": "end the process",
                "crashes": "end the process",
                "fails": "no graphics card",
                "sharing-raise": "no directory for shared files",
                "sharing-none": "must return a list or tuple of paths, not a NoneType",
                "sharing-text": "must return a list or tuple of paths, not a str",
            }.items():
                rejected = client.post("/api/events/jobs", json={"job_type": job_type, "parameters": {}})
                assert rejected.status_code == 503, rejected.text
                assert reason in rejected.text
                assert f"job_type={job_type}" in up.stderr
            for job_type, reason in {"sharing-later": "ZeroDivisionError", "sharing-nowhere": "/proc/nope"}.items():
                body = {"job_type": job_type, "parameters": {}, "max_attempts": 1}
                job = client.post("/api/events/jobs", json=body, headers={"Prefer": "wait=60"}).json()["job"]
                assert (job["status"], job["attempt"]) == ("failed", 1), job
                assert job["error"]["code"] == "PROCESSOR_FAULT"
                assert reason in job["error"]["message"]
            assert client.get("/api/openapi.json").status_code == 200
        assert "preloading processor modules failed" not in up.stderr, "modules that fail are not preloaded"
        doctor = installation.start("doctor").wait_for_exit()
        assert doctor.exit_code == 1
        assert "no licence file" in " ".join(doctor.out.split())


def test_up_with_plugins_that_echo_secrets_shows_none_in_reasons_and_logs(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins, key_file = tmp_path / "plugins", tmp_path / "key"
    key_file.write_text("p4ss-in-a-file\n")
    monkeypatch.setenv("PYTHONPATH", str(plugins))
    monkeypatch.setenv("PLUGIN_API_KEY", "s3cret-of-the-environment")
    install_plugin(plugins, "imports", "import os\nraise RuntimeError(f'bad key {os.environ[\"PLUGIN_API_KEY\"]}')")
    validating = """
        from pydantic import SecretStr, model_validator
        class S(BaseModel):
            api_key: str
            declared: SecretStr
            api_key_file: str
            @model_validator(mode="after")
            def check(self):
                content = open(self.api_key_file).read().strip()
                raise EXCEPTION(f"bad key {self.api_key} {self.declared.get_secret_value()} {content}")
        ValidProcessor.Settings = S
        """
    install_plugin(plugins, "validates", validating.replace("EXCEPTION", "ValueError"))
    install_plugin(plugins, "crashes", validating.replace("EXCEPTION", "RuntimeError"))
    callbacks = """
        import asyncio, logging
        async def run(self, job):
            key = open(self.settings["api_key_file"]).read().strip()
            def fail():
                raise SystemExit(f"bad key {key}")
            asyncio.get_running_loop().call_soon(fail)
            logging.getLogger("plugin").error("bad key %s", key)
            await asyncio.sleep(0.1)
            return Results()
        ValidProcessor.__init__ = lambda self, settings: setattr(self, "settings", settings.model_extra)
        ValidProcessor.run = run
        """
    install_plugin(plugins, "calls", callbacks)
    section = {"api_key": "k3y-in-the-section", "declared": "d3clared-secret", "api_key_file": str(key_file)}
    sections = {
        "validates": section,
        "crashes": section,
        "calls": {"api_key_file": str(key_file)},
    }
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path / "installation", mongodb=mongodb, processors=sections) as installation:
        up = installation.start_up_command()
        with http_client(up) as client:
            for job_type, secrets in (("imports", 1), ("validates", 3), ("crashes", 3)):
                rejected = client.post("/api/events/jobs", json={"job_type": job_type, "parameters": {}})
                assert rejected.status_code == 503, rejected.text
                assert " ".join(["bad key", *["[secret]"] * secrets]) in rejected.text
            response = client.post(
                "/api/events/jobs", json={"job_type": "calls", "parameters": {}}, headers={"Prefer": "wait=60"}
            )
            assert response.json()["job"]["status"] == "completed", response.text
        assert up.stderr.count("bad key [secret]") >= 5
        assert not [secret for secret in ("s3cret-of", "k3y-in", "p4ss-in", "d3clared") if secret in up.stderr]
