"""Take the README's picture: the first screen of a tour's page.

    python tools/picture.py [PAGE] [PICTURE] [--phone] [--dark]

PAGE is runs/tour/index.html (`make demo` makes it), PICTURE docs/images/tour.png. Needs Chromium; `CUTAWAY_CHROMIUM`
names it where it is not on the path.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit code 2 when the page or the browser is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "runs" / "tour" / "index.html")
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "docs" / "images" / "tour.png")
    parser.add_argument("--phone", action="store_true", help="390 pixels wide instead of 1,280")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    chromium = os.environ.get("CUTAWAY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or not arguments.page.is_file():
        missing = "Chromium is not installed" if chromium is None else f"{arguments.page} does not exist: make demo"
        print(missing, file=sys.stderr)
        return 2
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        width, height = (390, 844) if arguments.phone else (1280, 860)
        scheme = "dark" if arguments.dark else "light"
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(arguments.page.resolve().as_uri())
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.picture)
        browser.close()
    print(f"{arguments.picture} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
