"""The pages of a run and of an evaluation in Chromium, with names that attack them."""

import pytest

from eit.report.run import write_report
from tests.helpers.browser import contrasts, focused_by_tab, luminance, opened, rgba, start_chromium
from tests.helpers.commands import run_eit

pytestmark = pytest.mark.project
LOOKS = [(360, "dark"), (1200, "light"), (360, "light"), (1200, "dark")]


@pytest.fixture(scope="module")
def browser():
    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def files(home, tmp_path_factory):
    """The page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    done = run_eit("eval", "runs/tiny", "--mistakes", folder / "mistakes.html", cwd=home)
    assert done.returncode == 0, done.stderr
    return dict(run=write_report(home / "runs" / "tiny", folder / "run.html").page, mistakes=folder / "mistakes.html")


@pytest.mark.parametrize("kind", ["run", "mistakes"])
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_it_can_be_read(browser, files, kind, width, scheme):
    with opened(browser, files[kind], scheme, width) as page:
        for folded in page.locator("summary").all():
            folded.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        found = contrasts(page)
        assert len(found) > 50 and found[0][0] >= 4.5, found[:3]
        pictures = page.locator("figure svg, .mistakes img")
        assert pictures.count() > 4
        for picture in pictures.all():
            box = picture.bounding_box()
            assert picture.is_visible() and box["width"] > 50 and box["x"] + box["width"] <= width
        paper = rgba(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (luminance(paper) > 0.5) == (scheme == "light")


@pytest.mark.parametrize("kind", ["run", "mistakes"])
def test_it_works_by_keyboard(browser, files, kind):
    with opened(browser, files[kind], width=360) as page:
        reached = focused_by_tab(page)
        assert all(is_visible for *_, is_visible in reached)
        names = {name for _, name, _ in reached}
        assert {"Confusion matrix", "Most frequent confusions", "Weakest classes", "Numbers"} <= names
        folded = page.locator("summary")
        assert folded.count() == sum(tag == "SUMMARY" for tag, *_ in reached)
        for one in folded.all():
            one.focus()
            page.keyboard.press("Enter")
            assert one.evaluate("e => e.parentElement.open")
        if kind == "run":
            page.locator("nav a", has_text="Calibration").focus()
            page.keyboard.press("Enter")
            assert page.url.endswith("#calibration")


def test_every_figure_has_a_text_and_every_table_a_head(browser, files):
    with opened(browser, files["run"]) as page:
        for drawing in page.locator("svg[role=img]").all():
            assert drawing.locator("title").first.text_content() and drawing.locator("desc").first.text_content()
        assert all(image.get_attribute("alt") for image in page.locator("img").all())
        for table in page.locator("table").all():
            assert table.locator("thead th[scope=col]").count() and table.locator("tbody th[scope=row]").count()


def test_it_prints_whole_and_on_white(browser, files, tmp_path):
    with opened(browser, files["run"], "dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()
        assert page.pdf(path=tmp_path / "page.pdf", format="A4").startswith(b"%PDF")
