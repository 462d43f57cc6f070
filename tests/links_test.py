"""The site is built, its links lead somewhere, and so do those of the README on other sites."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from one_backend import only_on

import keras_dcft

PROJECT = re.compile(
    r"https://(?:github\.com/keras-dcft/keras-dcft/blob|"
    r"raw\.githubusercontent\.com/keras-dcft/keras-dcft)/main/([^#]+)#?(.*)"
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = only_on("torch")


def targets(text) -> list:
    """Where the links and pictures of a Markdown text lead."""
    found = []
    for block in MarkdownIt().enable("table").parse(text):
        for token in block.children or []:
            found += [token.attrs[key] for key in ("href", "src") if key in token.attrs]
    return found


def anchors(path) -> set:
    """The anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_site_is_built_and_its_links_lead_to_pages_and_headings(tmp_path):
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "kernel_size" in (tmp_path / "api" / "adapting" / "index.html").read_text()


def test_the_pages_on_the_api_have_each_public_name_once():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    names = re.findall(r"^(?:::: keras_dcft\.|## (?=[A-Z_]+$))(\w+)$", pages, re.MULTILINE)
    assert sorted(names) == sorted(keras_dcft.__all__)


def test_the_readmes_links_are_whole_addresses():
    found = targets((ROOT / "README.md").read_text())
    assert len(found) > 20
    assert [target for target in found if not target.startswith("https://")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_addresses_in_the_project_are_of_its_files(page):
    for target in targets(page.read_text()):
        if re.match(r"https://(github\.com|raw\.githubusercontent\.com)/keras-dcft/", target):
            path, anchor = PROJECT.fullmatch(target).groups()
            assert (ROOT / path).is_file(), target
            assert not anchor or anchor in anchors(ROOT / path), target
