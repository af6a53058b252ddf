"""The message catalogs: same keys and placeholders in all languages, every used key exists, and none is unused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from markupsafe import Markup

from jobledger.api.dashboard import rendering
from jobledger.api.dashboard.attempt_timeline import OUTCOMES
from jobledger.api.dashboard.translations import (
    SCRIPT_MESSAGE_KEYS,
    SUPPORTED_LANGUAGES,
    get_script_messages,
    get_translator,
    load_messages,
    negotiate_language,
)
from jobledger.ledger.domain.statuses import BatchStatus, DeliveryStatus, JobStatus, WaitingFor

FOLDER = Path(rendering.__file__).parent
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "templates").glob("*.j2")}
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "static").glob("*.js")}
ENGLISH = load_messages("en")

WAITING_FOR = {f"waiting_for_{kind}" for kind in get_args(WaitingFor)}
JOB_STATUSES = frozenset(get_args(JobStatus))
ACTIONS = frozenset(re.findall(r'action_button\([^)]*?, "(\w+)"', "".join(TEMPLATES.values())))
BULK_ACTIONS = frozenset({"restart", "cancel", "archive"})
COMPUTED_KEYS = {
    "t(status)": JOB_STATUSES | set(get_args(BatchStatus)),
    't("outcome_" ~ attempt.outcome)': {f"outcome_{outcome}" for outcome in OUTCOMES.values()},
    't("delivery_" ~ delivery.status)': {f"delivery_{status}" for status in get_args(DeliveryStatus)},
    't("waiting_for_" ~ job.waiting_for)': WAITING_FOR,
    't("waiting_for_" ~ kind)': WAITING_FOR,
    "t(action)": ACTIONS,
    't("confirm_" ~ action, target, count)': {f"confirm_{action}" for action in ACTIONS},
    't("bulk_" ~ bulk_action)': {f"bulk_{action}" for action in BULK_ACTIONS},
    "t(label_key)": set(re.findall(r'\("(\w+)", "[^"]*"\)', TEMPLATES["base.html.j2"]))
    | set(re.findall(r'\("\w+", "(\w+)"\)', TEMPLATES["jobs.html.j2"])),
    't("not_found" if status == 404 else "error_title")': {"not_found", "error_title"},
    't("result_count_at_least" if result_page.total_is_lower_bound else "result_count", result_page.total)': {
        "result_count_at_least",
        "result_count",
    },
}
"""Calls whose key is computed, as the templates write them, with the keys that they can have."""
SCRIPT_COMPUTED_KEYS = {
    "formatMessage(`confirm_bulk_${bulkAction}`": {f"confirm_bulk_{action}" for action in BULK_ACTIONS},
    "formatMessage(job.status": JOB_STATUSES,
    'formatMessage(isConnected ? "live" : "reconnecting"': {"live", "reconnecting"},
}


def collect_template_keys() -> set[str]:
    text = "".join(TEMPLATES.values())
    for call in COMPUTED_KEYS:
        assert call in text, f"{call} is no longer in a template"
        text = text.replace(call, "")
    literal = re.findall(r'\bt\("(\w+)"(?=[,)])', text)
    assert len(literal) == len(re.findall(r"\bt\(", text)), "a call with a computed key is not in COMPUTED_KEYS"
    return set(literal).union(*COMPUTED_KEYS.values())


def collect_script_keys() -> set[str]:
    text = "".join(SCRIPTS.values()).replace("function formatMessage(", "")
    for call in SCRIPT_COMPUTED_KEYS:
        assert call in text, f"{call} is no longer in a script"
        text = text.replace(call, "")
    literal = re.findall(r'\bformatMessage\("(\w+)"', text)
    assert len(literal) == len(re.findall(r"\bformatMessage\(", text)), "a computed key is not in SCRIPT_COMPUTED_KEYS"
    return set(literal).union(*SCRIPT_COMPUTED_KEYS.values())


@pytest.mark.parametrize("language", SUPPORTED_LANGUAGES)
def test_catalog_has_same_keys_plural_forms_and_placeholders_as_english(language: str) -> None:
    messages = load_messages(language)
    assert list(messages) == list(ENGLISH)
    for key, forms in messages.items():
        assert all(forms), f"{key} is not translated"
        assert len(forms) == len(ENGLISH[key]), key
        placeholders = {frozenset(re.findall(r"\{(\d)\}", text)) for text in (*forms, *ENGLISH[key])}
        assert len(placeholders) == 1, key


def test_every_key_of_templates_and_scripts_exists_and_no_key_is_unused() -> None:
    assert collect_template_keys() | collect_script_keys() == set(ENGLISH)


def test_scripts_get_exactly_the_messages_they_use() -> None:
    assert set(SCRIPT_MESSAGE_KEYS) == collect_script_keys()
    assert get_script_messages("de")["selection"] == ("Auswahl: {0} Job", "Auswahl: {0} Jobs")


def test_translator_selects_plural_form_by_first_argument() -> None:
    t = get_translator("de")
    assert [t("selection", number) for number in (0, 1, 12)] == [
        "Auswahl: 0 Jobs",
        "Auswahl: 1 Job",
        "Auswahl: 12 Jobs",
    ]


def test_translator_writes_numbers_as_in_its_language() -> None:
    assert get_translator("de")("throughput_summary", 5.0, 0.0834) == (
        "Letzte Minute: 5, Durchschnitt der letzten Stunde: 0,083"
    )
    assert get_translator("en")("event_count", 1234) == "1,234 events"


def test_translator_escapes_text_beside_markup() -> None:
    t = get_translator("en")
    assert t("throughput_summary", Markup("<b>1</b>"), "<i>") == Markup(
        "Last minute: <b>1</b>, average of the last hour: &lt;i&gt;"
    )
    assert not isinstance(t("confirm_cancel_job", "<b>"), Markup), "the template escapes it"


@pytest.mark.parametrize(
    ("header", "language"),
    [("", "en"), ("de-AT,en;q=0.5", "de"), ("fr, de;q=0.2, en;q=0.1", "de"), ("de;q=0, en", "en"), ("x;q=y", "en")],
)
def test_language_is_negotiated_by_quality(header: str, language: str) -> None:
    assert negotiate_language(header) == language
