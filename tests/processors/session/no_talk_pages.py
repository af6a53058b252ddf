"""Pages that are no talk, with the structure of the real ones, and talks that look similar.

The talk is `TITLE` by `SPEAKERS`, unless a talk states another title.
"""

# ruff: noqa: E501 - lines of HTML

from __future__ import annotations

from typing import Final

TITLE: Final = "Ledgers that never forget"
SPEAKERS: Final = ["Ada Example", "Grace Sample"]
FOOTER: Final = "<footer><a href=/>Home</a> <a href=/imprint>Imprint</a> © ExampleConf</footer>"


def page(title: str, body: str, head: str = "") -> str:
    return f"<!DOCTYPE html><html><head><title>{title}</title>{head}</head><body>{body}</body></html>"


NO_TALK: Final[dict[str, tuple[str, str]]] = {
    "Cloudflare": (
        "BOT_CHECK",
        page(
            "Just a moment...",
            "<div class=main-wrapper role=main><noscript><div class=h2><span id=challenge-error-text>Enable JavaScript and "
            "cookies to continue</span></div></noscript></div><script>(function(){window._cf_chl_opt={cvId:'3'};}());"
            "</script>",
            "<meta name=robots content='noindex,nofollow'><meta http-equiv=refresh content=360>",
        ),
    ),
    "Cloudflare block": (
        "BOT_CHECK",
        page(
            "Attention Required! | Cloudflare",
            "<div id=cf-wrapper><div id=cf-error-details class=cf-error-details-wrapper><h1>Sorry, you have been blocked</h1>"
            "<h2>You are unable to access exampleconf.example</h2><p>This website is using a security service to protect "
            "itself from online attacks.</p></div></div>",
        ),
    ),
    "Anubis": (
        "BOT_CHECK",
        page(
            "Making sure you&#39;re not a bot!",
            "<main><h1 id=title class=centered-div>Making sure you&#39;re not a bot!</h1><img src='/.within.website/x/cmd/"
            "anubis/static/img/pensive.webp'><p id=status>Loading...</p><details><summary>Why am I seeing this?</summary><p>"
            + "You are seeing this because the administrator of this website has set up Anubis to protect the server. "
            * 15
            + "</p></details></main>",
            "<script id=anubis_challenge type=application/json>{}</script>",
        ),
    ),
    "DDoS-Guard": (
        "BOT_CHECK",
        page(
            "DDoS-Guard",
            "<h1 id=title>Checking your browser before accessing exampleconf.example</h1><p>Please wait a few seconds.</p>"
            "<script src=/.well-known/ddos-guard/js-challenge/index.js></script>",
        ),
    ),
    "Akamai": (
        "BOT_CHECK",
        page(
            "Access Denied",
            'You don\'t have permission to access "http&#58;&#47;&#47;exampleconf&#46;example&#47;talk" on this server.<P>'
            "Reference&#32;&#35;18&#46;2f5c1502<P>https&#58;&#47;&#47;errors&#46;edgesuite&#46;net&#47;18",
        ),
    ),
    "reCAPTCHA": (
        "BOT_CHECK",
        page(
            "ExampleConf",
            "<form><p>Our systems have detected unusual traffic from your computer network. Please complete the captcha to "
            "continue.</p><div class=g-recaptcha data-sitekey=x></div></form>",
        ),
    ),
    "Incapsula": (
        "BOT_CHECK",
        "<html><head><META NAME=robots CONTENT='noindex,nofollow'></head><body><iframe id=main-iframe src='/_Incapsula_"
        "Resource?SWUDNSAI=31'>Request unsuccessful. Incapsula incident ID: 1</iframe></body></html>",
    ),
    "DataDome": (
        "BOT_CHECK",
        page(
            "exampleconf.example",
            "<p id=cmsg>Please enable JS and disable any ad blocker</p>"
            "<script src=https://ct.captcha-delivery.com/c.js></script>",
        ),
    ),
    "AWS WAF": (
        "BOT_CHECK",
        page(
            "",
            "<div id=challenge-container></div><noscript><h1>JavaScript is disabled</h1>In order to continue, we need to "
            "verify that you're not a robot.</noscript>",
            "<script>window.awsWafCookieDomainList = []; window.gokuProps = {};</script>",
        ),
    ),
    "German bot check": (
        "BOT_CHECK",
        page("Sicherheitsüberprüfung", "<p>Bitte bestätigen Sie, dass Sie kein Roboter sind.</p><input type=checkbox>"),
    ),
    "Vercel": (
        "BOT_CHECK",
        page("Vercel Security Checkpoint", "<p>We're verifying your browser</p><script>1</script>"),
    ),
    "login form": (
        "LOGIN_REQUIRED",
        page(
            "Log in | ExampleConf",
            f"<h1>Log in</h1><form action=/login method=post><label>User <input name=user></label><label>Password "
            f"<input type=password name=p></label><button>Log in</button></form><a href=/r>Forgot your password?</a>{FOOTER}",
        ),
    ),
    "login form without heading": (
        "LOGIN_REQUIRED",
        page("ExampleConf", f"<form>E-mail <input name=mail> Password <input type=password></form>{FOOTER}"),
    ),
    "login text": (
        "LOGIN_REQUIRED",
        page("ExampleConf", f"<main><p>You must be logged in to view this session.</p></main>{FOOTER}"),
    ),
    "login with title in head": (
        "LOGIN_REQUIRED",
        page(f"{TITLE} – ExampleConf", "<h1>Sign in to ExampleConf</h1><form><input name=email></form>"),
    ),
    "WordPress password": (
        "LOGIN_REQUIRED",
        page(
            "Members only",
            "<form class=post-password-form><p>This content is password protected. To view it please enter "
            "your password below:</p><input type=password></form>",
        ),
    ),
    "German login": ("LOGIN_REQUIRED", page("Anmelden", "<p>Bitte melden Sie sich an.</p><form><input name=n></form>")),
    "soft 404": (
        "PAGE_NOT_FOUND",
        page("Page not found | ExampleConf", f"<h1>Oops!</h1><p>We can't find that page.</p>{FOOTER}"),
    ),
    "soft 404 with long menu": (
        "PAGE_NOT_FOUND",
        page("404 - ExampleConf", f"<h1>404</h1>{'<p>Visit our sponsors and partners of the last years.</p>' * 30}"),
    ),
    "WordPress 404": (
        "PAGE_NOT_FOUND",
        "<html><head><title>ExampleConf</title></head><body class='error404 wp-theme'><h1>Nothing here</h1>"
        "<p>It looks like nothing was found at this location. Maybe try a search?</p></body></html>",
    ),
    "German 404": (
        "PAGE_NOT_FOUND",
        page("Seite nicht gefunden", "<h1>Seite nicht gefunden</h1><p>Zur Startseite</p>"),
    ),
    "French 404": ("PAGE_NOT_FOUND", page("Page introuvable", "<p>Retour à l'accueil</p>")),
    "Japanese 404": ("PAGE_NOT_FOUND", page("ページが見つかりません", "<p>トップへ戻る</p>")),
    "Express": ("PAGE_NOT_FOUND", page("Error", "<pre>Cannot GET /talks/ledgers</pre>")),
    "removed talk": (
        "PAGE_NOT_FOUND",
        page("ExampleConf", f"<p>The session you requested is no longer available.</p>{FOOTER}"),
    ),
    "Next.js 404": (
        "PAGE_NOT_FOUND",
        page(
            "ExampleConf",
            "<div id=__next><h1 class=next-error-h1>404</h1><h2>This page could not be found.</h2></div>"
            "<script src=/_next/main.js></script>",
        ),
    ),
    "maintenance": (
        "SITE_UNAVAILABLE",
        page(
            "Maintenance", "<h1>We&rsquo;ll be back soon!</h1><p>We're performing some maintenance at the moment.</p>"
        ),
    ),
    "WordPress maintenance": (
        "SITE_UNAVAILABLE",
        page("Maintenance", "<h1>Briefly unavailable for scheduled maintenance. Check back in a minute.</h1>"),
    ),
    "German maintenance": ("SITE_UNAVAILABLE", page("Wartungsarbeiten", "<p>Wir sind bald zurück.</p>")),
    "Django": (
        "SITE_UNAVAILABLE",
        page(
            "DoesNotExist at /talks/1/",
            "<div id=summary><h1>DoesNotExist at /talks/1/</h1><pre class=exception_value>Talk "
            "matching query does not exist.</pre></div><p>You’re seeing this error because you have <code>DEBUG = True"
            "</code> in your Django settings file.</p>",
        ),
    ),
    "PHP": (
        "SITE_UNAVAILABLE",
        "<br />\n<b>Fatal error</b>:  Uncaught Error: Call to a member function query() on null in "
        "/var/www/html/talk.php:12\nStack trace:\n#0 {main}\n  thrown in <b>/var/www/html/talk.php</b> on line <b>12</b>",
    ),
    "database": (
        "SITE_UNAVAILABLE",
        page("Database Error", "<div class=wp-die-message><h1>Error establishing a database connection</h1></div>"),
    ),
    "Rails": (
        "SITE_UNAVAILABLE",
        page(
            "We're sorry, but something went wrong (500)",
            "<div class=dialog><h1>We're sorry, but something went wrong.</h1></div>",
        ),
    ),
    "nginx 502": ("SITE_UNAVAILABLE", page("502 Bad Gateway", "<center><h1>502 Bad Gateway</h1></center><hr>nginx")),
    "Next.js error": (
        "SITE_UNAVAILABLE",
        page("ExampleConf", "<h2>Application error: a client-side exception has occurred</h2>"),
    ),
    "directory": (
        "NOT_A_TALK_PAGE",
        page(
            "Index of /talks", "<h1>Index of /talks</h1><pre><a href=../>../</a> <a href=a.pdf>a.pdf</a> 2025 12K</pre>"
        ),
    ),
    "Python directory": (
        "NOT_A_TALK_PAGE",
        page("Directory listing for /", "<h1>Directory listing for /</h1><ul><li><a href=a>a</a></ul>"),
    ),
    "nginx": (
        "NOT_A_TALK_PAGE",
        page(
            "Welcome to nginx!",
            "<h1>Welcome to nginx!</h1><p>If you see this page, the nginx web server is successfully "
            "installed and working.</p>",
        ),
    ),
    "parked": (
        "NOT_A_TALK_PAGE",
        page("exampleconf.example", "<h1>exampleconf.example is for sale</h1><p>Buy this domain.</p>"),
    ),
    "coming soon": ("NOT_A_TALK_PAGE", page("ExampleConf", "<h1>Coming soon</h1><p>Stay tuned!</p>")),
    "suspended": ("NOT_A_TALK_PAGE", page("Account Suspended", "<p>Contact your hosting provider.</p>")),
    "consent": (
        "NOT_A_TALK_PAGE",
        page(
            "Before you continue",
            "<form action=https://consent.google.example/save><h1>Before you continue</h1>"
            "<p>We use cookies and data to deliver services.</p><button>Accept all</button></form>",
        ),
    ),
    "cookie wall": (
        "NOT_A_TALK_PAGE",
        page(
            "ExampleConf",
            "<h1>We value your privacy</h1><p>We and our partners store or access information on devices, "
            "such as cookies. Accept all cookies or manage preferences to visit this website.</p>",
        ),
    ),
    "redirect without target": (
        "NOT_A_TALK_PAGE",
        page("Redirecting…", "<h1>Redirecting…</h1><a href=/talk>Click here if you are not redirected.</a>"),
    ),
    "React": (
        "JAVASCRIPT_REQUIRED",
        page(
            "ExampleConf",
            "<noscript>You need to enable JavaScript to run this app.</noscript><div id=root></div>"
            "<script src=/static/js/main.js></script>",
        ),
    ),
    "Vue": (
        "JAVASCRIPT_REQUIRED",
        page(
            "ExampleConf",
            "<noscript><strong>We're sorry but site doesn't work properly without JavaScript enabled."
            "</strong></noscript><div id=app></div><script src=/js/app.js></script>",
        ),
    ),
    "Angular": (
        "JAVASCRIPT_REQUIRED",
        page(TITLE, "<app-root>Loading...</app-root><script src=main.js type=module></script>"),
    ),
    "shell with title in head": (
        "JAVASCRIPT_REQUIRED",
        page(
            TITLE,
            f"<header>ExampleConf</header><div id=__next></div>{FOOTER}<script src=/main.js></script>",
            f"<meta property=og:title content='{TITLE}'>",
        ),
    ),
    "empty with script": ("JAVASCRIPT_REQUIRED", page("x", "<script src=/bundle.js></script>")),
    "loading": ("JAVASCRIPT_REQUIRED", page("Sched", "<p>Loading schedule…</p><script src=/a.js></script>")),
    "feed": ("NOT_HTML", "<?xml version='1.0'?>\n<rss version='2.0'><channel><title>Talks</title></channel></rss>"),
    "JSON": ("NOT_HTML", '{"title": "Ledgers that never forget", "abstract": "An append-only log."}'),
    "calendar": ("NOT_HTML", "BEGIN:VCALENDAR\nVERSION:2.0\nSUMMARY:Ledgers that never forget\nEND:VCALENDAR"),
}
"""The code of the error, and the page."""

ABSTRACT: Final = (
    "In this talk we look at what happened in production, why the first three ideas did not help, and what we do today. "
    "We show the code, the numbers, and the mistakes that you can avoid. There will be time for questions at the end, and "
    "the slides will be published. Basic knowledge of HTTP is enough to follow. The talk is for operators and developers."
)


def talk(title: str, text: str, *, speaker: str = "Ada Example", head: str = "", extra: str = "") -> str:
    body = f"<main><h1>{title}</h1><p>{speaker}</p><p>{text}</p></main>{extra}"
    return page(f"{title} | ExampleConf", body, head)


TALKS: Final[dict[str, tuple[str, str]]] = {
    "404": ("404: Page not found", talk("404: Page not found", f"What error pages tell us. {ABSTRACT}")),
    "short 404": ("Page not found", talk("Page not found", "A history of error pages.")),
    "403": ("403 Forbidden", talk("403 Forbidden", "Access control in ten minutes.")),
    "login": (
        "Log in with passkeys",
        talk("Log in with passkeys", f"You must be logged in to view this page. {ABSTRACT}"),
    ),
    "login form in header": (
        TITLE,
        talk(TITLE, "State that is overwritten is gone.", extra="<form>Login <input type=password name=p></form>"),
    ),
    "one word": ("Login", talk("Login", f"Forgot your password? {ABSTRACT}")),
    "cookies": (
        "Accept all cookies",
        talk("Accept all cookies", f"We and our partners use cookies. Accept all or reject all? {ABSTRACT}"),
    ),
    "cookie banner": (
        TITLE,
        talk(
            TITLE,
            "State that is overwritten is gone.",
            extra="<div id=cookie>This website uses cookies. <button>Accept all "
            "cookies</button> Manage preferences</div>",
        ),
    ),
    "Cloudflare": (
        "Just a moment: how Cloudflare checks browsers",
        talk(
            "Just a moment: how Cloudflare checks browsers",
            f"Checking your browser before accessing a site. {ABSTRACT}",
        ),
    ),
    "Cloudflare script": (
        TITLE,
        talk(
            TITLE,
            ABSTRACT,
            extra="<script>window.__CF$cv$params={};a.src='/cdn-cgi/challenge-platform/scripts/jsd/main.js';</script>",
        ),
    ),
    "captcha": (
        "I am not a robot: the end of the captcha",
        talk(
            "I am not a robot: the end of the captcha",
            f"Verify you are human! {ABSTRACT}",
            extra="<div class=g-recaptcha></div><script src=https://www.google.com/recaptcha/api.js></script>",
        ),
    ),
    "Anubis": (
        "Anubis: making sure you're not a bot",
        talk("Anubis: making sure you&#39;re not a bot", f'&lt;script id="anubis_challenge"&gt; explained. {ABSTRACT}'),
    ),
    "JavaScript": (
        "You need to enable JavaScript",
        talk(
            "You need to enable JavaScript",
            "Why the web needs scripts.",
            extra="<noscript>Please enable JavaScript.</noscript><script src=a.js></script>",
        ),
    ),
    "prerendered": (
        TITLE,
        f"<html><head><title>{TITLE}</title></head><body><noscript>You need to enable JavaScript to run this app.</noscript>"
        f"<div id=root><h1>{TITLE}</h1><p>Ada Example</p><p>State that is overwritten is gone.</p></div>"
        "<script src=/main.js></script></body></html>",
    ),
    "maintenance": (
        "Down for maintenance",
        talk("Down for maintenance", f"We will be back soon: scheduled maintenance without downtime. {ABSTRACT}"),
    ),
    "500": (
        "500 Internal Server Error",
        talk("500 Internal Server Error", f"Traceback (most recent call last). {ABSTRACT}"),
    ),
    "PHP": (
        "Fatal error in PHP",
        talk("Fatal error in PHP", f"Fatal error: uncaught exception on line 12. {ABSTRACT}"),
    ),
    "PHP notice": (
        TITLE,
        "<b>Warning</b>: mysqli_connect(): failed in /var/www/x.php on line <b>3</b>"
        + talk(TITLE, f"State that is overwritten is gone. {ABSTRACT}"),
    ),
    "index": ("Index of everything", talk("Index of everything", f"Search engines. {ABSTRACT}")),
    "coming soon": (
        "Coming soon: a new database",
        talk("Coming soon: a new database", f"Stay tuned, the schedule will be announced soon. {ABSTRACT}"),
    ),
    "domain": (
        "This domain is for sale",
        talk("This domain is for sale", f"Buy this domain! Parking explained. {ABSTRACT}"),
    ),
    "redirect": ("Redirecting…", talk("Redirecting…", f"You will be redirected: URLs that last. {ABSTRACT}")),
    "family name first": (
        TITLE,
        page("ExampleConf", "<h2>Ledgers that never forget</h2><p>Sample, Grace</p><p>This domain is parked.</p>"),
    ),
    "without speakers' names": (
        TITLE,
        page(TITLE, f"<h1>{TITLE}</h1><p>This session will be announced soon. {ABSTRACT}</p>"),
    ),
    "German page": (
        TITLE,
        page(
            "Programm",
            "<h1>Journale, die nie vergessen</h1><p>Ada Example</p><p>Wir verwenden Cookies. Was überschrieben "
            f"wird, ist weg. {ABSTRACT}</p>",
        ),
    ),
}
"""The title of the talk, and its page."""
