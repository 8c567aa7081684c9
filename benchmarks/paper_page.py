"""The pictures and the table of docs/paper_figures.md, from the stored runs of the paper's experiments.

    dvi paper run --main
    python benchmarks/paper_page.py                 # or: --folder runs/paper/small

The script draws every figure of the page anew, and replaces the table between its markers.
"""

import argparse
import io
import re
import subprocess
from pathlib import Path

from PIL import Image

import dvi
from dvi.paper.drawing import drawers
from dvi.paper.report import markdown
from dvi.paper.stored import folder_of, is_of, missing, runs_of
from dvi.paper.table import table
from dvi.storage.files import StoreError
from dvi.sweeps.records import records

PAGE = Path(__file__).resolve().parents[1] / "docs" / "paper_figures.md"
SHOWN = re.compile(r"\((figures/paper-(\d+)\.png)\)")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"


def save(figure, path):
    """A PNG of 200 colours, which is enough for lines and less than half the size."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    Image.open(data).convert("RGB").quantize(200).save(path, optimize=True)
    return path.stat().st_size


def counted(rows, found, code):
    """Sentences on the total time of the runs, the code that made them, and missing runs."""
    seconds = {row.name: record.cpu_seconds for row, record in zip(rows, found, strict=True) if record.complete}
    main = {row.name: row for figure in range(2, 12) for row in table().of_figure(figure) if not row.why_not("small")}
    took = sum(seconds.get(name, 0.0) for name in main) / 60
    absent = [name for name in main if name not in seconds]
    yield (
        f"`make paper` makes the {len(main)} runs of Figures 2 to 11. "
        + (f"Without {', '.join(absent)}, which are not made yet, they" if absent else "They")
        + f" took {took:.0f} CPU minutes together: one thread each, on two cores that other work shared, in float64. "
        f"All runs are of version {dvi.__version__}, {code}."
    )
    can = [row for row in table().experiments.values() if not row.why_not("small")]
    yield ""
    left = [row.name for row in can if row.name not in seconds]
    yield f"Of the {len(table().experiments)} experiments {len(seconds)} have been run at this size. " + (
        f"Not run yet: {', '.join(left)}." if left else ""
    )
    cannot = [row for row in table().experiments.values() if row.why_not("small")]
    for why in dict.fromkeys(row.why_not("small") for row in cannot):
        names = ", ".join(row.name for row in cannot if row.why_not("small") == why)
        yield f"\nNot possible at this size ({why}): {names}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are (default: runs/paper/small)")
    parser.add_argument("--code", help="with which code the runs were made (default: that of the last commit)")
    given = parser.parse_args()
    head = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    code = given.code or f"commit {subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()}"
    folder = given.folder
    text = PAGE.read_text(encoding="utf-8")
    for file, number in SHOWN.findall(text):
        try:
            runs = runs_of(number, folder=folder)
        except StoreError as error:
            print(f"figure {number} stays as it is: {error}")
            continue
        path = PAGE.parent / file
        path.parent.mkdir(exist_ok=True)
        size = save(drawers()[number](runs), path)
        absent = missing(number, folder=folder)
        print(f"{path.name}: {size / 1024:.0f} kB, of {', '.join(runs)}" + (f"; missing {len(absent)}" * bool(absent)))
    rows = [row for row in table().experiments.values() if not row.why_not("small")]
    pairs = zip(rows, records(folder_of("small", folder), [row.name for row in rows]), strict=True)
    known = [(row, record) for row, record in pairs if is_of(row, "small", record)]
    rows, found = ([pair[i] for pair in known] for i in (0, 1))
    lines = "\n".join([*markdown(rows, "small", found), "", *counted(rows, found, code)])
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + lines + "\n\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
