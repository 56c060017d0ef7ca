"""What `mkdocs build` does beyond its configuration: CONTRIBUTING.md is a page, links to the README lead home, and the
build fails when a page of the site would fetch anything from another host."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
FETCHES = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'> ]+"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=[\"']?(?:https?:)?//[^\"'> ]+"
    r"|url\([\"']?(?:https?:)?//[^)]+"
    r"|@import[^;]*//[^;]+"
)


def on_files(files, config):
    """Add CONTRIBUTING.md, whose links begin at the root of the repository."""
    text = (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files outside of docs/ lead to the page that has their content."""
    markdown = re.sub(r"\]\(\.\./README\.md(#[\w-]+)?\)", "](index.md)", markdown)
    return markdown.replace("](../CONTRIBUTING.md)", "](contributing.md)")


def on_post_build(config):
    """Refuse a site that needs the network."""
    site = Path(config["site_dir"])
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        found = FETCHES.search(path.read_text())
        if found:
            raise PluginError(f"{path.relative_to(site)} would fetch from another host: {found[0][:120]}")
