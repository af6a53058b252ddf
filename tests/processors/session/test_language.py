"""The language of a text is detected, or None if it is not certain."""

from __future__ import annotations

import time

import pytest

from jobledger.workers.processors.session.language import detect_language


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "State that is overwritten is gone. This talk shows an append-only log in production."),
        ("de", "Workshop: Container-Security mit Falco und OPA. Wir bauen eine Pipeline und scannen die Images."),
        ("fr", "Retour d'expérience : déployer Kubernetes on-premise avec ArgoCD, Helm et Terraform."),
        ("es", "Cómo construir un data pipeline con Apache Spark y dbt en la nube. Un taller práctico con Python."),
        ("nl", "Waarom wij van REST naar GraphQL zijn overgestapt: lessen van een grote website."),
        ("pl", "Event sourcing w praktyce: jak zbudowaliśmy system oparty na Kafka Streams i PostgreSQL."),
        ("pt", "Como migramos nosso sistema legado para microsserviços com Kubernetes na nuvem."),
        ("cs", "Jak jsme přešli na Kubernetes a přežili. Zkušenosti z provozu a open source nástroje."),
        ("sv", "Så byggde vi en plattform för maskininlärning på Kubernetes, och vad vi lärde oss av det."),
        ("no", "Hva vi lærte da vi flyttet plattformen vår til skyen, og hvorfor vi ikke ville gjort det igjen."),
        ("ru", "Как мы перешли на микросервисы и что из этого вышло."),
        ("uk", "Як ми перейшли на мікросервіси і що з цього вийшло. Доповідь про досвід нашої команди."),
        ("ar", "كيف بنينا نظاما موزعا يعتمد على سجل الأحداث وما الذي تعلمناه من ذلك"),
        ("ja", "Kubernetesをはじめよう、コンテナの世界へようこそ"),
        ("zh", "短的讲演，关于 event sourcing 的设计与实现"),
        ("ko", "DNS와 아파치와 관련된 사항을 소개합니다"),
        ("el", "Μια σύντομη ομιλία για το ημερολόγιο"),
        ("he", "הרצאה קצרה על יומן אירועים"),
        ("th", "การบรรยายสั้นๆเกี่ยวกับบันทึกเหตุการณ์"),
    ],
)
def test_language_of_technical_text_is_detected(language: str, text: str) -> None:
    assert detect_language(text) == language


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12:30 – 13:00 Room 5 2025-11-30",
        "Ein Vortrag",
        "Max Müller, Anna Schmidt, Jean Dupont, Mary Miller, John Smith",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore",
    ],
)
def test_text_without_a_certain_language_gives_none(text: str) -> None:
    assert detect_language(text) is None


def test_code_links_and_formulas_do_not_count() -> None:
    english = "if the value of this is not what you want then we try to find the other one"
    for noise in (f"```\n{english}\n```", f"`{english}`", f"[](https://a.example/{english.replace(' ', '/')})"):
        text = f"Wir zeigen, wie man so etwas baut.\n\n{noise}\n\nUnd warum es Übung braucht.\n\n{noise}\n\n{noise}"
        assert detect_language(text) == "de"
    assert detect_language(f"$$\n\\text{{{english}}}\n$$") is None


@pytest.mark.parametrize(
    "repeated", ["`", "$", "<", "```\n", "\n ```", "a@", "a.b://", "](", "www.", "~~~x\n", "a" * 50 + "."]
)
def test_hostile_text_is_examined_in_time(repeated: str) -> None:
    started = time.process_time()
    detect_language(repeated * 200_000)
    assert time.process_time() - started < 3
