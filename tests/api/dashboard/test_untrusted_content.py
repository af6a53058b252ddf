"""Text of users is shown as text and never runs as a script."""

from __future__ import annotations

from playwright.async_api import Page, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import build_page_url, needs_browser

pytestmark = needs_browser

UNTRUSTED_TEXTS = (
    "<script>window.ran = 1</script>",
    '"><img src=x onerror="window.ran = 1">',
    "javascript:window.ran=1",
    "{{ 7 * 7 }}{% raw %}",
    "</title></textarea></script><svg onload=window.ran=1>",
    "' onmouseover='window.ran=1",
    "[click](javascript:window.ran=1) <iframe srcdoc='<script>parent.ran=1</script>'>",
    "‮txet desrever 🦆 &lt;b&gt;",
)


async def test_untrusted_content_is_shown_as_text(api: Api, page: Page) -> None:
    failing = [{"fail": text, "session": text, "track": text, "speakers": [text]} for text in UNTRUSTED_TEXTS]
    batch = await api.submit_batch(*failing, {"notes": UNTRUSTED_TEXTS}, batch_name=" ".join(UNTRUSTED_TEXTS)[:200])
    jobs = batch["job_ids"]
    for job_id in jobs:
        await api.wait_until_finished(job_id)
    paths = ["", "/jobs", "/batches", f"/batches/{batch['batch_id']}", "/log", *(f"/jobs/{job_id}" for job_id in jobs)]
    for path in paths:
        await page.goto(build_page_url(api, path))
        assert await page.evaluate("window.ran") is None, path
        assert await page.locator("iframe, main svg[onload], main script, main [onerror]").count() == 0, path
        links = await page.eval_on_selector_all("a", "links => links.map(link => link.getAttribute('href'))")
        assert not any(str(link).lower().startswith("javascript") for link in links), path
    for text, job_id in zip(UNTRUSTED_TEXTS, jobs, strict=False):
        await page.goto(build_page_url(api, f"/jobs/{job_id}"))
        await expect(page.locator("#error")).to_contain_text(" ".join(text.split()))
