"""The picture of a ranking page in the README: the trained demo judge ranks its own sample pictures.

mlxpref demo --output /tmp/demo
python -m scripts.ranking_picture /tmp/demo mlxpref/report/ranking-page.png
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import sync_playwright

import mlxpref
from mlxpref.cli.demo import SAMPLE_PROMPT
from mlxpref.data.find_images import find_images
from mlxpref.report.ranking_page import write_ranking_page

WIDTH, HEIGHT = 1000, 900
"""Pixels of the page that are shown."""


@click.command(help=__doc__)
@click.argument("demo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--browser", default="/usr/bin/chromium", show_default=True, help="The Chromium that shows the page.")
def main(demo: Path, output: Path, browser: str) -> None:
    judge = mlxpref.load("demo", demo / "adapter")
    ranking = judge.rank(find_images([demo / "pictures"]), SAMPLE_PROMPT, think_about="all", pairs="all")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "ranking.html"
        write_ranking_page(page, [replace(ranking, adapter=Path("demo/adapter"))])  # whoever looks has another folder
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = window.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        view.goto(page.as_uri())
        view.screenshot(path=output)
        window.close()
    with Image.open(output) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    main()
