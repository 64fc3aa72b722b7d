"""Writes build/examples/index.html: the pictures and figures that the examples left there."""

import html
from pathlib import Path

FOLDER = Path("build/examples")


def section(folder):
    pictures = "\n".join(
        f'<figure><img src="{folder.name}/{picture.name}" width="700">'
        f"<figcaption>{html.escape(picture.stem.replace('_', ' '))}</figcaption></figure>"
        for picture in sorted(folder.glob("*.png"))
    )
    return f"<h2>{html.escape(folder.name)}</h2>\n{pictures}" if pictures else ""


def main():
    sections = [section(folder) for folder in sorted(FOLDER.iterdir()) if folder.is_dir()]
    page = FOLDER / "index.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><title>mixhead examples</title>\n'
        + "\n".join(filter(None, sections))
        + "\n",
        encoding="utf-8",
    )
    print(f"The pictures are on {page.resolve()}")


if __name__ == "__main__":
    main()
