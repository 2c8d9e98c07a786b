"""What a report page is made of, as Markdown and as one HTML file that needs no other: strings, tables, images."""

from __future__ import annotations

import base64
import html
import re
import string
from dataclasses import dataclass
from pathlib import Path

import common

PILLS = {"holds here": "holds", "does not hold here": "not", "not testable here": "untestable", "not run here": "pending"}


@dataclass
class Table:
    head: list[str]
    rows: list[list]
    cards: bool = False  # long texts: on a phone each row is a card

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

    def html(self) -> str:
        head = "".join(f'<th scope="col">{inline(name)}</th>' for name in self.head)
        labels = [f' data-label="{html.escape(name)}"' * self.cards for name in self.head]
        lines = ["".join(f"<td{label}>{inline(x)}</td>" for label, x in zip(labels, row, strict=True)) for row in self.rows]
        body = "".join(f"<tr>{line}</tr>\n" for line in lines)
        kind = ' class="cards"' * self.cards
        return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


@dataclass
class Image:
    name: str  # of its file, for Markdown
    alt: str
    light: bytes
    dark: bytes = b""  # the same for readers who prefer a dark page
    clip: bool = False  # a rollout

    def html(self) -> str:
        kind, words = self.name.rpartition(".")[2], html.escape(self.alt)
        light, dark = (f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for data in (self.light, self.dark))
        source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">' if self.dark else ""
        picture = f'<picture>{source}<img src="{light}" alt="{words}"></picture>'
        return f"<figure{' class=clip' * self.clip}>{picture}<figcaption>{words}</figcaption></figure>"


Block = str | Table | list[Image]  # a string is a paragraph, a heading with its #s, or a list with its dashes


def inline(text) -> str:
    """HTML of a cell or a paragraph: `code`, [links](to), *stress*, and a verdict as a pill."""
    text = html.escape(str(text))
    if text in PILLS:
        return f'<span class="pill {PILLS[text]}">{text}</span>'
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<!\S)\*(\w[^*]*)\*", r"<em>\1</em>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def as_markdown(blocks: list[Block]) -> str:
    """Rollouts are left out."""
    said = []
    for block in blocks:
        if isinstance(block, list):
            said += [f"![{image.alt}]({image.name})" for image in block if not image.clip]
        else:
            said.append(block.markdown() if isinstance(block, Table) else block)
    return "\n\n".join(said) + "\n"


def as_html(blocks: list[Block]) -> str:
    """The whole page; its first heading is followed by links to its chapters (##)."""
    chapters = [block.removeprefix("## ") for block in blocks if isinstance(block, str) and block.startswith("## ")]
    links = "".join(f'<a href="#{slug(words)}">{inline(words)}</a>' for words in chapters)
    said = []
    for block in blocks:
        if isinstance(block, Table):
            said.append(block.html())
        elif isinstance(block, list):
            clips = " clips" * any(image.clip for image in block)
            said.append(f'<div class="figures{clips}">{"".join(image.html() for image in block)}</div>')
        elif heading := re.fullmatch(r"(#+) (.*)", block):
            level, words = len(heading[1]), heading[2]
            name = f' id="{slug(words)}"' * (level == 2)
            said.append(f"<h{level}{name}>{inline(words)}</h{level}>" + f"<nav>{links}</nav>" * (level == 1))
        elif block.startswith("- "):
            said.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in block.splitlines()) + "</ul>")
        else:
            said.append(f"<p>{inline(block)}</p>")
    template = string.Template(Path(__file__).with_name("template.html").read_text())
    return template.substitute(title=html.escape(blocks[0].lstrip("# ")), body="\n".join(said))


def fill_in(text: str, tables: dict[str, Table]) -> str:
    """A Markdown text in which the table of each <!-- table:NAME --> ... <!-- /table --> is made anew.

    Raises:
        UserError: no table has this name, or the markers don't come in pairs.
    """
    start, end = r"<!-- table:(\S+) -->", "<!-- /table -->"
    names, markers = re.findall(start, text), re.findall(rf"{start}|({end})", text)
    if [bool(ends) for _, ends in markers] != [False, True] * len(names):
        raise common.UserError(f"every <!-- table:NAME --> needs its {end} before the next one begins")
    for name in names:
        if name not in tables:
            raise common.UserError(f"no table is called {name!r}; {common.did_you_mean(name, tables)}")
    renewed = lambda marker: f"<!-- table:{marker[1]} -->\n\n{tables[marker[1]].markdown()}\n\n{end}"  # noqa: E731
    return re.sub(rf"{start}.*?{end}", renewed, text, flags=re.DOTALL)


# ------------------------------------------------------------------------------------------- numbers in words
def points(difference: float, interval: tuple[float, float]) -> str:
    """A difference of rates with its interval, in percentage points."""
    return f"{100 * difference:+.1f} points ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def percent(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def p_value(p: float) -> str:
    return f"{p:.2f}" if p >= 0.0095 else f"{p:.1g}"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
