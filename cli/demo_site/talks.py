"""cli: everything the invented conference says: its talks, the words on its slides, the tunes of its recordings.

Only content lives here. Texts are HTML, as a conference's own system would keep them; people and places are made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CONFERENCE = "Ledger Days 2026"
VENUE = "Alte Seilerei, Lübeck"
DATES = {"Saturday": "17 October 2026", "Sunday": "18 October 2026"}


@dataclass(frozen=True, slots=True)
class Speaker:
    name: str
    biography: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Horizontal bars; `unit` is written behind every value."""

    unit: str
    bars: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """Boxes from left to right, an arrow between neighbours."""

    boxes: tuple[str, ...]
    caption: str


@dataclass(frozen=True, slots=True)
class Code:
    text: str


Figure = Chart | Flow | Code


@dataclass(frozen=True, slots=True)
class Slide:
    title: str
    points: tuple[str, ...] = ()
    figure: Figure | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """A short film: `caption` over a moving `picture`, with `melody` as (frequency in Hz, length in beats).

    The only font at hand knows ASCII and little else, so captions keep to that.
    """

    container: Literal["webm", "mp4"]
    animation: Literal["ledger", "contrast"]
    caption: tuple[str, ...]
    melody: tuple[tuple[float, float], ...]
    seconds: int = 6


@dataclass(frozen=True, slots=True)
class Talk:
    slug: str
    title: str
    subtitle: str
    filename: str
    track: str
    day: str
    start: str
    end: str
    room: str
    language: Literal["en", "de"]
    speakers: tuple[Speaker, ...]
    abstract: str
    body: str
    colour: tuple[int, int, int]
    slides: tuple[Slide, ...] = ()
    video: Video | None = None

    @property
    def page_count(self) -> int:
        """Pages of the deck, its cover included; 0 when there is no deck."""
        return len(self.slides) + 1 if self.slides else 0


C4, D4, E4, G4, A4, C5, D5, E5, REST = 261.63, 293.66, 329.63, 392.0, 440.0, 523.25, 587.33, 659.26, 0.0


EVENT_SOURCING = Talk(
    slug="event-sourcing-without-tears",
    title='"Event Sourcing" without Tears: Ledgers, Facts & Replays / Part 1',
    subtitle="What a five-hundred-year-old accounting habit has to say about job queues",
    filename="Event-Sourcing-without-Tears-Ledgers-Facts-Replays-Part-1.md",
    track="Ledgers & Streams",
    day="Saturday",
    start="10:00",
    end="10:45",
    room="Spinning Hall",
    language="en",
    colour=(28, 74, 110),
    speakers=(
        Speaker(
            "Maren Okafor",
            "Maren Okafor keeps the booking system of a ferry company afloat. Before that she spent nine years in an "
            "audit office, where she learned to distrust every table with a column called <code>status</code>.",
        ),
        Speaker(
            "Tomás Lindqvist",
            "Tomás Lindqvist maintains open-source message brokers by day and restores letterpress machines by night. "
            "He says that both teach you to read backwards.",
        ),
    ),
    abstract="""
<p>Event sourcing has a reputation for turning small programs into large ones. Teams read about it, draw forty boxes
on a whiteboard, and go back to a table with a status column. This talk argues that the idea itself is small: write
down what happened, never change it, and compute everything else. The tears come from what people add to it in the
first month.</p>
<p>We take one modest system, a queue that renders conference recordings, and rebuild it around a ledger. Along the
way we show which problems disappear (who changed this, and when?), which ones merely move house (how do I ask a
question quickly?), and which ones are new (what do I do about an event I regret?).</p>
<p>No framework is needed to follow along. If you can read a bank statement, you already know the most important
data structure of the morning.</p>
""",
    body="""
<h2>Why a ledger</h2>
<p>A bookkeeper who makes a mistake does not reach for an eraser. She writes a second line that cancels the first,
and a third one that says what was meant. The page gets longer, but every balance it ever showed can still be
explained. Most of our databases do the opposite: an update destroys the very fact that somebody will ask about on
Friday afternoon.</p>
<p>The table below compares what is left of a job after a bad night, once as a row and once as a ledger.</p>
<table>
<thead><tr><th>Question</th><th>A row with a status</th><th>A ledger of events</th></tr></thead>
<tbody>
<tr><td>Is the job done?</td><td>yes</td><td>yes</td></tr>
<tr><td>How often was it tried?</td><td>a counter, if somebody thought of it</td>
<td>three times, at 01:12, 01:40 and 02:05</td></tr>
<tr><td>Which worker lost it?</td><td>unknown</td><td>the one on the second machine, at 01:31</td></tr>
<tr><td>What did the dashboard show at 01:35?</td><td>unknown</td><td>replay to 01:35 and look</td></tr>
</tbody>
</table>
<h2>Two functions</h2>
<p>The whole of the pattern fits into two pure functions. One answers a command with the events it causes, or
refuses it. The other folds an event into a state. Neither opens a connection, asks for the time, or rolls dice;
that makes them a pleasure to test.</p>
<pre><code class="language-python">def decide(command: Claim, job: Job) -&gt; list[Event]:
    if job.status is not Status.PENDING:
        raise Refused(f"{job.id} is {job.status}, not pending")
    return [JobClaimed(job.id, worker=command.worker, attempt=job.attempt + 1)]


def evolve(job: Job, event: Event) -&gt; Job:
    match event:
        case JobClaimed(attempt=attempt):
            return replace(job, status=Status.RUNNING, attempt=attempt)
        case JobCompleted():
            return replace(job, status=Status.DONE)
</code></pre>
<h2>Where the tears come from</h2>
<ul>
<li><strong>Events named after tables.</strong> <em>JobUpdated</em> says that somebody did something.
<em>LeaseExpired</em> says what it was.</li>
<li><strong>Heartbeats in the log.</strong> Weather is not history. Keep it in a place where it may be
overwritten.</li>
<li><strong>Rules in the readers.</strong> A view that decides something is a second system of record, and the two
will disagree.</li>
<li><strong>Class names in the database.</strong> The log outlives the code; give events names that a stranger could
read in ten years.</li>
</ul>
<h2>What you will take home</h2>
<ol>
<li>A test for whether your problem wants a ledger at all. Many do not.</li>
<li>A way to change your mind about an event without editing it.</li>
<li>A rehearsal plan for the day the views have to be rebuilt, because that day comes.</li>
</ol>
<p>Part 2, on Sunday, is a workshop. If you only want the second half of this story, read
<a href="../what-a-change-stream-cant-see/">What a Change Stream Can't See</a> instead.</p>
""",
    slides=(
        Slide(
            "The eraser is the problem",
            (
                "An update destroys the fact somebody will ask about on Friday",
                "A bookkeeper corrects by adding a line, never by removing one",
                "Every balance the page ever showed can still be explained",
            ),
        ),
        Slide(
            "From command to view",
            ("Left of the log: decisions. Right of the log: opinions, cheap to throw away",),
            Flow(("Command", "decide", "Event log", "evolve", "View"), "The log is the only thing you must not lose"),
        ),
        Slide(
            "Two functions, no framework",
            figure=Code(
                "def decide(command, job):\n"
                "    if job.status is not PENDING:\n"
                '        raise Refused(f"{job.id} is {job.status}")\n'
                "    return [JobClaimed(job.id, command.worker)]\n\n"
                "def evolve(job, event):\n"
                "    match event:\n"
                "        case JobClaimed():\n"
                "            return replace(job, status=RUNNING)"
            ),
        ),
        Slide(
            "Where our on-call hours went",
            ("Fifty-two weeks, one team of four; before and after the ledger",),
            Chart(
                " h",
                (
                    ("Finding out what happened, before", 118),
                    ("Finding out what happened, after", 21),
                    ("Repairing it, before", 64),
                    ("Repairing it, after", 47),
                ),
            ),
        ),
        Slide(
            "Four ways to make it hurt",
            (
                "Name events after tables: JobUpdated tells nobody anything",
                "Write heartbeats into the log: weather is not history",
                "Let a view decide: now there are two systems of record",
                "Store class names: the log will outlive the class",
            ),
        ),
        Slide(
            "Take home",
            (
                "Write down what happened, and compute the rest",
                "Rehearse the rebuild before you need it",
                "Slides, code and a practice ledger: see the talk’s page",
            ),
        ),
    ),
    video=Video(
        container="webm",
        animation="ledger",
        caption=('"Event Sourcing" without Tears', "Maren Okafor and a very long ledger"),
        melody=((C4, 1), (E4, 1), (G4, 1), (A4, 1), (G4, 2), (E4, 1), (D4, 1), (C4, 2), (REST, 1), (G4, 1), (C5, 2)),
    ),
)


CHANGE_STREAMS = Talk(
    slug="what-a-change-stream-cant-see",
    title="What a Change Stream Can't See",
    subtitle="Reacting to a database without polling it, and without fooling yourself",
    filename="What-a-Change-Stream-Cant-See.md",
    track="Ledgers & Streams",
    day="Saturday",
    start="11:15",
    end="11:45",
    room="Spinning Hall",
    language="en",
    colour=(96, 58, 22),
    speakers=(
        Speaker(
            "Ilse van der Hoek",
            "Ilse van der Hoek is a database engineer from Groningen. She has written three schedulers, and she has "
            "apologised for two of them.",
        ),
    ),
    abstract="""
<p>A change stream tells a program what has just been written to the database, within milliseconds and without a
single query being repeated. It is tempting to build everything on it: queues, caches, dashboards, notifications.
Most of that works. This talk is about the rest.</p>
<p>There are things that a change stream cannot tell you, because nothing was written: a deadline that has passed, a
worker that has stopped breathing, a message that was never sent. And there are things it stops telling you when you
look away for too long. We go through them one by one and show, for each, the smallest honest remedy.</p>
""",
    body="""
<h2>Five blind spots</h2>
<ol>
<li><strong>Time.</strong> Nothing is written when an hour passes. Whatever falls due later needs a timer, set when
the due time was learned and set again at start.</li>
<li><strong>Everything before you looked.</strong> A stream opened now knows nothing of the past. Open the stream
first, read the collection second, and let the overlap be harmless.</li>
<li><strong>Absence.</strong> A crashed process does not write a farewell. A lease, judged by a clock that all sides
agree on, turns silence into a fact.</li>
<li><strong>What fell off the end.</strong> The stream reads from a log of limited size. Sleep too long, and your
bookmark points to a page that is gone.</li>
<li><strong>Intent.</strong> You see which fields changed. You do not see why, unless the reason was written down as
well.</li>
</ol>
<h2>Which remedy for which gap</h2>
<table>
<thead><tr><th>Blind spot</th><th>Symptom in production</th><th>Smallest honest remedy</th></tr></thead>
<tbody>
<tr><td>Time</td><td>retries that wait for the next unrelated write</td>
<td>one timer for the earliest due time</td></tr>
<tr><td>The past</td><td>a job missed at start-up, found by luck</td><td>subscribe, then read</td></tr>
<tr><td>Absence</td><td>a job that runs for ever on a dead machine</td><td>a lease and a watcher</td></tr>
<tr><td>Lost history</td><td>error 286 after a long weekend</td>
<td>catch up from the collection, then reopen</td></tr>
<tr><td>Intent</td><td>a cache that guesses</td><td>store events, not only states</td></tr>
</tbody>
</table>
<h2>Subscribe, then read</h2>
<p>The order of two lines decides whether a program is correct. In the following sketch nothing can slip between the
two, and the price is that an event may be met twice; the position makes the second meeting harmless.</p>
<pre><code class="language-python">async with await orders.watch(resume_after=token) as stream:
    async for event in orders.find({"position": {"$gt": last}}).sort("position"):
        last = await handle(event)
    async for change in stream:
        if change["fullDocument"]["position"] &gt; last:
            last = await handle(change["fullDocument"])
</code></pre>
<p>Two details hide in that listing. The resume token has to be saved even when a batch is empty, or a quiet stream
ages until its bookmark is worthless. And the <em>position</em> has to be dense, so that a reader can tell a gap
from the end.</p>
<h2>Who should come</h2>
<ul>
<li>people who replaced polling by streams and now wonder about that one job every few weeks,</li>
<li>people who are about to, and would like to be spared the wondering,</li>
<li>anybody who enjoys a good race condition as long as it is somebody else's.</li>
</ul>
<p>Basic knowledge of any document database is enough. The talk builds on ideas from
<a href="../event-sourcing-without-tears/">Saturday's opening session</a> but stands on its own feet.</p>
""",
    slides=(
        Slide(
            "Silence has three meanings",
            (
                "Nothing happened",
                "Something happened, and nobody wrote it down",
                "Something was written, and you were not listening",
            ),
        ),
        Slide(
            "How a wake-up travels",
            ("Fast when it works; the collection is the truth when it does not",),
            Flow(
                ("Writer", "Oplog", "Change stream", "Reader"), "The oplog is finite: whoever sleeps too long falls off"
            ),
        ),
        Slide(
            "Time from write to wake-up",
            ("Median of ten thousand writes on one laptop; your numbers will differ",),
            Chart(" ms", (("Change stream", 2.1), ("Polling every 50 ms", 27.4), ("Polling every 250 ms", 131.0))),
        ),
        Slide(
            "Remedies, smallest first",
            (
                "A timer for the earliest due time, set again at start",
                "Subscribe first, read second, skip what you know",
                "A lease, judged by the server’s clock",
                "After error 286: catch up from the collection",
            ),
        ),
    ),
)


BIBLIOTHEKEN = Talk(
    slug="buecher-baender-bytes",
    title="Bücher, Bänder, Bytes: Wie Bibliotheken Konferenzen für übermorgen aufheben",
    subtitle="Ein Werkstattbericht aus dem Magazin",
    filename="Bücher-Bänder-Bytes-Wie-Bibliotheken-Konferenzen-für-übermorgen-aufheben.md",
    track="Memory & Access",
    day="Sunday",
    start="10:00",
    end="10:40",
    room="Hemp Store",
    language="de",
    colour=(74, 42, 92),
    speakers=(
        Speaker(
            "Dr. Henrike Möller-Thoms",
            "Dr. Henrike Möller-Thoms leitet die digitale Langzeitarchivierung einer Landesbibliothek. Sie sammelt "
            "Programmhefte von Tagungen, die niemand sonst aufgehoben hat.",
        ),
        Speaker(
            "Jonas Weiß",
            "Jonas Weiß ist Bibliothekar und Systemadministrator und besteht darauf, dass das ein einziger Beruf ist.",
        ),
    ),
    abstract="""
<p>Eine Konferenz dauert zwei Tage, ihre Webseite meistens drei Jahre. Danach läuft die Domain ab, die
Videoplattform ändert ihre Adressen, und von einem Vortrag, der ein ganzes Fachgebiet verändert hat, bleibt eine
Fußnote mit totem Link. Bibliotheken kennen dieses Problem seit dem Papier, das sich selbst zersetzt. Sie haben
Antworten darauf, und einige davon passen erstaunlich gut auf Folien, Mitschnitte und Programmseiten.</p>
<p>Wir berichten aus der Praxis: wie eine Landesbibliothek die Tagungen ihrer Region einsammelt, was sie von jedem
Vortrag behält, was sie bewusst wegwirft, und warum eine schlichte Textdatei am Ende oft mehr wert ist als das
schönste Portal.</p>
<p>Der Vortrag richtet sich an alle, die Veranstaltungen ausrichten und möchten, dass man in zwanzig Jahren noch
weiß, was dort gesagt wurde. Vorkenntnisse im Bibliothekswesen sind nicht nötig.</p>
""",
    body="""
<h2>Was von einem Vortrag übrig bleibt</h2>
<p>Ein Vortrag besteht aus mehr als seinem Mitschnitt. Zum Verständnis gehören die Ankündigung, die Folien, die
Namen und die Reihenfolge im Programm. Jedes dieser Stücke liegt an einem anderen Ort und altert in seinem eigenen
Tempo.</p>
<table>
<thead><tr><th>Stück</th><th>Übliches Format</th><th>Haltbarkeit ohne Pflege</th>
<th>Was wir aufheben</th></tr></thead>
<tbody>
<tr><td>Ankündigung</td><td>HTML</td><td>etwa drei Jahre</td>
<td>den Text als Markdown, dazu ein Abbild der Seite</td></tr>
<tr><td>Folien</td><td>PDF</td><td>lange, wenn die Schriften eingebettet sind</td>
<td>das PDF und ein Bild je Seite</td></tr>
<tr><td>Mitschnitt</td><td>WebM oder MP4</td><td>bis zum nächsten Umzug der Plattform</td>
<td>das Original und ein Transkript</td></tr>
<tr><td>Programm</td><td>eine Datenbank</td><td>bis zum Ende der Förderung</td>
<td>eine Tabelle, die jeder lesen kann</td></tr>
</tbody>
</table>
<h2>Drei Regeln aus dem Magazin</h2>
<ol>
<li><strong>Erst zählen, dann kopieren.</strong> Ohne Bestandsliste merkt niemand, dass etwas fehlt.</li>
<li><strong>Prüfsummen sind Inventarnummern.</strong> Wer sie beim Eingang notiert, kann zehn Jahre später beweisen,
dass nichts verändert wurde.</li>
<li><strong>Nichts überschreiben.</strong> Eine bessere Fassung ist eine neue Fassung. Die alte bleibt stehen, mit
Datum und Begründung.</li>
</ol>
<p>Die zweite Regel braucht nicht mehr als ein Werkzeug, das auf jedem Rechner liegt:</p>
<pre><code class="language-shell">cd tagung-2026/
find . -type f ! -name manifest-sha256.txt -exec sha256sum {} + | sort -k 2 &gt; manifest-sha256.txt
sha256sum --check --quiet manifest-sha256.txt &amp;&amp; echo "Alles noch da."
</code></pre>
<h2>Was wir von Veranstaltern brauchen</h2>
<ul>
<li>eine Adresse je Vortrag, die sich nach der Tagung nicht mehr ändert,</li>
<li>die Folien als PDF, mit eingebetteten Schriften und ohne Kennwort,</li>
<li>eine klare Lizenz, am besten schon im Aufruf zur Einreichung,</li>
<li>und eine Person, die auch im übernächsten Jahr noch ans Telefon geht.</li>
</ul>
<p>Wer beim Aufbereiten auch an Menschen denken möchte, die Folien nicht sehen können, sollte anschließend in den
Vortrag <a href="../slides-nobody-has-to-see/">Slides Nobody Has to See</a> gehen.</p>
""",
    slides=(
        Slide(
            "Drei Jahre, dann ein toter Link",
            (
                "Domains laufen ab, Plattformen ziehen um",
                "Übrig bleibt eine Fußnote, die ins Leere führt",
                "Bibliotheken üben das Aufheben seit Jahrhunderten",
            ),
        ),
        Slide(
            "So lange war die Adresse erreichbar",
            ("Stichprobe: 240 Tagungen unserer Region, Anteil nach fünf Jahren",),
            Chart(" %", (("Programmseite", 41), ("Folien", 33), ("Mitschnitt", 52), ("Kopie im Archiv", 100))),
        ),
        Slide(
            "Vom Eingang bis ins Magazin",
            ("Nichts überschreiben: Eine bessere Fassung ist eine neue Fassung",),
            Flow(("Zählen", "Kopieren", "Prüfsumme", "Ablegen"), "Jeder Schritt wird notiert, mit Datum und Name"),
        ),
    ),
)


ACCESSIBLE_SLIDES = Talk(
    slug="slides-nobody-has-to-see",
    title="Slides Nobody Has to See",
    subtitle="Accessible talks, from the first draft to the archived page",
    filename="Slides-Nobody-Has-to-See.md",
    track="Memory & Access",
    day="Sunday",
    start="11:00",
    end="11:30",
    room="Hemp Store",
    language="en",
    colour=(20, 92, 72),
    speakers=(
        Speaker(
            "Priya Raman",
            "Priya Raman trains speakers and captioners. She is losing her sight slowly and her patience with "
            "light grey text rather faster.",
        ),
    ),
    abstract="""
<p>Some people in your audience cannot see the screen. They are blind, or sitting behind a pillar, or listening to
the recording on a train, or they are reading a text version because a search engine brought them there ten years
later. They all need the same thing: a talk whose words carry its meaning.</p>
<p>This session is given without slides, on purpose. Instead of a list of regulations it offers habits for speakers,
small enough to adopt before the next rehearsal, and it shows what happens to a well-described talk when it is
turned into a page: the picture descriptions, the headings and the transcript are suddenly all there.</p>
""",
    body="""
<h2>Say what you show</h2>
<p>The most useful habit costs nothing. Whenever a picture appears, say in one sentence what it is and in another
what it means. <q>A bar chart; the bar for Friday is three times as tall as the others.</q> People who see it lose
two seconds. Everybody else gets the point of the slide.</p>
<h2>Contrast is arithmetic</h2>
<p>Whether text can be read against its background is not a matter of taste. The Web Content Accessibility
Guidelines give a formula and a threshold for it, and projectors are kinder to nobody.</p>
<table>
<thead><tr><th>Text on white</th><th>Contrast ratio</th><th>Body text (needs 4.5)</th>
<th>Large text (needs 3.0)</th></tr></thead>
<tbody>
<tr><td>light grey, #AAAAAA</td><td>2.3 : 1</td><td>no</td><td>no</td></tr>
<tr><td>mid grey, #767676</td><td>4.5 : 1</td><td>just</td><td>yes</td></tr>
<tr><td>dark green, #145C48</td><td>7.9 : 1</td><td>yes</td><td>yes</td></tr>
</tbody>
</table>
<h2>Describe, don't decorate</h2>
<p>An alternative text is written for somebody who wants to follow the argument. Leave out the colour of the
background and put in the reason why the picture is there.</p>
<pre><code class="language-html">&lt;img src="queue.svg"
     alt="Jobs wait in one queue. Two workers take from it; the third has
          stopped, and its job is handed to the first."&gt;
</code></pre>
<h2>A checklist for the night before</h2>
<ul>
<li>Every slide has a title, and no two titles are the same.</li>
<li>No sentence on a slide is longer than one you could say in a breath.</li>
<li>Colour never carries a meaning alone; there is always a word or a shape beside it.</li>
<li>Code is large enough to be read from the last row, and you read the important line aloud.</li>
<li>The file you hand in has real text in it, not pictures of text.</li>
</ul>
<p>The checklist is also what an archive needs, as the talk <a href="../buecher-baender-bytes/"
hreflang="de">Bücher, Bänder, Bytes</a> (in German) explains an hour earlier in the same room.</p>
""",
    video=Video(
        container="mp4",
        animation="contrast",
        caption=("Slides Nobody Has to See", "Priya Raman on words that carry a talk"),
        melody=((A4, 2), (G4, 1), (E4, 1), (D4, 2), (E4, 1), (G4, 1), (A4, 1), (C5, 1), (D5, 1), (E5, 1), (C5, 2)),
    ),
)


TALKS = (EVENT_SOURCING, CHANGE_STREAMS, BIBLIOTHEKEN, ACCESSIBLE_SLIDES)
