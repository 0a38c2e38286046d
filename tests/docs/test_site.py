"""The documentation builds as a site, strictly: every link leads somewhere, every page is in the navigation."""

import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded(script: str) -> object:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_site = loaded("docs_site")
generator = loaded("generate_reference")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    directory = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return directory


def test_every_page_is_built(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")} == pages


def test_every_documented_name_has_its_entry(site: Path) -> None:
    entries = set(re.findall(r'id="(bridge\.[\w.]+)"', (site / "reference" / "api.html").read_text()))
    for package in generator.PACKAGES:
        module = importlib.import_module(package)
        public = {name: getattr(module, name) for name in module.__all__ if not name.startswith("_")}
        names = {name for name, value in public.items() if generator.is_documented(value)}
        assert {name for name in names if f"{package}.{name}" not in entries} == set()


def test_every_error_is_listed_with_its_messages(site: Path) -> None:
    text = html.unescape((site / "reference" / "messages.html").read_text())
    files = (ROOT / "bridge").rglob("errors.py")
    names = {name for path in files for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)}
    assert names == set(re.findall(r"<h2 id=\"\w+\">(\w+)", text))
    for message in (
        "checkpoint.ckpt_step: ... is not in ... (... does not exist; ...)",
        "checkpoint.async_save: ... has nothing to save without checkpoint.save; "
        "set checkpoint.save to a directory, or async_save to false",
    ):
        assert f"<code>{message}</code>" in text


def test_every_package_with_a_list_of_names_is_in_the_reference() -> None:
    packages = [path.parent for path in (ROOT / "bridge").rglob("__init__.py") if "__all__ = " in path.read_text()]
    assert {".".join(path.relative_to(ROOT).parts) for path in packages} == set(generator.PACKAGES)


def test_the_list_of_names_is_up_to_date() -> None:
    assert generator.API.read_text() == generator.api_page(), "run scripts/generate_reference.py"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = (
        r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+(https?:[^"]+)'
    )
    for page in site.rglob("*.html"):
        assert re.findall(fetched, page.read_text()) == [], page


@pytest.mark.parametrize(
    ("page", "given", "shown"),
    [
        ("index.md", "the [README](../README.md) says", "the README (`README.md`) says"),
        ("reference/x.md", "[Class](../../bridge/a.py#L1)", "Class (`bridge/a.py`)"),
        ("a.md", "[bridge/training](../bridge/training)", "bridge/training"),
        ("a.md", "[other](b.md#part), [this](#part)", "[other](b.md#part), [this](#part)"),
        ("reference/x.md", "[up](../a.md)", "[up](../a.md)"),
        ("a.md", "[web](https://example.com/../x)", "[web](https://example.com/../x)"),
    ],
)
def test_links_that_leave_the_pages_become_text(page: str, given: str, shown: str) -> None:
    assert docs_site.without_links_outside(given, page) == shown
