"""api: what the dashboard says, in English and German."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

SUPPORTED_LANGUAGES: Final = ("en", "de")
_MESSAGES: Final[dict[str, tuple[str, str]]] = {
    "overview": ("Overview", "Übersicht"),
    "jobs": ("Jobs", "Jobs"),
    "job": ("Job", "Job"),
    "batches": ("Batches", "Batches"),
    "batch": ("Batch", "Batch"),
    "log": ("Log", "Log"),
    "submit": ("Submit a batch", "Batch einreichen"),
    "skip": ("Skip to content", "Zum Inhalt"),
    "main_menu": ("Main menu", "Hauptmenü"),
    "live": ("live", "live"),
    "reconnecting": ("reconnecting …", "verbinde neu …"),
    "still": ("not live", "nicht live"),
    "sign_in": ("Sign in", "Anmelden"),
    "sign_out": ("Sign out", "Abmelden"),
    "credential": ("API key or token", "API-Schlüssel oder Token"),
    "credential_hint": (
        "The browser keeps a session for at most 12 hours, not the key.",
        "Der Browser behält eine Sitzung für höchstens 12 Stunden, nicht den Schlüssel.",
    ),
    "wrong_credential": ("That did not work.", "Das hat nicht geklappt."),
    "no_script": (
        "Without JavaScript this page shows everything, but does not move by itself and offers no actions.",
        "Ohne JavaScript zeigt diese Seite alles, bewegt sich aber nicht von selbst und bietet keine Aktionen.",
    ),
    "status": ("Status", "Status"),
    "all": ("all", "alle"),
    "total": ("Total", "Gesamt"),
    "pending": ("Pending", "Wartend"),
    "processing": ("Processing", "In Arbeit"),
    "completed": ("Completed", "Fertig"),
    "failed": ("Failed", "Fehlgeschlagen"),
    "cancelled": ("Cancelled", "Abgebrochen"),
    "partial": ("Partly failed", "Teils fehlgeschlagen"),
    "paused": ("paused", "angehalten"),
    "archived": ("archived", "archiviert"),
    "throughput": ("Jobs ended a minute", "Beendete Jobs je Minute"),
    "throughput_of": ("Last minute {0}, last hour {1} a minute", "Letzte Minute {0}, letzte Stunde {1} je Minute"),
    "took": ("Seconds a completed job took", "Sekunden je fertigem Job"),
    "took_of": ("p50 {0} s, p90 {1} s, p99 {2} s", "p50 {0} s, p90 {1} s, p99 {2} s"),
    "last_hour": ("the last 60 minutes", "die letzten 60 Minuten"),
    "active_batches": ("Batches at work", "Batches in Arbeit"),
    "none": ("None.", "Keine."),
    "progress": ("Progress", "Fortschritt"),
    "eta": ("About", "Noch etwa"),
    "minutes": ("{0} min left", "{0} min"),
    "tracks": ("Tracks", "Tracks"),
    "track": ("Track", "Track"),
    "workers": ("Workers", "Worker"),
    "worker": ("Worker", "Worker"),
    "slots": ("Busy", "Belegt"),
    "lease": ("Lease until", "Lease bis"),
    "doing": ("At work on", "Arbeitet an"),
    "idle": ("idle", "frei"),
    "unhealthy": ("Claims no jobs since", "Übernimmt keine Jobs seit"),
    "no_workers": ("No worker is alive: nothing is done.", "Kein Worker lebt: Nichts wird bearbeitet."),
    "health": ("Health", "Zustand"),
    "lag": ("Views behind the log", "Sichten hinter dem Log"),
    "events_count": ("{0} events", "{0} Ereignisse"),
    "oldest_waiting": ("Oldest waiting job", "Ältester wartender Job"),
    "webhooks": ("Webhooks", "Webhooks"),
    "webhooks_of": (
        "{0} to be delivered, {1} given up, {2} delivered",
        "{0} noch zuzustellen, {1} aufgegeben, {2} zugestellt",
    ),
    "search": ("Search", "Suche"),
    "filter": ("Show", "Zeigen"),
    "event": ("Event", "Veranstaltung"),
    "day": ("Day", "Tag"),
    "language": ("Target language", "Zielsprache"),
    "user": ("User", "Benutzer"),
    "error_code": ("Error code", "Fehlercode"),
    "created": ("Submitted", "Eingereicht"),
    "updated": ("Last change", "Letzte Änderung"),
    "name": ("Name", "Name"),
    "type": ("Type", "Art"),
    "attempt": ("Attempt", "Versuch"),
    "attempts": ("Attempts", "Versuche"),
    "found": ("{0} found", "{0} gefunden"),
    "at_least": ("at least {0} found", "mindestens {0} gefunden"),
    "next_page": ("Next page", "Nächste Seite"),
    "newest_first": ("newest first", "neueste zuerst"),
    "oldest_first": ("oldest first", "älteste zuerst"),
    "sort": ("Sort", "Sortierung"),
    "select_all": ("Select all on this page", "Alle auf dieser Seite auswählen"),
    "select": ("Select", "Auswählen"),
    "selected": ("With those selected:", "Mit den ausgewählten:"),
    "restart": ("Restart", "Neu starten"),
    "cancel": ("Cancel", "Abbrechen"),
    "archive": ("Archive", "Archivieren"),
    "unarchive": ("Take out of the archive", "Aus dem Archiv holen"),
    "pause": ("Pause", "Anhalten"),
    "resume": ("Resume", "Fortsetzen"),
    "restart_failed": ("Restart failed jobs", "Fehlgeschlagene neu starten"),
    "redeliver": ("Send again", "Erneut senden"),
    "confirm": ("{0}: {1}?", "{0}: {1}?"),
    "confirm_many": ("{0}: {1} jobs?", "{0}: {1} Jobs?"),
    "yes": ("Yes", "Ja"),
    "no": ("No", "Nein"),
    "done": ("Done.", "Erledigt."),
    "done_many": ("{0} done, {1} refused.", "{0} erledigt, {1} abgelehnt."),
    "away": ("The service cannot be reached.", "Der Dienst ist nicht erreichbar."),
    "reason": ("Why (goes into the log)", "Grund (kommt ins Log)"),
    "parameters": ("Parameters", "Parameter"),
    "story": ("What happened", "Was geschah"),
    "then": ("The job as it was", "Der Job, wie er war"),
    "then_hint": ("Move the slider through its events.", "Der Regler führt durch seine Ereignisse."),
    "logs": ("Messages", "Meldungen"),
    "result": ("Result", "Ergebnis"),
    "slides": ("Slides", "Folien"),
    "files": ("Files", "Dateien"),
    "download": ("Download all", "Alles herunterladen"),
    "size": ("Size", "Größe"),
    "warnings": ("What could not be done", "Was nicht gelang"),
    "error": ("Error", "Fehler"),
    "projection_error": ("This page is incomplete", "Diese Seite ist unvollständig"),
    "retry_at": ("again at {0}", "wieder um {0}"),
    "steps": ("Steps", "Schritte"),
    "reused": ("taken over", "übernommen"),
    "began": ("Began", "Beginn"),
    "ended": ("End", "Ende"),
    "outcome": ("Outcome", "Ausgang"),
    "by": ("By", "Von"),
    "when": ("When", "Wann"),
    "what": ("What", "Was"),
    "position": ("Position", "Position"),
    "stream": ("Stream", "Stream"),
    "started": ("Started", "Begonnen"),
    "duration": ("Took", "Dauer"),
    "tokens": ("Tokens", "Tokens"),
    "due": ("Not before", "Nicht vor"),
    "receiver": ("Receiver", "Empfänger"),
    "history_cut": (
        "Only the first {0} events are shown; the log has all of them.",
        "Nur die ersten {0} Ereignisse; das Log hat alle.",
    ),
    "cut": (
        "This page shows only the beginning of large content. The API has all of it.",
        "Von umfangreichen Inhalten zeigt diese Seite nur den Anfang. Die API liefert alles.",
    ),
    "tail_hint": ("New events come in at the top.", "Neue Ereignisse kommen oben herein."),
    "jobs_of": ("Its jobs", "Seine Jobs"),
    "batch_json": ("The batch as JSON", "Der Batch als JSON"),
    "batch_hint": (
        "A list of sessions, a list of jobs, or a whole batch. Paste it, or drop a file here.",
        "Eine Liste von Sessions, eine Liste von Jobs oder ein ganzer Batch. Einfügen oder Datei hierher ziehen.",
    ),
    "batch_name": ("Name of the batch", "Name des Batches"),
    "choose_file": ("Choose a file", "Datei wählen"),
    "check": ("Check", "Prüfen"),
    "send": ("Submit", "Einreichen"),
    "checked": ("{0} jobs, all valid.", "{0} Jobs, alle gültig."),
    "new_secrets": (
        "Submitted. Copy these signing secrets of webhooks now: they are not shown again.",
        "Eingereicht. Kopieren Sie diese Signaturgeheimnisse jetzt: Sie werden nicht noch einmal angezeigt.",
    ),
    "not_json": ("This is not JSON: {0}", "Das ist kein JSON: {0}"),
    "forbidden_overview": (
        "The overview of everything is for the roles monitor and admin. Your own jobs are on the page Jobs.",
        "Die Übersicht über alles ist für die Rollen monitor und admin. Ihre eigenen Jobs stehen auf der Seite Jobs.",
    ),
    "problem": ("This cannot be shown", "Das kann nicht gezeigt werden"),
    "not_found": ("There is no such page.", "Diese Seite gibt es nicht."),
}


def translator_for(language: str) -> Callable[..., str]:
    """Return the function that says a thing in a language; what it is told fills the gaps."""
    number = SUPPORTED_LANGUAGES.index(language)

    def translate(key: str, *args: object) -> str:
        return _MESSAGES[key][number].format(*args)

    return translate


def script_messages(language: str) -> dict[str, str]:
    """Return the words, with their gaps, that scripts say."""
    keys = (
        *("live", "reconnecting", "confirm", "confirm_many", "done", "done_many", "away"),
        *("checked", "not_json", "new_secrets"),
    )
    number = SUPPORTED_LANGUAGES.index(language)
    return {key: _MESSAGES[key][number] for key in keys}


def negotiate_language(accept_language: str) -> str:
    """Return the language that an `Accept-Language` prefers among ours (RFC 9110, 12.5.4)."""
    wanted: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept_language.split(",")[:20]):
        name, _, weight = part.strip().partition(";q=")
        try:
            quality = float(weight or 1)
        except ValueError:
            continue
        wanted.append((-quality, place, name.strip().partition("-")[0].lower()))
    return next(
        (name for quality, _, name in sorted(wanted) if name in SUPPORTED_LANGUAGES and quality < 0),
        SUPPORTED_LANGUAGES[0],
    )
