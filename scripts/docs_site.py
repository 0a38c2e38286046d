"""What mkdocs does beyond its settings in mkdocs.yml: links that leave docs/ become plain text.

The pages are read in the repository too, where such links lead to files. The site does not have these files.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<target>[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's text as it goes onto the site; mkdocs calls this for every page."""
    return without_links_outside(markdown, page.file.src_uri)


def without_links_outside(markdown: str, page: str) -> str:
    """Replace the links of a page that lead out of docs/ by their text and the path.

    Args:
        markdown: the page's text.
        page: its path inside docs/.
    """

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match["target"]))
        if target.startswith("docs/") or match["target"].startswith("/"):
            return match[0]
        return match["text"] if match["text"].strip("`") == target else f"{match['text']} (`{target}`)"

    return _LINK.sub(replaced, markdown)
