"The built site in a real browser: Chromium, driven by Playwright, pages served on this machine."
import functools, http.server, shutil, subprocess, threading
import xml.etree.ElementTree as xml

import pytest
from course import BUILT, CHROMIUM, ROOT


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words): pass
    def send_error(self, code, *words): super().send_error(code) if code != 404 else self.lost()
    def lost(self):
        "As GitHub Pages does: the page that says so, with status 404."
        body = (BUILT / "404.html").read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def site():
    "The address of the site, built as the README says."
    if not CHROMIUM: pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    if not shutil.which("npm"): pytest.skip("needs npm, which brings MathJax (Debian: apt-get install npm)")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=BUILT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def visit(site, chromium):
    "Opens a page; what the browser complained of, and what it asked of others, is in `page.trouble`."
    opened = []
    def open_page(name, width=1280, theme="light", **context):
        context = chromium.new_context(viewport=dict(width=width, height=900), color_scheme=theme, **context)
        opened.append(context)
        page = context.new_page()
        page.trouble = []
        page.on("console", lambda m: page.trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((site, "data:", "blob:")) else page.trouble.append(f"asks {r.url}"))
        page.goto(f"{site}/{name}", wait_until="networkidle")
        return page
    yield open_page
    for context in opened: context.close()


@pytest.fixture(scope="session")
def pages(site):
    "The names of all pages."
    found = xml.parse(BUILT / "sitemap.xml").iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")
    return [loc.text.split("/stan_nb/", 1)[1] or "index.html" for loc in found]
