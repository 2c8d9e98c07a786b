"""The report as an HTML page, from its blocks of Markdown; and marked tables in other Markdown files."""

import base64
import html
import re
import string
from pathlib import Path
from urllib.parse import unquote

from runtime.errors import UserError, did_you_mean

PILLS = {  # verdict -> its CSS class
    "holds here": "holds",
    "does not hold here": "not",
    "not testable here": "untestable",
    "not run here": "pending",
}
LARGEST = 400_000  # bytes of another stage's picture that a page may contain


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def inline(text: str) -> str:
    """HTML of a cell or a paragraph: `code`, [links](to), *stress*, and a verdict as a pill."""
    text = html.escape(text)
    if text in PILLS:
        return f'<span class="pill {PILLS[text]}">{text}</span>'
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<!\S)\*(\w[^*]*)\*", r"<em>\1</em>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def table_html(block: str) -> str:
    """A table with verdicts holds long texts: on a phone each of its lines becomes a card."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
    head, _, *body = [[inline(cell.strip().replace("\\|", "|")) for cell in line] for line in lines]
    kind, label = (' class="cards"', ' data-label="{}"') if "verdict" in head else ("", "")
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    cells = [
        [f"<td{label.format(*pair)}>{pair[1]}</td>" for pair in zip(head, line, strict=True)] for line in body
    ]
    rows = "\n".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    table = f"<thead><tr>{names}</tr></thead>\n<tbody>{rows}</tbody>"
    return f'<div class="scroll"><table{kind}>{table}</table></div>'


def figure_html(line: str, folder: Path, alone: bool) -> str:
    """A figure. It contains its picture if the report drew it or the page stands alone, else links to it."""
    words, source = re.fullmatch(r"!\[(.*)\]\((.*)\)", line).groups()
    path, own = folder / unquote(source), "/" not in source
    if own or (alone and path.stat().st_size <= LARGEST):
        source = f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    words, kind = html.escape(words), "drawn" if own else path.suffix[1:]
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    )


def as_html(blocks: list[str], folder: Path, alone: bool) -> str:
    """The page; its first heading is followed by links to its chapters (##).

    A block is a paragraph, a heading, a table, a list, or lines of images.
    folder: where the page will lie.  alone: it must show small pictures without the files beside it.
    """
    chapters = [block[3:] for block in blocks if block.startswith("## ")]
    links = "".join(f'<a href="#{slug(words)}">{inline(words)}</a>' for words in chapters)
    parts = []
    for block in blocks:
        if block.startswith("|"):
            parts.append(table_html(block))
        elif block.startswith("!"):
            figures = [figure_html(line, folder, alone) for line in block.splitlines()]
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
        elif block.startswith("- "):
            items = [f"<li>{inline(line[2:])}</li>" for line in block.splitlines()]
            parts.append(f"<ul>{''.join(items)}</ul>")
        elif block.startswith("#"):
            marks, words = block.split(" ", 1)
            name = f' id="{slug(words)}"' if marks == "##" else ""
            parts.append(f"<h{len(marks)}{name}>{inline(words)}</h{len(marks)}>")
        else:
            parts.append(f"<p>{inline(block)}</p>")
    parts.insert(1, f"<nav>{links}</nav>")
    template = Path(__file__).with_name("template.html").read_text()
    return string.Template(template).substitute(
        title=html.escape(blocks[0].lstrip("# ")), body="\n".join(parts)
    )


def fill_in(text: str, tables: dict[str, str]) -> str:
    """A Markdown text with the table of each <!-- table:NAME --> ... <!-- /table --> made anew.

    Raises:
        UserError: no table has this name, or the markers don't come in pairs.
    """
    start, end = r"<!-- table:(\S+) -->", "<!-- /table -->"

    def renewed(marker: re.Match) -> str:
        if marker[1] not in tables:
            raise UserError(f"no table is called {marker[1]!r}; {did_you_mean(marker[1], tables)}")
        return f"<!-- table:{marker[1]} -->\n\n{tables[marker[1]]}\n\n{end}"

    filled, n = re.subn(rf"{start}((?!<!-- table:).)*?{end}", renewed, text, flags=re.DOTALL)
    if not n == len(re.findall(start, text)) == text.count(end):
        raise UserError(f"every <!-- table:NAME --> needs its {end} before the next one begins")
    return filled
