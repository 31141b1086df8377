"""The tables in README.md and results/FINDINGS.md, made anew of the runs, and their numbers checked.

    python -m studies.pages            # writes the tables anew and says which numbers are in none
    python -m studies.pages --check    # says alone what would change; status 1 where there is any
    python -m studies.pages --plot     # draws the figures of the pages anew, too (matplotlib)

A block of a page says of which table it is a part, and of which runs:

    ```text results/main edits method=rome|row pass=0 columns=arch|method|hop_2

edits_table of studies/edit_tables.py, of the runs in results/main: its rows in which the column
"method" has "rome" or "row" and "pass" has "0", and of these three columns. Blanks are written _,
and hop_2 is also the column "hop 2 (lowest)". `bare` leaves out the legend. In the same words a
comment of one line, <!-- results/main edits ... -->, names a table that a paragraph takes numbers
from without showing it.

A number of a page's text with a decimal point or a percent sign is to be in a table of its section,
rounded or not. What the papers say stands in quotes (> ...), settings in `code`: these are not
looked up, nor are whole numbers.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import minedit
from minedit import require
from studies import report
from studies.all import HERE
from studies.claims import Results, read_claims, summary_table
from studies.runs import Table, read_groups, table_of

PAGES = ("README.md", "results/FINDINGS.md")
BLOCK = re.compile(r"```text (results\S*.*)\n((?:(?!```).*\n)*)```\n")
COMMENT = re.compile(r"<!-- (results\S*.*?) -->")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:\s?%)?")


# --- A part of a table ----------------------------------------------------------------------------


@dataclass
class Part:
    """Of a table: what a block's first line asks for."""

    text: str  # the line itself, for messages
    folder: str
    table: str
    rows: dict[str, list[str]]  # {head: the words of which one is in the row}
    columns: list[str] | None
    bare: bool


def parse(text: str) -> Part:
    """UserError where it asks for no table."""
    folder, *words = text.split()
    require(words, f"{text}: names no table")
    name, *options = words
    part = Part(text, folder, name, {}, None, False)
    for option in options:
        head, equals, value = option.partition("=")
        if option == "bare":
            part.bare = True
        elif head == "columns":
            part.columns = value.split("|")
        else:
            require(equals, f"{text}: {option} is neither bare nor column=words")
            part.rows[head] = value.split("|")
    return part


def worded(cell) -> str:
    """What a cell is called in the first line of a block; without "(lowest)" and "(1 of 2)"."""
    text = re.sub(r" \((lowest|\d+ of \d+)\)$", "", str(cell))
    return text.replace(" ", "_")


def column_index(column: str, heads: list[str], text: str) -> int:
    """`text`: the first line of the block, for the message."""
    found = [i for i, head in enumerate(heads) if worded(head) == column]
    have = ", ".join(map(worded, heads))
    require(found, f"{text}: no column {column}; there are {have}")
    require(len(found) == 1, f"{text}: several columns {column}")
    return found[0]


def cut(whole: Table, part: Part) -> Table:
    """The rows and columns that are asked for; UserError where a word is in no row, or none is
    left."""
    text = part.text
    heads = [str(head) for head in whole.rows[0]]
    rows = whole.rows[1:]
    for column, words in part.rows.items():
        i = column_index(column, heads, text)
        there = {worded(row[i]) for row in rows}
        for word in words:
            require(word in there, f"{text}: no row with {column} {word or 'empty'}")
        rows = [row for row in rows if worded(row[i]) in words]
    kept = range(len(heads))
    if part.columns is not None:
        kept = [column_index(column, heads, text) for column in part.columns]
    cells = []
    for row in [tuple(heads), *rows]:
        cells.append(tuple(row[i] for i in kept))
    made = table_of(cells, whole.legend)
    require(made is not None, f"{text}: no row of the table is so")
    return made


class Tables:
    """Tables by name, of runs that are read once."""

    def __init__(self, root: Path):
        self.root, self.groups = root, {}
        self.makers = {make.__name__.removesuffix("_table"): make for make in report.TABLES}

    def whole(self, part: Part) -> Table:
        """The table of which it is a part; UserError where the runs have none."""
        folder, name = part.folder, part.table
        path = self.root / folder
        if name in report.FILES:
            found = report.FILES[name](path)
        elif name == "claims":
            found = summary_table(read_claims(path / "claims.tsv"), Results(path))
        else:
            require(
                name in self.makers, f"{part.text}: there is no {name}_table in studies/*_tables.py"
            )
            if folder not in self.groups:
                self.groups[folder] = read_groups([path])
            found = self.makers[name](self.groups[folder])
        require(found is not None, f"{part.text}: the runs have nothing for this table")
        return found

    def made(self, text: str) -> str:
        """The lines of a block, by its first line."""
        part = parse(text)
        made = cut(self.whole(part), part)
        return minedit.table(made.rows) if part.bare else str(made)

    def numbers(self, text: str) -> list[float]:
        """Those with a decimal point in the cells, below the heads, of what a text asks for."""
        part = parse(text)
        found = []
        for row in cut(self.whole(part), part).rows[1:]:
            for cell in row:
                found += [float(x) for x in re.findall(r"(?<!\d)-?\d+\.\d+", str(cell))]
        return found


# --- A page ---------------------------------------------------------------------------------------


def written_anew(page: str, tables: Tables) -> str:
    """The page with its blocks made anew. UserError where one is not of the form."""

    def block(found: re.Match) -> str:
        return f"```text {found[1]}\n{tables.made(found[1])}\n```\n"

    anew, n = BLOCK.subn(block, page)
    require(n == page.count("```text"), "a block ```text is not closed, or is not of results")
    require(len(COMMENT.findall(page)) == page.count("<!--"), "a comment <!-- names no results")
    return anew


def sections(page: str) -> dict[str, str]:
    """{heading: it and what stands below it}, down to the next one."""
    found, heading = {}, ""
    in_code = False
    for line in page.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        if line.startswith("#") and not in_code:
            heading = line
        found[heading] = found.get(heading, "") + line + "\n"
    return found


def prose_of(section: str) -> str:
    """Without tables, code, quotes, comments, and where links lead to."""
    text = re.sub(r"```.*?```", "", section, flags=re.S)
    text = re.sub(r"<!--.*?-->|`[^`\n]*`|\]\([^)]*\)|https?://\S+", "", text)
    text = re.sub(r"\d{4}\.\d{5}", "", text)  # numbers of arXiv
    return "\n".join(line for line in text.splitlines() if not line.startswith(">"))


def is_known(number: str, known: list[float]) -> bool:
    """Whether one of the known numbers, rounded to as many digits, is this one; of "97.6 %" the
    known number is the share, 0.976."""
    text = number.rstrip(" %").replace(",", "")
    digits = len(text.partition(".")[2])
    scale = 100 if number.endswith("%") else 1
    return any(abs(scale * x - float(text)) <= 0.5 * 10**-digits + 1e-9 for x in known)


def unknown_numbers(section: str, tables: Tables) -> list[str]:
    """The numbers of a section's text that are in none of its tables."""
    named = [found[1] for found in BLOCK.finditer(section)] + COMMENT.findall(section)
    known = []
    for text in named:
        known += tables.numbers(text)
    asked = [x for x in NUMBER.findall(prose_of(section)) if "." in x or x.endswith("%")]
    return [x for x in asked if not is_known(x, known)]


def unknown_of(page: str, tables: Tables) -> dict[str, list[str]]:
    """{heading: numbers in none of its tables}"""
    found = {heading: unknown_numbers(text, tables) for heading, text in sections(page).items()}
    return {heading: numbers for heading, numbers in found.items() if numbers}


# --- Command line ---------------------------------------------------------------------------------


def draw_figures():
    """Those that the pages show, into results/figures."""
    from studies import figures

    results = HERE / "results"
    for folder, makers in figures.SHOWN.items():
        figures.draw(read_groups([results / folder]), results / "figures", makers)


def command(args):
    require(not (args.plot and args.check), "--plot: not with --check, which writes nothing")
    if args.plot:
        draw_figures()
    tables, changed, unknown = Tables(HERE), [], []
    for name in PAGES:
        file = HERE / name
        page = file.read_text()
        anew = written_anew(page, tables)
        if anew != page:
            changed.append(name)
            print(f"{name}: tables {'would change' if args.check else 'written anew'}")
        if not args.check:
            minedit.write_atomically(file, anew.encode())
        for heading, numbers in unknown_of(anew, tables).items():
            unknown += numbers
            print(f"{name}, {heading or 'top'}: in no table: {', '.join(numbers)}")
    if unknown or (changed and args.check):
        raise minedit.UserError("the pages do not say what the runs say", status=1)


def main(argv: list[str] | None = None) -> int:
    parser = minedit.Parser("python -m studies.pages", allow_abbrev=False)
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--plot", action="store_true", help="the figures, too (matplotlib)")
    return minedit.guarded(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
