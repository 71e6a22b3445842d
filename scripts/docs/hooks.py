"""What mkdocs does beside its usual work (mkdocs.yml: hooks): pages made from code, files of the repository as pages, links that leave docs/.

Links in all Markdown files are relative to the file itself, so that they work in the repository, too. The site gets a copy of each linked file that is
not a page. `<!-- insert README.md: Two commands -->` is replaced by that section of the README,
`<!-- include examples/act.py -->` by the file as code.
"""
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.docs import commands, results, settings

ROOT = Path(__file__).resolve().parents[2]
#: Pages of the site that are files elsewhere in the repository, and those that are made here (with links relative to the repository's root).
MOVED = {"cluster.md": "cluster/README.md", "dashboards.md": "cluster/grafana/README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md",
         "tests.md": "tests/README.md", "main_study.md": "results/studies/main/results.md",
         "ablations.md": "results/studies/ablations/results.md", "rivals.md": "results/studies/rivals/results.md",
         "guards.md": "results/studies/guards/results.md"}
MADE: dict[str, Callable[[], str]] = {"results.md": results.page, "reference/settings.md": settings.page, "reference/commands.md": commands.page}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml"}
LINK = re.compile(r"(?P<head>!?\[[^\]]*\]\()(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?P<tail>\))")
INCLUDE = re.compile(r"<!-- include (?P<file>\S+) -->")
INSERT = re.compile(r"<!-- insert (?P<file>\S+): (?P<section>.+?) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, origin in MOVED.items():
        files.append(File.generated(config, uri, content=(ROOT / origin).read_text()))
    for uri, make in MADE.items():
        files.append(File.generated(config, uri, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    markdown = relinked(markdown, origin_of(uri), uri, config, files)

    def inserted(match: re.Match) -> str:
        return relinked(section_of(match["file"], match["section"]), match["file"], uri, config, files)
    return INCLUDE.sub(as_code, INSERT.sub(inserted, markdown))


def as_code(match: re.Match) -> str:
    path = ROOT / match["file"]
    if not path.is_file():
        raise PluginError(f"include: {match['file']} is no file of the repository")
    return f"```{LANGUAGES[path.suffix]} title=\"{match['file']}\"\n{path.read_text()}```"


def origin_of(uri: str) -> str:
    """The file of the repository that a page's links are relative to."""
    return "made" if uri in MADE else MOVED.get(uri, f"docs/{uri}")


def section_of(file: str, title: str) -> str:
    """The text below a heading of the second level, without the heading."""
    parts = (ROOT / file).read_text().split(f"\n## {title}\n")
    if len(parts) != 2:
        raise PluginError(f"insert: {file} has no section, or several, with the title {title!r}")
    return parts[1].split("\n## ")[0].strip()


def relinked(markdown: str, origin: str, uri: str, config: MkDocsConfig, files: Files) -> str:
    """Relative links of a repository file as links of the page `uri`; what is in code stays."""
    def link(match: re.Match) -> str:
        target = match["target"]
        if not target or "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        there = site_uri(posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)), config, files)
        if there is None:
            return match[0]
        return f"{match['head']}{posixpath.relpath(there, posixpath.dirname(uri) or '.')}{match['anchor'] or ''}{match['tail']}"
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(piece if k % 2 else LINK.sub(link, piece) for k, piece in enumerate(pieces))


def site_uri(path: str, config: MkDocsConfig, files: Files) -> str | None:
    """Where a file of the repository is in the site; one that is no page is copied to files/. None where there is no such file."""
    for uri, origin in MOVED.items():
        if path == origin:
            return uri
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if not (ROOT / path).is_file():
        return None
    if path.endswith(".md"):        # mkdocs would take the copy for a page, too late to make one of it
        raise PluginError(f"{path} is linked and no page of the site: give it a place in MOVED ({Path(__file__).name}) and in nav (mkdocs.yml)")
    uri = f"files/{path}"
    if uri not in files.src_uris:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return uri
