"""The code on the pages of the site runs."""

import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = ROOT / "docs/pages"
INCLUDED = re.compile(r"^( *)--8<--\n *(.+)\n *--8<--\n", re.M)
BLOCK = re.compile(r"^(?P<not_run><!-- not run: .+? -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.M | re.S)


def code_of(page):
    """All Python of a page, in order, with the files that it includes; blocks marked `not run` left out."""
    text = INCLUDED.sub(lambda m: textwrap.indent((ROOT / m[2]).read_text(), m[1]), page.read_text())
    return "\n".join(textwrap.dedent(m["code"]) for m in BLOCK.finditer(text) if not m["not_run"])


WITH_CODE = [
    path.relative_to(PAGES).as_posix()
    for path in sorted(PAGES.rglob("*.md"))
    if code_of(path) and path.name != "surrogates.md"  # whose lines are evaluated one by one in test_objectives.py
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(PAGES / name), name, "exec"), {"__name__": "page"})


def test_pages_of_how_to_have_code():
    how_to = {path.relative_to(PAGES).as_posix() for path in PAGES.glob("how-to/*.md") if path.name != "index.md"}
    assert how_to <= set(WITH_CODE)
