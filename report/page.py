"""The report as an HTML page, from Markdown; and marked tables in other Markdown files."""

import base64
import re
import string
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

from runtime import did_you_mean, disk, refuse

PILLS = {  # verdict -> its CSS class
    "supported": "holds",
    "contradicted": "not",
    "inconclusive": "pending",
    "not judged": "untestable",
    "by construction": "untestable",
    "not run": "untestable",
}
LARGEST = 400_000  # bytes of another stage's picture that a page may contain


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def figure(image: re.Match, folder: Path, alone: bool) -> str:
    """An image with its caption. It contains the picture if the report drew it or the page stands alone, else
    links to it.
    """
    source, words = image.groups()
    path, own = folder / unquote(source), "/" not in source
    if own or (alone and path.stat().st_size <= LARGEST):
        source = f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    kind = "drawn" if own else path.suffix[1:]
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    )


def as_html(text: str, folder: Path, alone: bool) -> str:
    """The page of a Markdown text; its first heading is followed by links to its chapters (##).

    folder: where the page will lie.  alone: it must show small pictures without the files beside it.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'<img src="(.*?)" alt="(.*?)" />', lambda image: figure(image, folder, alone), body)
    body = re.sub(r"<p>(<figure.*?)</p>", r'<div class="figures">\1</div>', body, flags=re.DOTALL)
    for verdict, kind in PILLS.items():
        body = body.replace(f"<td>{verdict}</td>", f'<td><span class="pill {kind}">{verdict}</span></td>')
    body = re.sub(r"<h2>(.*?)</h2>", lambda h2: f'<h2 id="{slug(h2[1])}">{h2[1]}</h2>', body)
    links = [f'<a href="#{name}">{words}</a>' for name, words in re.findall(r'<h2 id="(.*?)">(.*?)<', body)]
    title = re.search(r"<h1>(.*?)</h1>", body)[1]
    body = body.replace("</h1>", f"</h1>\n<nav>{''.join(links)}</nav>", 1)
    template = string.Template(disk.read_text(Path(__file__).with_name("template.html")))
    return template.substitute(title=title, body=body)


def fill_in(text: str, tables: dict[str, str], where: Path) -> str:
    """The Markdown text of `where` with the table of each <!-- table:NAME --> ... <!-- /table --> made anew.

    Raises:
        UserError: no table has this name, or the markers don't come in pairs.
    """
    start, end = r"<!-- table:(\S+) -->", "<!-- /table -->"

    def renewed(marker: re.Match) -> str:
        refuse(
            marker[1] not in tables,
            f"{where}: no table is called {marker[1]!r}; {did_you_mean(marker[1], tables)}",
        )
        return f"<!-- table:{marker[1]} -->\n\n{tables[marker[1]]}\n\n{end}"

    filled, n = re.subn(rf"{start}((?!<!-- table:).)*?{end}", renewed, text, flags=re.DOTALL)
    refuse(
        not n == len(re.findall(start, text)) == text.count(end),
        f"{where}: every <!-- table:NAME --> needs its {end} before the next one begins",
    )
    return filled
