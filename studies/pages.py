"""The tables in README.md and results/FINDINGS.md, made anew of the runs, and their numbers checked.

    python -m studies.pages            # writes the tables anew and says which numbers are in none
    python -m studies.pages --check    # says alone what would change; status 1 where there is any
    python -m studies.pages --plot     # draws the figures of the pages anew, too (matplotlib)

A block of a page says of which table it is a part, and of which runs:

    ```text results/main edits method=rome|row pass=0 columns=arch|method|hop_2

the function edits_table of studies/report.py, of the runs in results/main, those of its rows that
have one of these words in a column, and those of its columns (blanks are written _, and hop_2 is
"hop 2 (lowest)", too). `bare` leaves out the legend. In the same words a comment, <!-- results/main
edits ... -->, names a table that a paragraph takes numbers from without showing it.

Every number of a page's prose with a decimal point or a percent sign is to be in a table of its
section, rounded or not. What the papers say stands in quotes (> ...), settings in `code`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import minedit
from minedit import require
from studies import report
from studies.claims import read_claims, summary_table
from studies.runs import Table, read_groups, table_of

HERE = Path(__file__).parent.parent
PAGES = ("README.md", "results/FINDINGS.md")
BLOCK = re.compile(r"```text (results\S*.*)\n((?:(?!```).*\n)*)```\n")
COMMENT = re.compile(r"<!-- (results\S*.*?) -->")
NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:\.\d+)?(?: ?%)?(?![\w%])(?!\.\d)")


# --- A part of a table ----------------------------------------------------------------------------


@dataclass
class Part:
    """Of a table: what a block's first line asks for."""

    folder: str
    table: str
    rows: dict[str, list[str]]  # {head: the words of which one is in the row}
    columns: list[str] | None
    bare: bool


def parse(text: str) -> Part:
    """UserError where it asks for no table."""
    folder, *words = text.split()
    require(words, f"{text}: names no table of studies/report.py")
    name, *options = words
    part = Part(folder, name, {}, None, False)
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
    """What a cell is called in the first line of a block."""
    return str(cell).removesuffix(" (lowest)").replace(" ", "_")


def number_of(column: str, heads: list[str], text: str) -> int:
    """Which of the heads a name means."""
    for i, head in enumerate(heads):
        if column == worded(head):
            return i
    raise minedit.UserError(
        f"{text}: no column {column}; there are {', '.join(map(worded, heads))}"
    )


def cut(whole: Table, part: Part, text: str) -> Table:
    """The rows and columns that are asked for; UserError where no row is left."""
    heads = [str(head) for head in whole.rows[0]]
    rows = whole.rows[1:]
    for column, words in part.rows.items():
        i = number_of(column, heads, text)
        rows = [row for row in rows if worded(row[i]) in words]
    kept = range(len(heads))
    if part.columns is not None:
        kept = [number_of(column, heads, text) for column in part.columns]
    cells = [tuple(row[i] for i in kept) for row in [tuple(heads), *rows]]
    made = table_of(cells, whole.legend)
    require(made is not None, f"{text}: no row of the table is so")
    return made


class Tables:
    """Tables by name, of runs that are read once."""

    def __init__(self, root: Path):
        self.root, self.groups = root, {}

    def whole(self, folder: str, name: str, text: str) -> Table:
        path = self.root / folder
        if name in report.FILES:
            found = report.FILES[name](path)
        else:
            if folder not in self.groups:
                self.groups[folder] = read_groups([path])
            if name == "claims":
                claims = read_claims(HERE / "results" / "claims.tsv")
                found = summary_table(claims, self.groups[folder])
            else:
                make = getattr(report, f"{name}_table", None)
                require(make is not None, f"{text}: studies/report.py has no {name}_table")
                found = make(self.groups[folder])
        require(found is not None, f"{text}: the runs have nothing for this table")
        return found

    def made(self, text: str) -> str:
        """The lines of the part that a text asks for."""
        part = parse(text)
        made = cut(self.whole(part.folder, part.table, text), part, text)
        return minedit.table(made.rows) if part.bare else str(made)


# --- A page ---------------------------------------------------------------------------------------


def written_anew(page: str, tables: Tables) -> str:
    """The page with its blocks made anew."""

    def block(found: re.Match) -> str:
        return f"```text {found[1]}\n{tables.made(found[1])}\n```\n"

    return BLOCK.sub(block, page)


def sections(page: str) -> dict[str, str]:
    """{heading: what stands below it}, down to the next one."""
    found, heading = {}, ""
    in_code = False
    for line in page.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code:
            heading = line
        found[heading] = found.get(heading, "") + line + "\n"
    return found


def prose_of(section: str) -> str:
    """Without tables, code, quotes, links, comments and what is no text."""
    text = re.sub(r"```.*?```", "", section, flags=re.S)
    text = re.sub(r"<!--.*?-->|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|https?://\S+", "", text, flags=re.S)
    text = re.sub(r"\d{4}\.\d{5}", "", text)  # of arXiv
    lines = [line for line in text.splitlines() if not line.startswith(("#", ">", "    "))]
    return "\n".join(lines)


def is_known(number: str, known: list[float]) -> bool:
    """Whether one of the known numbers is this one, rounded to as many digits."""
    text = number.rstrip(" %")
    digits = len(text.partition(".")[2])
    scale = 100 if number.endswith("%") else 1
    value = float(text)
    for x in known:
        candidates = (x, 100 * x) if scale == 100 else (x,)
        if any(abs(c - value) <= 0.5 * 10**-digits + 1e-9 for c in candidates):
            return True
    return False


def unknown_numbers(section: str, tables: Tables) -> list[str]:
    """The numbers of a section's prose that are in none of its tables."""
    shown = [tables.made(found[1]) for found in BLOCK.finditer(section)]
    shown += [tables.made(text) for text in COMMENT.findall(section)]
    known = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", "\n".join(shown))]
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
    for folder, makers in figures.PAGES.items():
        figures.draw(read_groups([results / folder]), results / "figures", makers)


def command(args):
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
