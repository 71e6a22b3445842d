"""Look at a site, or at one HTML file, as a browser does: broken links, console errors, things loaded from elsewhere, pages wider than the screen.

    python scripts/site_check.py site                              # every page of make docs
    python scripts/site_check.py runs/demo/report/index.html --shots /tmp/shots --dark

Each page is opened in headless Chromium at each width (1280 and 390). Links to other hosts are counted, not followed. Exit status: 0 nothing found,
1 something was, 2 no browser. Needs the package selenium, and of the system Chromium and chromedriver (Debian: apt install chromium chromium-driver).
"""
import argparse
import functools
import http.server
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars")
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "video": "src", "source": "src"}
WIDE = "return document.documentElement.scrollWidth - window.innerWidth"
LOADED = "return performance.getEntriesByType('resource').map(e => e.name)"


class Page(HTMLParser):
    """Links (addresses as written) and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {v for v in (values.get("id"), values.get("name")) if v}
        target = values.get(LINKS.get(tag, ""))
        if target and values.get("rel") not in ("canonical", "preconnect"):
            self.links.append(target)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder on a port of this machine only."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            with suppress(ConnectionError):                     # the browser went on to the next page
                super().copyfile(source, outputfile)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def crawl(start: str, base: str) -> tuple[dict[str, Page], list[str], int]:
    """Pages below `base` that `start` leads to, what is wrong with their links, and how many links lead to other hosts."""
    pages, found, files, elsewhere, todo = {}, [], set(), 0, [start]
    linked: list[tuple[str, str, str]] = []                                         # page, address, anchor
    while todo:
        url = todo.pop()
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                html = answer.headers.get_content_type() == "text/html"
                text = answer.read().decode(errors="replace") if html else ""
        except urllib.error.HTTPError as error:
            found += [f"{page}: broken link to {address} ({error.code})" for page, address, _ in linked if address == url] or [f"{url}: {error.code}"]
            continue
        if not html:
            continue
        pages[url] = Page(text)
        for target in pages[url].links:
            address, anchor = urldefrag(urljoin(url, target))
            if not address.startswith(base):
                elsewhere += address.startswith("http")
                continue
            linked.append((url, address, unquote(anchor)))
            if address not in files:
                files.add(address)
                if address != start:
                    todo.append(address)
    found += [f"{page}: {address} has no anchor #{anchor}" for page, address, anchor in dict.fromkeys(linked)
              if anchor and address in pages and anchor not in pages[address].anchors]
    return pages, found, elsewhere


def browser(width: int, dark: bool, profile: str):
    """Headless Chromium with a screen `width` pixels wide; exits with a clear line where there is none."""
    try:
        from selenium import webdriver
    except ImportError:
        sys.exit(stop("the package selenium is not installed: pip install 'modip_ray[docs]'"))
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        sys.exit(stop(f"{'no ' + ', '.join(BROWSERS) if binary is None else 'no chromedriver'} on the PATH; Debian: apt install chromium chromium-driver"))
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    return chrome


def stop(text: str) -> int:
    print(f"site_check: {text}", file=sys.stderr)
    return 2


def look(chrome, url: str, base: str, width: int, shot: Path | None) -> list[str]:
    """What a browser complains about on a page."""
    chrome.get(url)
    where = f"{url} at {width}"
    found = [f"{where}: console: {entry['message']}" for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    found += [f"{where}: loads {name} from elsewhere" for name in chrome.execute_script(LOADED) if not name.startswith((base, "data:", "blob:"))]
    wider = chrome.execute_script(WIDE)
    if wider > 1:
        found.append(f"{where}: {wider} pixels wider than the screen")
    if shot is not None:
        shot.parent.mkdir(parents=True, exist_ok=True)
        chrome.save_screenshot(str(shot))
    return found


def check(path: Path, widths: list[int], shots: Path | None = None, dark: bool = False) -> int:
    """Exit status; prints what was found, and a line that counts."""
    folder, first = (path, "index.html") if path.is_dir() else (path.parent, path.name)
    if not (folder / first).is_file():
        return stop(f"{folder / first}: no such file; give a folder with an index.html, or an HTML file")
    with served(folder) as base, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        pages, found, elsewhere = crawl(base + first, base)
        for width in widths:
            chrome = browser(width, dark, f"{profile}/{width}")
            try:
                for url in sorted(pages):
                    name = url.removeprefix(base).removesuffix(".html").replace("/", "_") or "index"
                    found += look(chrome, url, base, width, shots / f"{name}_{width}{'_dark' if dark else ''}.png" if shots else None)
            finally:
                chrome.quit()
    print("\n".join([*found, f"{len(pages)} pages at {' and '.join(map(str, widths))} pixels: {len(found)} findings ({elsewhere} links lead elsewhere)"]))
    return 1 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Broken links, console errors and foreign resources of a site or an HTML file, in headless Chromium.")
    parser.add_argument("path", type=Path, metavar="FOLDER|FILE.html")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 390], metavar="PIXELS")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="write a picture of each page at each width there")
    parser.add_argument("--dark", action="store_true", help="as on a screen set to dark")
    args = parser.parse_args()
    sys.exit(check(args.path, args.widths, args.shots, args.dark))


if __name__ == "__main__":
    main()
