"""The page of a stream of texts: sample texts of each task with their tokens, in the order of learning."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clrun.reporting.charts import text
from clrun.reporting.markup import Cell, section, table
from clrun.system.files import replacing

LETTERS = 600  # of a text that are shown
TOKENS = 80  # of a text that are shown
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}th,td{border-top:1px solid #8886;padding:.35rem .6rem;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}td:nth-child(4){font-family:ui-monospace,monospace;font-size:.85em}"
)


@dataclass(frozen=True)
class TextSample:
    """A text and its tokens.

    Attributes:
        label: name of its class.
        text: as stored.
        tokens: the tokens that the network sees.
        missing: how many further tokens are cut off.
    """

    label: str
    text: str
    tokens: tuple[str, ...]
    missing: int


@dataclass(frozen=True)
class TextBand:
    """The samples of one task.

    Attributes:
        title: position, id and name of the task.
        lines: further text.
        samples: its texts.
    """

    title: str
    lines: tuple[str, ...]
    samples: tuple[TextSample, ...]


def write_samples(title: str, subtitle: str, bands: Sequence[TextBand], path: Path) -> None:
    """Write the page: one section per task with class, text, number of tokens and the tokens of each sample.

    Args:
        title: what the stream is.
        subtitle: how its texts become network input.
        bands: one per task, in the order of learning.
        path: HTML file to write.

    Raises:
        ConfigError: the file cannot be written.
    """
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'\">"
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><h1>{text(title)}</h1><p>{text(subtitle)}</p>"
        f"{''.join(map(_section, bands))}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def _section(band: TextBand) -> str:
    """Return the section of a task."""
    rows = [
        [Cell(sample.label), Cell(_shown(sample.text)), Cell(_count(sample)), Cell(_tokens(sample))]
        for sample in band.samples
    ]
    lines = "".join(f"<p>{text(line)}</p>" for line in band.lines)
    return section(band.title, lines + table(("class", "text", "tokens", "as the network reads it"), rows))


def _shown(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}... (+{len(text) - LETTERS} characters)"


def _count(sample: TextSample) -> str:
    return f"{len(sample.tokens)}" + (f" (+{sample.missing} cut off)" if sample.missing else "")


def _tokens(sample: TextSample) -> str:
    shown = " ".join(sample.tokens[:TOKENS])
    more = len(sample.tokens) - TOKENS
    return shown + (f" ...+{more}" if more > 0 else "") + (f" ...+{sample.missing}" if sample.missing else "")
