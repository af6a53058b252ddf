"""Pages that need JavaScript are rendered by Chromium in the sandbox. The requests of a page go through the fetcher."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.rendering import PageNotRendered, render_page
from jobledger.workers.sandbox import runner as sandbox
from jobledger.workers.sandbox.process_tree import list_children
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    read_document,
    redirect,
    serve_site,
)
from tests.processors.session.no_talk_pages import TITLE, page, talk
from tests.support.polling import poll_until
from tests.workers.test_sandbox import WORKING

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium-headless-shell") is None,
    reason="install Chromium's headless shell: apt-get install chromium-headless-shell",
)
SHELL = page(
    "ExampleConf",
    "<noscript>You need to enable JavaScript to run this app.</noscript><div id=root></div>"
    "<script src=/app.js></script>",
)
APP = """
setTimeout(async () => {
  const talk = await (await fetch('/api/talk.json')).json();
  document.getElementById('root').innerHTML = `<h1>${talk.title}</h1><p>Ada Example</p><p>${talk.abstract}</p>`;
}, 3000);
"""
DATA = f'{{"title": "{TITLE}", "abstract": "State that is overwritten is gone."}}'


@pytest.fixture
def private_site() -> Iterator[Site]:
    """A site that the settings do not allow."""
    with serve_site("127.0.0.2") as running_site:
        yield running_site


def put_app(site: Site, code: str = APP, shell: str = SHELL) -> str:
    site.put("/app.js", SiteResponse(code.encode(), headers={"Content-Type": "text/javascript"}))
    site.put("/api/talk.json", SiteResponse(DATA.encode(), headers={"Content-Type": "application/json"}))
    return site.put("/talk", html(shell))


async def process(url: str, folder: Path, **settings: Any) -> tuple[RecordingJob, str]:
    job = RecordingJob(make_parameters(url=url), folder)
    configured = make_settings(**settings)
    results = await run(job, configured, Fetcher(configured, lock_directory=folder / "locks"))
    return job, read_document(job, results)


async def render(url: str, folder: Path, *, seconds: float = 20, **settings: Any) -> str:
    configured = make_settings(**settings)
    fetcher = Fetcher(configured, lock_directory=folder / "locks")
    fetched = await fetcher.fetch(url, max_bytes=10**6, timeout_seconds=10)
    scratch = folder / "chromium"
    rendered = await render_page(fetched, scratch=scratch, fetcher=fetcher, settings=configured, seconds=seconds)
    assert not scratch.exists()
    return rendered.body.decode()


@needs_chromium
async def test_shell_is_rendered_with_data_that_arrive_later(site: Site, tmp_path: Path) -> None:
    job, document = await process(put_app(site), tmp_path)
    assert "State that is overwritten is gone." in document
    assert "JavaScript" not in document
    assert site.requested_paths == ["/talk", "/app.js", "/api/talk.json"]
    assert not [warning for warning in job.warnings if "page" in warning]


@needs_chromium
@pytest.mark.parametrize("method", WORKING)
async def test_chromium_runs_in_each_sandbox(
    method: sandbox.SandboxMethod, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_find_working_method", lambda: method)
    assert "State that is overwritten is gone." in await render(put_app(site), tmp_path)


@needs_chromium
async def test_page_with_text_is_rendered_only_with_always(site: Site, tmp_path: Path) -> None:
    code = "document.querySelector('h1').nextSibling.innerText = 'This sentence was added by a script.'"
    url = put_app(site, code, talk(TITLE, "State that is overwritten is gone.", extra="<script src=/app.js></script>"))
    for mode, is_rendered in (("auto", False), ("always", True)):
        _, document = await process(url, tmp_path, render=mode)
        assert ("added by a script" in document) == is_rendered


@needs_chromium
async def test_page_without_talk_after_rendering_is_an_error(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="It was rendered, and shows no talk") as caught:
        await process(put_app(site, "console.log(1)"), tmp_path)
    assert caught.value.code == "JAVASCRIPT_REQUIRED"
    not_found = "document.getElementById('root').innerHTML = '<h1>Page not found</h1>'; document.title = '404'"
    with pytest.raises(ProcessorError) as caught:
        await process(put_app(site, not_found), tmp_path)
    assert caught.value.code == "PAGE_NOT_FOUND"


async def test_shell_without_chromium_is_an_error_with_install_command(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="apt-get install chromium-headless-shell") as caught:
        await process(put_app(site), tmp_path, chromium_command="chromium-that-is-missing")
    assert caught.value.code == "JAVASCRIPT_REQUIRED"
    assert site.requested_paths == ["/talk"]


async def test_shell_is_not_rendered_with_never(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match=r"processors\.session\.render") as caught:
        await process(put_app(site), tmp_path, render="never")
    assert caught.value.code == "JAVASCRIPT_REQUIRED"
    assert site.requested_paths == ["/talk"]


async def test_talk_with_always_without_chromium_is_a_warning(site: Site, tmp_path: Path) -> None:
    url = site.put("/talk", html(talk(TITLE, "State that is overwritten is gone.")))
    job, document = await process(url, tmp_path, render="always", chromium_command="chromium-that-is-missing")
    assert "State that is overwritten is gone." in document
    assert any("The page was not rendered: chromium-that-is-missing is not installed" in text for text in job.warnings)


ONLY_TITLE = page("ExampleConf", f"<h1>{TITLE}</h1><div class=talk></div><script src=/app.js></script>")
PARTLY_SHOWN = page(
    TITLE,
    f"<noscript>You need to enable JavaScript to run this app.</noscript><h1>{TITLE}</h1><p>Ada Example</p>"
    "<p>This text is on the page without any script, and it is long enough to be that of a talk.</p>"
    "<div id=root></div><script src=/app.js></script>",
)
FILL = "document.querySelector('div').innerHTML = '<p>This sentence was added by a script of the page.</p>'"


@needs_chromium
async def test_page_without_text_is_rendered(site: Site, tmp_path: Path) -> None:
    _, document = await process(put_app(site, FILL, ONLY_TITLE), tmp_path)
    assert "added by a script" in document


@pytest.mark.parametrize("mode", ["auto", "always"])
async def test_page_without_text_that_is_not_rendered_is_an_error_with_the_reason(
    mode: str, site: Site, tmp_path: Path
) -> None:
    with pytest.raises(ProcessorError, match=r"has no text\. The page was not rendered: chromium-that") as caught:
        await process(
            put_app(site, FILL, ONLY_TITLE), tmp_path, render=mode, chromium_command="chromium-that-is-missing"
        )
    assert caught.value.code == "EMPTY_PAGE"


@pytest.mark.parametrize(
    ("mode", "reason"), [("auto", "chromium-that-is-missing is not installed"), ("never", "`never`")]
)
async def test_talk_that_needs_javascript_and_is_not_rendered_is_a_warning(
    mode: str, reason: str, site: Site, tmp_path: Path
) -> None:
    url = put_app(site, FILL, PARTLY_SHOWN)
    job, document = await process(url, tmp_path, render=mode, chromium_command="chromium-that-is-missing")
    assert "This text is on the page without any script" in document
    assert any("The page was not rendered: " in text and reason in text for text in job.warnings)
    assert len(job.get_steps_after_restart()) < len(job.steps)


@needs_chromium
async def test_talk_that_its_scripts_replace_is_kept_with_a_warning(site: Site, tmp_path: Path) -> None:
    code = "document.title = '404'; document.body.innerHTML = '<h1>Page not found</h1>'"
    job, document = await process(put_app(site, code, PARTLY_SHOWN), tmp_path)
    assert "This text is on the page without any script" in document
    assert any("The rendered page was not used" in text for text in job.warnings)


@needs_chromium
async def test_chromium_is_not_run_without_sandbox(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sandbox, "probe_methods", lambda: (sandbox.ProbeResult("landlock", is_working=False, reason="none"),)
    )
    with pytest.raises(ProcessorError, match="Chromium cannot run in a sandbox"):
        await process(put_app(site), tmp_path)


@needs_chromium
async def test_page_reaches_no_files_and_private_addresses(site: Site, private_site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary")
    targets = [
        private_site.put("/reached", html("reached")),
        "http://10.0.0.1/",
        "http://169.254.169.254/",
        f"file://{tmp_path}/secret",
        "file:///etc/passwd",
        "view-source:file:///etc/passwd",
        "chrome://version/",
    ]
    code = f"""
    const targets = {targets!r};
    (async () => {{
      for (const target of targets) {{
        let outcome = 'failed';
        try {{ outcome = 'fetched ' + await (await fetch(target)).text(); }} catch (error) {{ }}
        const frame = document.createElement('iframe');
        frame.src = target;
        document.body.append(frame);
        const image = new Image();
        image.src = target;
        try {{ navigator.sendBeacon(target, 'x'); }} catch (error) {{ }}
        try {{ open(target); }} catch (error) {{ }}
        document.body.insertAdjacentHTML('beforeend', `<p>${{outcome}}</p>`);
      }}
      await new Promise(resolve => {{
        const socket = new WebSocket('ws://127.0.0.1:{site.port}/socket');
        socket.onopen = () => {{ document.body.append('fetched a socket'); resolve(); }};
        socket.onerror = resolve;
      }});
      const texts = [...document.querySelectorAll('iframe')].map(frame => {{
        try {{ return frame.contentDocument.body.innerText; }} catch (error) {{ return ''; }}
      }});
      document.body.insertAdjacentHTML('beforeend', '<pre>' + texts.join() + '</pre><p>done</p>');
      location.href = targets[0];
    }})();
    """
    url = put_app(site, code)
    text = await render(url, tmp_path)
    assert "<p>done</p>" in text
    assert text.count("<p>failed</p>") == len(targets)
    assert "fetched" not in text
    assert "canary" not in text
    assert "root:" not in text
    assert site.requested_paths == ["/talk", "/app.js"]
    assert private_site.requested_paths == []


@needs_chromium
@pytest.mark.parametrize(
    "code",
    [
        pytest.param("while (true) {}", id="endless loop"),
        pytest.param(
            "const all = []; while (true) try { all.push(new Uint8Array(1 << 20).fill(1)) } catch {}", id="memory"
        ),
        pytest.param("let text = 'x'; document.body.innerText = text.repeat(1 << 25)", id="large page"),
    ],
)
async def test_script_without_end_is_stopped(code: str, site: Site, tmp_path: Path) -> None:
    started, children = time.monotonic(), list_children()
    with pytest.raises(PageNotRendered, match="Chromium failed"):
        await render(put_app(site, code), tmp_path, seconds=3, page_max_bytes=1_000_000)
    assert time.monotonic() - started < 40
    assert list_children() <= children


@needs_chromium
async def test_rendering_ends_before_step_timeout(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="Chromium failed") as caught:
        await process(put_app(site, "while (true) {}"), tmp_path, page_timeout_seconds=13)
    assert caught.value.code == "JAVASCRIPT_REQUIRED"


async def test_shell_without_time_to_render_is_transient_error(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="page_timeout_seconds") as caught:
        await process(put_app(site), tmp_path, page_timeout_seconds=10)
    assert (caught.value.code, caught.value.transient) == ("JAVASCRIPT_REQUIRED", True)


@needs_chromium
async def test_cancelled_job_stops_rendering_at_once(site: Site, tmp_path: Path) -> None:
    started, children = time.monotonic(), list_children()
    job = RecordingJob(make_parameters(url=put_app(site, "while (true) {}")), tmp_path, cancel_at_percent=10)
    settings = make_settings()
    with pytest.raises(ProcessorError) as caught:
        await run(job, settings, Fetcher(settings, lock_directory=tmp_path / "locks"))
    assert caught.value.code == "CANCELLED"
    assert job.progress[-1][1] == "Rendering the page"
    assert time.monotonic() - started < 10
    assert list_children() <= children


@needs_chromium
async def test_responses_of_a_page_share_its_size_limit(site: Site, tmp_path: Path) -> None:
    for number in range(8):
        site.put(f"/{number}", SiteResponse(b"x" * 700_000, headers={"Content-Type": "text/plain"}))
    code = """
    (async () => {
      const all = await Promise.allSettled([0, 1, 2, 3, 4, 5, 6, 7].map(n => fetch('/' + n).then(a => a.text())));
      const received = all.filter(result => result.status === 'fulfilled').length;
      document.getElementById('root').innerHTML = `<p>received ${received}</p>`;
    })();
    """
    text = await render(put_app(site, code), tmp_path, page_max_bytes=1_000_000)
    assert "received 0" in text or "received 1<" in text


@needs_chromium
async def test_endless_requests_and_dialogs_end(site: Site, tmp_path: Path) -> None:
    code = """
    document.getElementById('root').innerHTML = '<p>shown</p>';
    alert('1'); confirm('2'); prompt('3');
    const load = () => fetch('/api/talk.json').finally(load);
    load(); load();
    setInterval(() => history.pushState({}, '', '/' + Math.random()), 10);
    """
    text = await render(put_app(site, code), tmp_path, seconds=5)
    assert "<p>shown</p>" in text
    assert site.requested_paths.count("/api/talk.json") <= 300


@needs_chromium
async def test_cancelled_rendering_leaves_no_process(site: Site, tmp_path: Path) -> None:
    children = list_children()
    running = asyncio.create_task(render(put_app(site, "while (true) {}"), tmp_path))
    await poll_until(lambda: "/app.js" in site.requested_paths, "Chromium requests the script")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert list_children() <= children
    assert not (tmp_path / "chromium").exists()


@needs_chromium
async def test_requests_and_statuses_are_those_of_a_browser(site: Site, tmp_path: Path) -> None:
    site.put("/query", SiteResponse(b"answer", headers={"Content-Type": "text/plain"}))
    code = """
    (async () => {
      const missing = await fetch('/missing.json');
      const headers = {'X-Api-Version': '2', 'Content-Type': 'application/json'};
      const answer = await fetch('/query', {method: 'POST', headers, body: '{}', credentials: 'include'});
      document.getElementById('root').innerHTML = `<p>${missing.status} ${await answer.text()}</p>`;
    })();
    """
    assert "<p>404 answer</p>" in await render(put_app(site, code), tmp_path)
    assert site.posted == [("/query", "application/json", b"{}")]


@needs_chromium
@pytest.mark.parametrize("is_redirected", [False, True])
@pytest.mark.parametrize("options", ["{}", "{method: 'POST', body: 'x'}", "{method: 'DELETE'}"])
async def test_page_does_not_reach_other_hosts_that_are_allowed(
    options: str, is_redirected: bool, site: Site, tmp_path: Path
) -> None:
    with serve_site() as other:  # on another port of the same allowed host, as an internal service
        target = other.put("/internal", html("internal"))
        start = site.put("/redirect", redirect(target)) if is_redirected else target
        code = f"""
        fetch('{start}', {options}).then(answer => answer.text()).catch(() => 'blocked').then(text => {{
          document.getElementById('root').innerHTML = '<p>' + text + '</p>';
        }});
        """
        assert "<p>blocked</p>" in await render(put_app(site, code), tmp_path)
        assert (other.requested_paths, other.posted) == ([], [])


@needs_chromium
async def test_page_that_goes_elsewhere_is_followed(site: Site, tmp_path: Path) -> None:
    site.put("/app2.js", SiteResponse(b"document.body.innerHTML += '<p>final</p>'"))
    target = site.put("/final", html(page("Final", "<script src=/app2.js></script>")))
    code = f"const wait = 100; setTimeout(() => {{ location.href = '{target}' }}, wait)"
    assert "<p>final</p>" in await render(put_app(site, code), tmp_path)
