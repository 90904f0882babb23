"""What the build of the site adds to the pages.

Formulas become MathML, which a browser typesets without a script. The objectives' pictures are drawn from the losses.
The result files of experiments are copied from where they are committed.
"""

import dataclasses
import functools
import html
import pathlib
import re
import sys
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = (ROOT / "experiments/ablations/results", ROOT / "experiments/results", ROOT / "benchmarks/results")
PROGRAMS = {
    "grpo_jax.rewards.harness",
    "grpo_jax.rewards.worker",
    "grpo_jax.tasks.reasoning_gym_worker",
}  # of child processes
_MODULES = re.compile(r"^::: (grpo_jax[\w.]*)\.\*$", re.MULTILINE)
_SECTIONS = re.compile(r"{{ sections (\S+) }}")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_FUNCTION = re.compile(  # the name of one, which may be the base of an index, and what follows if it is an argument
    r"(<m(?:sub|sup|subsup|under)>)?<m[io]>([a-zA-Z]{2,})</m[io]>(?=(<m(?:i|n|sub|sup|subsup|frac|sqrt|under)[ >])?)"
)
_THIN_SPACE = '<mspace width="0.17em"/>'
_SHIM = "https://unpkg.com/iframe-worker/shim"  # what search needs on pages that are opened as files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pictures and figures of results, which are not committed under `docs/`."""
    for name, svg in _pictures():
        files.append(File.generated(config, f"objectives/pictures/{name}.svg", content=svg))
    for path in (path for folder in FIGURES for path in sorted(folder.glob("*.png"))):
        files.append(File.generated(config, f"results/figures/{path.name}", abs_src_path=str(path)))
    quickstart = ROOT / "experiments/quickstart.png"
    files.append(File.generated(config, "results/figures/quickstart.png", abs_src_path=str(quickstart)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Expands what pages hold in one line.

    `::: grpo_jax.losses.*` becomes a block for each public module of the package, and `{{ recipes }}` the table of
    published settings, `{{ sections FILE }}` everything from the first section of a committed page on.
    """
    markdown = _MODULES.sub(lambda match: "\n\n".join(f"::: {name}" for name in _modules_of(match[1])), markdown)
    markdown = _SECTIONS.sub(lambda match: "## " + (ROOT / match[1]).read_text().partition("\n## ")[2], markdown)
    return markdown.replace("{{ recipes }}", _recipes()) if "{{ recipes }}" in markdown else markdown


def on_page_content(content: str, **kwargs: Any) -> str:
    """Typesets what arithmatex has marked: `$inline$` and `$$display$$`."""
    return _FORMULA.sub(_typeset, content)


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Takes the one script that the theme loads from another server from this one."""
    here = "../" * page.url.count("/") + "javascripts/iframe-worker.js"
    return output.replace(_SHIM, here)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page of errors."""
    return output_content.replace(_SHIM, "javascripts/iframe-worker.js")


def _modules_of(package: str) -> list[str]:
    folder = ROOT.joinpath(*package.split("."))
    names = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return [f"{package}.{name}" for name in names if f"{package}.{name}" not in PROGRAMS]


def _recipes() -> str:
    """The table of published settings, from the recipes themselves."""
    from grpo_jax import recipes

    rows = ["| recipe | settings that its source states | source |", "|---|---|---|"]
    for make in recipes.ALL:
        recipe = make()
        stated = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        numbers = [f"`{name}={value:g}`" for name, value in stated.items() if type(value) in (int, float)]
        settings = ": ".join(filter(None, (recipe.objective.__name__, ", ".join(numbers))))
        rows.append(f"| `{make.__name__}()` | {settings} | {recipe.source} |")
    return "\n".join(rows)


@functools.cache
def _pictures() -> tuple[tuple[str, str], ...]:
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import pictures  # loads JAX

    return tuple(pictures.draw_all())


def _typeset(match: re.Match[str]) -> str:
    display = "inline" if match[2] == "(" else "block"
    latex = html.unescape(match[3]).strip()
    for bar, fence in ((r"\lvert", r"\left|"), (r"\rvert", r"\right|")):  # which have their sides
        latex = latex.replace(bar, fence)
    mathml = convert(latex, display=display)
    # Names of functions are identifiers, with a thin space before an argument that has no parenthesis.
    return _FUNCTION.sub(
        lambda found: f"{found[1] or ''}<mi>{found[2]}</mi>" + (_THIN_SPACE if found[3] and not found[1] else ""),
        mathml,
    )
