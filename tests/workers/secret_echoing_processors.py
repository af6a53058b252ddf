"""Install the job types `echo-secrets` and `echo-secrets-inline`. They report their secrets, as services echo them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobledger.workers import registry
from jobledger.workers.child.fork_server_client import fork_server_client
from jobledger.workers.registry import get_processor_version
from tests.support.plugins import install_plugin

ENVIRONMENT_SECRET = "environment-s3cret-4711"
_CODE = """
import asyncio, ctypes, json, os, sys
from base64 import b64encode
from urllib.parse import quote
from pydantic import Field, RootModel, SecretStr
from jobledger import ProcessorError


class EchoSecrets(ValidProcessor):
    isolation = "process"

    class Settings(BaseModel):
        model_config = {"extra": "allow"}
        declared: SecretStr = SecretStr("")

    def __init__(self, settings):
        self.secrets = [settings.declared.get_secret_value(), *(settings.model_extra or {}).get("passwords", [])]
        if file := (settings.model_extra or {}).get("api_key_file"):
            self.secrets.append(open(file).read().strip())
        self.secrets.append(os.environ.get("TEST_API_KEY", ""))
        self.secrets = [secret for secret in self.secrets if secret]

    async def run(self, job):
        self.job = job
        return await getattr(self, job.parameters.model_extra["action"])() or Results()

    async def report(self):
        echo = "Invalid key " + ", ".join(self.secrets)
        await self.job.log("info", echo)
        await self.job.log("error", json.dumps({"text": echo}) + quote(echo))
        await self.job.report_progress(50, echo)

        async def step():
            await self.job.warn(echo)
            return {"answer": echo}

        output = await self.job.step("ask with " + self.secrets[0], step)
        await self.job.warn(echo)
        file = await self.job.save("echo-" + self.job.job_id + ".md", echo.encode(), "text/markdown")
        return Results(markdown=file, metadata={"answer": output["answer"]})

    async def warn_only(self):
        await self.job.warn("Invalid key " + ", ".join(self.secrets))

    async def cut(self):
        for secret in self.secrets:
            for offset in range(len(secret) + 1):
                await self.job.log("info", "x" * (10_000 - offset) + secret + "y" * 100)
                await self.job.warn("x" * (2_000 - offset) + secret + "y" * 100)

    async def cut_names(self):
        async def step():
            await self.job.report_progress(50, "half")
            await asyncio.sleep(1)
            return {}
        for kept in (7, len(self.secrets[0]) - 1):
            await self.job.step("s" * (200 - kept) + self.secrets[0] + "z" * 99, step)
        raise ProcessorError("C" * (100 - 7) + self.secrets[0] + "z" * 99, "rejected")

    async def raise_error(self):
        raise RuntimeError("Invalid key " + ", ".join(self.secrets))

    async def raise_processor_error(self):
        echo = ", ".join(self.secrets)
        details = {secret: {"text": [secret, 1]} for secret in self.secrets}
        raise ProcessorError("REJECTED", "Invalid key " + echo, details=details)

    async def raise_in_step(self):
        async def step():
            raise RuntimeError("Invalid key " + ", ".join(self.secrets))
        await self.job.step("ask", step)

    async def raise_large_details(self):
        raise ProcessorError("LARGE", "x " * 5_000_000, details={"text": self.secrets[0] * 150_000})

    async def raise_many_keys(self):
        details = {" " * number + self.secrets[0]: number for number in range(100)}
        raise ProcessorError("MANY", self.secrets[0] * 100_000, details=details)

    async def raise_very_many_keys(self):
        details = {str(number) + self.secrets[0]: number for number in range(100_000)}
        raise ProcessorError("MANY", "Invalid key", details=details)

    async def log_much(self):
        line = self.secrets[0][:-1] * 100
        for _ in range(1000):
            await self.job.log("info", line)

    async def raise_validation_error(self):
        class Key(BaseModel):
            key: int
        for secret in self.secrets:
            try:
                Key.model_validate({"key": secret})
            except ValueError as error:
                await self.job.log("error", str(error))
        Key.model_validate({"key": self.secrets[0]})

    async def raise_group(self):
        raise ExceptionGroup("several", [RuntimeError(secret) for secret in self.secrets])

    async def print_lines(self):
        print("Invalid key", *self.secrets)
        print("Invalid key", *self.secrets, file=sys.stderr, flush=True)
        for secret in self.secrets:
            content = secret.encode()
            for part in (content[:5], content[5:-1], content[-1:]):  # the last character may have two bytes
                os.write(1, part)
                await asyncio.sleep(0.05)
            os.write(1, b"\\n")

    async def print_without_end(self):
        os.write(1, ("Invalid key " + self.secrets[0]).encode())

    async def print_slowly(self):
        for _ in range(30_000):
            os.write(1, b"\\\\u00")

    async def print_much(self):
        for _ in range(65):
            print("z" * 999)
        print("y" * (536 - len(self.secrets[0]) // 2) + self.secrets[0])

    async def die(self):
        print("Invalid key", *self.secrets, flush=True)
        os._exit(3)

    async def die_with_long_line(self):
        secret = self.secrets[0]
        os.write(1, secret.encode() + b"z" * (8192 - len(secret) // 2))
        os._exit(3)


class InlineEchoSecrets(EchoSecrets):
    isolation = "inline"
"""


@pytest.fixture(scope="module")
def secret_echoing_processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The two job types, and the variable `TEST_API_KEY`."""
    site = tmp_path_factory.mktemp("site")
    install_plugin(site, "echo-secrets", _CODE, attribute="EchoSecrets")
    install_plugin(site, "echo-secrets-inline", _CODE, attribute="InlineEchoSecrets")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("TEST_API_KEY", ENVIRONMENT_SECRET)
        _clear_caches()
        yield
    _clear_caches()


def _clear_caches() -> None:
    registry._load_all.cache_clear()
    get_processor_version.cache_clear()
    fork_server_client.stop()
