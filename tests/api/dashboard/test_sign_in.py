"""The sign-in form, the session cookie, and what a user with limited permissions sees."""

from __future__ import annotations

from pathlib import Path

from playwright.async_api import BrowserContext, Page, expect

from tests.api.conftest import WITHOUT_WORKER, run_api
from tests.api.dashboard.conftest import (
    build_page_url,
    clear_console_errors,
    create_key,
    needs_browser,
    open_live_page,
    sign_in,
)

pytestmark = needs_browser


async def test_user_signs_in_and_out_and_sees_only_permitted_content(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page, context: BrowserContext
) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, auth={"mode": "keys"}):
        key_of_ada, key_of_grace = await create_key(api, "ada", "admin"), await create_key(api, "grace")
        response = await api.post(
            "/api/events/jobs",
            {"job_type": "echo", "parameters": {}, "access_control": {"read_access": ["grace"]}},
            Authorization=f"Bearer {key_of_ada}",
        )
        job_id = response.json()["job_id"]
        await page.goto(build_page_url(api, f"/jobs/{job_id}"))
        await expect(page.locator("h1")).to_have_text("Sign in")
        await sign_in(page, "jl_wrong")
        await expect(page.get_by_role("alert")).to_have_text("Sign-in failed. Check the API key or token.")
        clear_console_errors(page)
        await sign_in(page, key_of_ada)
        await expect(page.locator("h1")).to_have_text(job_id)
        [cookie] = await context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert await page.evaluate("document.cookie") == ""
        await expect(page.get_by_role("button", name="Cancel job")).to_be_visible()
        await page.get_by_role("button", name="Sign out (ada)").click()
        await expect(page.locator("h1")).to_have_text("Sign in")
        assert await context.cookies() == []
        await sign_in(page, key_of_grace)
        await expect(page.locator("main")).to_contain_text("requires the user role “monitor” or “admin”")
        await open_live_page(page, build_page_url(api, f"/jobs/{job_id}"))
        await expect(page.locator("h1")).to_have_text(job_id)
        await expect(page.locator("main button")).to_have_count(0)
