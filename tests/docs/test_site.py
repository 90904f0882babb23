"""The built site: no link without its target. `mkdocs build --strict -f docs/mkdocs.yml` comes first."""

import html.parser
import json
import pathlib
import re
import urllib.parse
import xml.etree.ElementTree

import pytest

SITE = pathlib.Path(__file__).parent.parent.parent / "docs/site"
pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the site is not built: mkdocs build -f docs/mkdocs.yml")


class Page(html.parser.HTMLParser):
    """The links and the anchors of a page, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "link"):
            self.loaded += [values[name] for name in ("src", "href") if name in values]


@pytest.fixture(scope="module")
def pages():
    return {path: Page(path) for path in SITE.rglob("*.html") if path.name != "404.html"}


def test_every_link_within_the_site_has_its_target(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            url = urllib.parse.urlparse(link)
            if url.scheme or url.netloc or url.path.startswith("/"):
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(url.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken


def test_no_page_loads_anything_from_another_server(pages):
    assert not [link for page in pages.values() for link in page.loaded if "//" in link]


def test_the_search_knows_each_page(pages):
    found = json.loads((SITE / "search/search_index.json").read_text())["docs"]
    assert {path.relative_to(SITE).as_posix() for path in pages} == {
        "index.html" if not (page := entry["location"].partition("#")[0]) else page for entry in found
    }
    assert "objectives/surrogates.html" in {
        entry["location"].partition("#")[0] for entry in found if "geometric mean" in entry["text"]
    }


def test_formulas_are_typeset(pages):
    text = (SITE / "objectives/surrogates.html").read_text()
    assert text.count("<math") > 20
    assert "arithmatex" not in text


CHILDREN = {"msub": 2, "msup": 2, "munder": 2, "mfrac": 2, "msubsup": 3, "munderover": 3}


def test_formulas_have_the_parts_that_a_browser_expects(pages):
    """It draws an index with a third part as a row of three."""
    for path in pages:
        for formula in re.findall(r"<math.*?</math>", path.read_text(), re.DOTALL):
            for element in xml.etree.ElementTree.fromstring(formula).iter():
                name = element.tag.partition("}")[2]
                assert len(element) == CHILDREN.get(name, len(element)), f"{path.name}: {formula}"
