"""How are the tables of the demo model written down? As plain text that anybody can edit."""

from pathlib import Path

Topic = tuple[list[str], str]  # phrasings of one question, and its one answer

FOLDER = Path(__file__).parent / "text"


def topics(name: str) -> list[Topic]:
    """Blocks parted by an empty line: phrasings between bars, then the lines of the answer, each after "= "."""
    found = []
    for block in _blocks(name):
        lines = block.splitlines()
        asked = [phrasing for line in lines if not line.startswith("= ") for phrasing in line.split(" | ")]
        found.append((asked, "\n".join(line[2:] for line in lines if line.startswith("= "))))
    return found


def lists(name: str) -> dict[str, list[str]]:
    r"""Sections under a [title]; bars or line ends part the items, and \n stands for a line end in an item."""
    found: dict[str, list[str]] = {}
    for block in _blocks(name):
        title, *lines = block.splitlines()
        found[title.strip("[]")] = [item.replace("\\n", "\n") for line in lines for item in line.split(" | ")]
    return found


def rewordings(name: str) -> list[tuple[str, list[str]]]:
    """Lines of "words = other words | other words"; where more words must follow, both sides end in dots."""
    pairs = (line.split(" = ") for block in _blocks(name) for line in block.splitlines())
    return [
        (words.removesuffix("..."), [other.removesuffix("...") for other in others.split(" | ")])
        for words, others in pairs
    ]


def _blocks(name: str) -> list[str]:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
