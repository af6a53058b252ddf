"""Which encoding a page is read with, and that every encoding of the WHATWG Encoding Standard is decoded."""

from __future__ import annotations

import codecs
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webencodings.labels import LABELS

from jobledger.workers.processors.session.charset_decoders import decode, look_up_encoding
from jobledger.workers.processors.session.charsets import DecodedPage, decode_page, parse_content_type
from tests.processors.session.fixtures import without_deadline

CZECH = "Přednáška o tom, jak žurnál zjednodušuje obnovu databáze."
GERMAN = "Größer als gedacht: Übung für zuverlässige Systeme – “näher” betrachtet."
GREEK = "Μια ομιλία για το πώς ένα ημερολόγιο απλοποιεί την ανάκτηση."
HEBREW = "הרצאה על האופן שבו יומן מפשט את שחזור מסד הנתונים."
JAPANESE = "この講演では追記専用のログを説明します。データは上書きされません。"
KOREAN = "이 강연은 저널이 데이터베이스 복구를 어떻게 단순화하는지 설명합니다."
RUSSIAN = "Доклад о том, как журнал упрощает восстановление базы данных."
CHINESE = "本次演讲介绍日志如何简化数据库的恢复。"
TAIWANESE = "本次演講介紹日誌如何簡化資料庫的復原。"

# The Python codec and a text of every encoding of the standard.
SAMPLES = {
    "utf-8": ("utf-8", GERMAN + JAPANESE),
    "utf-16le": ("utf-16-le", GERMAN + JAPANESE),
    "utf-16be": ("utf-16-be", GERMAN + JAPANESE),
    "ibm866": ("cp866", RUSSIAN),
    "iso-8859-2": ("iso8859-2", CZECH),
    "iso-8859-3": ("iso8859-3", "Diskuto pri ĵurnaloj kaj ŝanĝoj ĉie."),
    "iso-8859-4": ("iso8859-4", "Pranešimas apie žurnalą šiąja."),
    "iso-8859-5": ("iso8859-5", RUSSIAN),
    "iso-8859-6": ("iso8859-6", "محاضرة عن كيفية تبسيط السجل"),
    "iso-8859-7": ("iso8859-7", GREEK),
    "iso-8859-8": ("iso8859-8", HEBREW),
    "iso-8859-8-i": ("iso8859-8", HEBREW),
    "iso-8859-10": ("iso8859-10", "Þetta er fyrirlestur um dagbækur á íslensku."),
    "iso-8859-13": ("iso8859-13", "Pranešimas apie tai, kaip žurnalas."),
    "iso-8859-14": ("iso8859-14", "Sgeulachd mu dheidhinn ẁ agus ŷ."),
    "iso-8859-15": ("iso8859-15", "Cœur et 5 €, Šárka"),
    "iso-8859-16": ("iso8859-16", "O discuție despre jurnale și baze."),
    "koi8-r": ("koi8-r", RUSSIAN),
    "koi8-u": ("koi8-u", "Доповідь про те, як журнал спрощує їхнє відновлення."),
    "macintosh": ("mac-roman", GERMAN),
    "windows-874": ("cp874", "การบรรยายเกี่ยวกับวิธีที่บันทึก"),
    "windows-1250": ("cp1250", CZECH),
    "windows-1251": ("cp1251", RUSSIAN),
    "windows-1252": ("cp1252", GERMAN),
    "windows-1253": ("cp1253", GREEK),
    "windows-1254": ("cp1254", "Bir günlüğün kurtarmayı nasıl kolaylaştırdığı"),
    "windows-1255": ("cp1255", HEBREW),
    "windows-1256": ("cp1256", "محاضرة عن كيفية تبسيط السجل"),
    "windows-1257": ("cp1257", "Pranešimas apie tai, kaip žurnalas."),
    "windows-1258": ("cp1258", "Đây là bài nói"),
    "x-mac-cyrillic": ("mac-cyrillic", RUSSIAN),
    "gbk": ("gbk", CHINESE),
    "gb18030": ("gb18030", CHINESE + "𠀀"),
    "big5": ("big5", TAIWANESE),
    "euc-jp": ("euc_jp", JAPANESE),
    "iso-2022-jp": ("iso2022_jp", JAPANESE),
    "shift_jis": ("cp932", JAPANESE + "①㈱"),
    "euc-kr": ("cp949", KOREAN),
    "x-user-defined": ("ascii", "plain text"),
}
PAGE = (
    "<!doctype html><html><head><title>ExampleConf</title></head><body><nav><a href='/'>Home</a></nav>"
    "<h1>{0}</h1><p>{0} {0}</p><footer>Code of Conduct</footer></body></html>"
)


def read(body: bytes | str, charset: str = "", *, codec: str = "ascii") -> DecodedPage:
    data = body if isinstance(body, bytes) else body.encode(codec)
    return decode_page(data, f"text/html; charset={charset}" if charset else "text/html")


@pytest.mark.parametrize("label", sorted(label for label, name in LABELS.items() if name != "replacement"))
def test_every_label_of_the_standard_is_decoded(label: str) -> None:
    codec, text = SAMPLES[LABELS[label]]
    for declared in (label, f" {label.upper()}\t", f'"{label}"'):
        page = read(PAGE.format(text), declared, codec=codec)
        assert page == DecodedPage(PAGE.format(text), LABELS[label], [])


@pytest.mark.parametrize(
    ("label", "body", "text"),
    [
        ("iso-8859-1", b"\x80 \x93x\x94", "€ “x”"),
        ("us-ascii", b"caf\xe9", "café"),
        ("tis-620", b"\x80\xa1", "€ก"),
        ("windows-1252", b"\x81\x8d", "\x81\x8d"),
        ("koi8-u", b"\xae\xbe", "ўЎ"),
        ("windows-1255", b"\xca", "\u05ba"),
        ("gb2312", b"\x80 \x81\x30\x81\x30 \xa8\xbc", "€ \x80 ḿ"),
        ("gbk", "𠀀".encode("gb18030"), "𠀀"),
        ("big5-hkscs", b"\x87\x40 \xa3\xe1 \xa1\x45 \xa1\xe3", "䏰 € ‧ ～"),
        ("euc-jp", b"\xad\xa1 \xa1\xc1 \xa1\xdd \x8e\xb1 \x8f\xb0\xa1 \xf9\xa1", "① ～ － ｱ 丂 纊"),
        ("sjis", b"\x87\x40 \x81\x60 \xb1 \xfa\x40", "① ～ ｱ ⅰ"),
        ("ks_c_5601-1987", b"\x94\xee", "뷁"),
        ("iso-2022-jp", b"\x1b$@$3\x1b(J\\~\x1b(I1\x1b$B-!\x1b(B\\", "こ¥‾ｱ①\\"),
        ("hz-gb-2312", "中文 text".encode("hz"), "中文 text"),
        ("iso-2022-kr", "한국어 text".encode("iso2022_kr"), "한국어 text"),
        ("x-user-defined", b"a\x80\xff", "a\uf780\uf7ff"),
    ],
)
def test_decoders_follow_the_standard_where_python_differs(label: str, body: bytes, text: str) -> None:
    encoding = look_up_encoding(label)
    assert encoding is not None
    assert decode(body, encoding) == text


@pytest.mark.parametrize("encoding", ["big5", "euc-jp", "euc-kr", "gbk", "shift_jis", "iso-2022-jp", "utf-8"])
def test_broken_character_never_swallows_the_markup_behind_it(encoding: str) -> None:
    for lead in (b"\x81", b"\xa4", b"\xfe", b"\xff", b"\x8f\xa1", b"\x1b"):
        text = decode(b"<p>" + lead + b"</p>", encoding)
        assert text.startswith("<p>")
        assert text.endswith("</p>")


@without_deadline
@given(st.binary(max_size=300), st.sampled_from([*sorted(LABELS), "utf-7", "utf-32", "none"]), st.booleans())
def test_any_bytes_are_decoded_with_any_label(body: bytes, label: str, is_meta: bool) -> None:
    page = read(f"<meta charset={label}>".encode() + body) if is_meta else read(body, label)
    assert page.text.encode("utf-8").decode("utf-8") == page.text  # no lone surrogates


@pytest.mark.parametrize(
    ("header", "media_type", "charset"),
    [
        ("text/html", "text/html", None),
        ("Text/HTML;charset=UTF-8", "text/html", "UTF-8"),
        ('text/html; version=1; charset="koi8-r"; x=y', "text/html", "koi8-r"),
        ('text/html; x="; charset=wrong"; charset=right', "text/html", "right"),
        ("text/html; charset='koi8-r' ", "text/html", "koi8-r"),
        ("text/html ; CHARSET = koi8-r", "text/html", "koi8-r"),
        ("text/html charset=koi8-r", "text/html", "koi8-r"),
        ("text/html; charset=first; charset=second", "text/html", "first"),
        ("text/html; charset=first, text/html; charset=second", "text/html", "second"),
        ("text/html; charset=first, text/html", "text/html", "first"),
        ("text/plain; charset=first, text/html", "text/html", None),
        ("text/html, */*", "text/html", None),
        ('text/html; charset="unclosed', "text/html", "unclosed"),
        ("", "", None),
    ],
)
def test_content_type_header_is_parsed(header: str, media_type: str, charset: str | None) -> None:
    assert parse_content_type(header) == (media_type, charset)


@pytest.mark.parametrize(
    "markup",
    [
        "<meta charset=iso-8859-2>",
        "<META CharSet = ' ISO-8859-2 ' />",
        "<meta/charset='latin2'/>",
        '<meta name=x content="a>b"><meta charset="l2">',
        '<meta content="text/html; charset=iso-8859-2" http-equiv=Content-Type>',
        "<meta http-equiv=content-type content='text/html; charset = \"iso-8859-2\"'>",
        "<!-- <meta charset=koi8-r> --><meta charset=iso-8859-2>",
        "<!--><meta charset=iso-8859-2>",
        '<body data-x="<meta charset=koi8-r>"><meta charset=iso-8859-2>',
        "<script>'<meta charset=koi8-r>'</script><meta charset=iso-8859-2>",
        "<title><meta charset=koi8-r></title><meta charset=iso-8859-2>",
        "<meta charset=unknown><meta charset=iso-8859-2>",
        '<meta name=generator content="charset=koi8-r"><meta charset=iso-8859-2>',
        '<?pi <meta charset=koi8-r> ?><meta charset="iso-8859-2">',
        '<?xml version="1.0" encoding="iso-8859-2"?>',
        "<?xml version='1.0' encoding = 'iso-8859-2' ?><!doctype html>",
        "<style>" + "a{}" * 2000 + "</style><meta charset=iso-8859-2>",
    ],
)
def test_encoding_is_declared_in_the_page(markup: str) -> None:
    assert read(f"{markup}<p>{CZECH}", codec="iso8859-2").encoding == "iso-8859-2"


@pytest.mark.parametrize(
    ("charset", "mark", "markup", "encoding"),
    [
        ("windows-1251", codecs.BOM_UTF8, "<meta charset=koi8-r>", "utf-8"),
        ("windows-1251", b"", "<meta charset=koi8-r>", "windows-1251"),
        ("", b"", "<meta charset=koi8-r>", "koi8-r"),
        ("unknown", b"", "<meta charset=koi8-r>", "koi8-r"),
        ("utf-7", b"", "<meta charset=utf-7>", "utf-8"),
        ("utf-32", b"", "<meta charset=koi8-r>", "koi8-r"),
        ("utf-16", b"", "<meta charset=koi8-r>", "koi8-r"),
        ("", b"", "<meta charset=utf-16be>", "utf-8"),
        ("", b"", "<meta charset=x-user-defined>", "windows-1252"),
        ("", b"", '<?xml version="1.0" encoding="koi8-r"?><meta charset=windows-1251>', "windows-1251"),
        ("", b"", "", "utf-8"),
    ],
)
def test_precedence_of_declarations(charset: str, mark: bytes, markup: str, encoding: str) -> None:
    assert decode_page(mark + f"{markup}<p>text".encode(), f"text/html; charset={charset}").encoding == encoding


def test_xml_declaration_of_xhtml_comes_before_meta() -> None:
    body = b'<?xml version="1.0" encoding="koi8-r"?><meta charset="windows-1251"/>'
    assert decode_page(body, "application/xhtml+xml").encoding == "koi8-r"


@pytest.mark.parametrize("charset", ["", "utf-16", "utf-16le", "utf-16be", "utf-8", "windows-1252"])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-16"])
def test_utf_16_is_recognized_with_any_header(codec: str, charset: str) -> None:
    assert read(PAGE.format(CZECH), charset, codec=codec).text == PAGE.format(CZECH)


def test_utf_7_is_not_decoded() -> None:
    assert read(b"<p>+ADw-script+AD4-", "utf-7").text == "<p>+ADw-script+AD4-"


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"utf-8", "utf-16le", "utf-16be", "x-user-defined"}))
def test_utf_8_page_that_declares_another_encoding_is_read_as_utf_8(name: str) -> None:
    page = read(PAGE.format(JAPANESE + GERMAN), name, codec="utf-8")
    assert page == DecodedPage(PAGE.format(JAPANESE + GERMAN), "utf-8", [])


# Encodings that detection tells apart. The others share almost all letters with one of these.
DETECTED = {
    **{name: SAMPLES[name] for name in ("iso-8859-5", "koi8-r", "windows-1251", "ibm866", "iso-8859-2")},
    **{name: SAMPLES[name] for name in ("windows-1252", "windows-1253", "windows-1255", "windows-1256", "windows-874")},
    **{name: SAMPLES[name] for name in ("gb18030", "big5", "euc-jp", "iso-2022-jp", "shift_jis", "euc-kr")},
}


@pytest.mark.parametrize("name", DETECTED)
def test_encoding_that_is_not_declared_is_detected(name: str) -> None:
    codec, text = DETECTED[name]
    page = read(PAGE.format(text), codec=codec)
    assert (page.text, page.warnings) == (PAGE.format(text), [])


@pytest.mark.parametrize("name", sorted(set(DETECTED) - {"iso-2022-jp"}))
def test_encoding_that_is_wrongly_declared_as_utf_8_is_detected(name: str) -> None:
    codec, text = DETECTED[name]
    page = read(PAGE.format(text), "utf-8", codec=codec)
    assert page.text == PAGE.format(text)
    assert [f"looks like {page.encoding}" in warning for warning in page.warnings] == [True]


@pytest.mark.parametrize(
    ("declared", "name"),
    [("shift_jis", "euc-jp"), ("euc-jp", "shift_jis"), ("iso-8859-2", "shift_jis"), ("utf-8", "big5")],
)
def test_encoding_that_the_bytes_contradict_is_replaced(declared: str, name: str) -> None:
    codec, text = SAMPLES[name]
    assert read(PAGE.format(text), declared, codec=codec).text == PAGE.format(text)


def test_smart_quotes_without_declaration_are_windows_1252() -> None:
    assert read(b"<p>It\x92s a talk \x96 \x93really\x94").text == "<p>It’s a talk – “really”"


def test_single_broken_letter_of_ascii_page_is_detected() -> None:
    assert read(b"<p>Ein Vortrag f\xfcr alle", "utf-8").text == "<p>Ein Vortrag für alle"


@pytest.mark.parametrize(
    ("body", "charset", "encoding", "lost"),
    [
        ((GERMAN * 3).encode() + b"<p>\xff\xfe", "utf-8", "utf-8", "2 characters"),
        ((GERMAN * 3).encode()[:-2] + b"\xe2", "", "utf-8", "One character"),
        (b"<p>ASCII \xff only", "utf-8", "utf-8", "One character"),
        (JAPANESE.encode("euc_jp") + b"\xff", "euc-jp", "euc-jp", "One character"),
        (b"\xef\xbf\xbd" * 1234, "utf-8", "utf-8", "1,234 characters"),
    ],
)
def test_lost_characters_are_a_warning(body: bytes, charset: str, encoding: str, lost: str) -> None:
    page = read(body, charset)
    assert page.encoding == encoding
    assert page.warnings == [f"{lost} of the page could not be read in the encoding {encoding} and became \ufffd."]


def test_text_that_is_not_ascii_at_the_end_of_a_long_page_is_detected() -> None:
    body = b"<p>English words." * 100_000 + PAGE.format(RUSSIAN).encode("cp1251")
    assert read(body).encoding == "windows-1251"


@pytest.mark.parametrize(
    "body",
    [
        b"\x81\xff" * 5_000_000,
        b"\xad\xa1" * 5_000_000,
        b"\x1b$B\x1b(B" * 1_500_000,
        b"<a " * 3_000_000,
        b"<!--" * 2_500_000,
        b"<p f\xfcr='" * 1_000_000,
        b"<meta charset=" * 700_000,
    ],
    ids=["broken", "extended", "escapes", "tags", "comments", "attributes", "meta"],
)
@pytest.mark.parametrize("charset", ["", "euc-jp", "iso-2022-jp"])
def test_hostile_page_is_decoded_in_bounded_time(body: bytes, charset: str) -> None:
    started = time.process_time()  # the time on the clock depends on other processes
    read(body, charset)
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    "header", ["; a" * 30_000, "a" + " " * 90_000, '"' * 90_000, "a=" * 40_000, 'a;b="' + "\\" * 90_000]
)
def test_hostile_header_is_parsed_in_bounded_time(header: str) -> None:
    started = time.process_time()
    parse_content_type(header)
    assert time.process_time() - started < 2
