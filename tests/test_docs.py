"""Builds the documentation, and runs the Python of its pages; tests/test_readme.py runs its commands.

The build, which is strict, checks every link and anchor that it knows; what it made is followed here. The blocks of a
page run in their order, as one program.
"""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from unetgn.training.config_files import known_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TRAINED = "runs/digits8_ddpm"  # blocks with it run in tests/test_readme.py, which has trained that


def blocks(text: str) -> list[str]:
    """Find the blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class Anchors(HTMLParser):
    """Collects what a link can lead to on a page, and what it asks other machines for."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.asked: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        address = values.get("src") or (values.get("href") if tag == "link" else "") or ""
        self.links += [link for name in ("src", "href") if (link := values.get(name))]
        if address.startswith(("http:", "https:", "//")) and values.get("rel") != "canonical":
            self.asked.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` builds them: a warning is an error."""
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return out


@pytest.mark.thorough
def test_every_exported_name_is_in_the_reference_with_its_docstring(site: Path) -> None:
    for module in ("unetgn", "unetgn.pipelines", "unetgn.interop", "unetgn.fusion"):
        page = site / "reference" / f"{module.rpartition('.')[2]}.html"
        names = import_module(module).__all__
        assert {f"{module}.{name}" for name in names} <= Anchors(page).ids
        text = " ".join(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")).split())
        texts = [getattr(import_module(module), name).__doc__ or "" for name in names if name != "FAMILIES"]
        said = [text.replace("`", "").split()[:3] for text in texts]
        assert [words for words in said if " ".join(words) not in text] == []


@pytest.mark.thorough
def test_a_signature_stands_at_every_function_and_class_with_its_arguments(site: Path) -> None:
    page = (site / "reference" / "unetgn.html").read_text(encoding="utf-8")
    for name in import_module("unetgn").__all__:
        value = getattr(import_module("unetgn"), name)
        if inspect.isclass(value) or inspect.isfunction(value):
            entry = page.partition(f'id="unetgn.{name}"')[2].partition('id="unetgn.')[0]
            shown = re.sub(r"<[^>]+>", "", entry)
            assert [argument for argument in inspect.signature(value).parameters if argument not in shown] == [], name


@pytest.mark.thorough
def test_every_key_of_a_run_is_listed(site: Path) -> None:
    text = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert "\\|" not in text  # of types, such as int | null
    listed = set(re.findall(r"<tr>\s*<td><code>([\w.]+)</code></td>", text))
    assert {name for name, key in known_keys().items() if not key.group} == listed


@pytest.mark.thorough
def test_no_page_asks_another_machine_for_anything(site: Path) -> None:
    assert [address for page in site.rglob("*.html") for address in Anchors(page).asked] == []


@pytest.mark.thorough
def test_every_link_and_image_of_a_page_leads_to_a_file_of_the_site(site: Path) -> None:
    pages = {page: Anchors(page) for page in site.rglob("*.html")}
    for page, read in pages.items():
        links = [link.partition("#") for link in read.links if not re.match(r"\w+:|/", link)]
        within = [(page.parent / path if path else page, anchor) for path, _, anchor in links]
        assert [path for path, _ in within if not path.is_file()] == [], page
        assert [anchor for path, anchor in within if anchor and anchor not in pages[path.resolve()].ids] == [], page


@pytest.mark.thorough
def test_the_pictures_of_the_written_pages_are_in_the_site(site: Path) -> None:
    for page in PAGES:
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        links = Anchors(site / page.relative_to(ROOT / "docs").with_suffix(".html")).links
        assert {Path(name).name for name in shown} <= {Path(link).name for link in links}


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert all(page.relative_to(ROOT / "docs").as_posix() in yaml.safe_dump(menu) for page in PAGES)


WITH_PYTHON = [page for page in [ROOT / "README.md", *PAGES] if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(page.read_text(encoding="utf-8")):
        if TRAINED not in code:
            exec(compile(code, str(page), "exec"), found)
