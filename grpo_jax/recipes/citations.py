"""BibTeX entries of the works."""


def arxiv(key: str, eprint: str, year: int, title: str, authors: str) -> str:
    return entry(
        "misc",
        key,
        title=f"{{{title}}}",
        author=authors,
        year=year,
        eprint=eprint,
        archivePrefix="arXiv",
        url=f"https://arxiv.org/abs/{eprint}",
    )


def entry(kind: str, key: str, **fields: object) -> str:
    lines = (f"  {name:<13} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{key},\n{''.join(lines)}}}\n"


R1 = entry(
    "article",
    "guo2025deepseekr1",
    title="{DeepSeek-R1 incentivizes reasoning in LLMs through reinforcement learning}",
    author="Guo, Daya and others",
    year=2025,
    journal="Nature",
    volume=645,
    pages="633--638",
    doi="10.1038/s41586-025-09422-z",
    eprint="2501.12948",
    archivePrefix="arXiv",
)
