"""The page of wsft.report in a real browser: its numbers, linked panels, and no requests."""

import itertools

import pytest
from made_runs import write_run

from wsft.report.page import write_page
from wsft.report.runs import read_runs

pytestmark = pytest.mark.browser

TITLES = [
    *("loss", "score", "mean logp of tokens", "ratio to the sampler", "share of ratios clipped", "KL", "entropy"),
    *("gradient norm", "learning rate", "tokens per second", "shares lost", "peak memory"),
]
STRIP = len(TITLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, steps, seed=steps) for name, steps in (("long", 10_000), ("middle", 600), ("short", 20))]
    for run in runs:
        write_page(read_runs([run]), folder / f"{run.name}.html")
    write_page(read_runs(runs), folder / "several.html")
    return folder


@pytest.fixture
def shown(folder, opened):
    """`shown(name, **context)` is that page when all is painted and its numbers are there."""

    def show(name, **context):
        page = opened(folder / f"{name}.html", **{"viewport": {"width": 1280, "height": 800}} | context)
        page.wait_for_function("document.querySelector('output')?.textContent && Bokeh.documents[0].is_idle")
        return page

    return show


def ends(page):
    """The steps that all panels show, from and to."""
    found = page.evaluate("Bokeh.documents[0].roots().map(({x_range}) => `${x_range.start} ${x_range.end}`)")
    (one,) = set(found)
    return [float(end) for end in one.split()]


def place(page, plot, share, height=0.5):
    """Where on the screen that share of a plot's width and height is."""
    left, top, wide, tall = page.evaluate(
        """i => {
          const view = Bokeh.index.get_one(Bokeh.documents[0].roots()[i])
          if (i < document.querySelectorAll("section").length) view.el.scrollIntoView({block: "center"})
          const {left, top} = view.el.getBoundingClientRect(), {bbox} = view.frame
          return [left + bbox.left, top + bbox.top, bbox.width, bbox.height]
        }""",
        plot,
    )
    return left + share * wide, top + height * tall


def point_at(page, plot, share, height=0.5):
    """Move the pointer there; the step that is there."""
    page.mouse.move(*place(page, plot, share, height))
    start, end = ends(page)
    return start + share * (end - start)


def read(page, title):
    """The step that a panel tells, and its numbers, in the order of its lines."""
    section = page.locator("section").nth(TITLES.index(title))
    return section.locator("small").inner_text(), section.locator("output").all_inner_texts()


def coloured(page):
    """Of each plot, whether it is painted: its canvas has anything that is not grey."""
    return page.evaluate(
        """Bokeh.documents[0].roots().map(plot => {
          const {el} = Bokeh.index.get_one(plot).canvas.primary
          const {data} = el.getContext("2d").getImageData(0, 0, el.width, el.height)
          return data.some((_, i) => i % 4 == 0 && data[i + 3] > 50 && Math.abs(data[i] - data[i + 2]) > 50)
        })"""
    )


WHITE = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
SHOWN = [*itertools.product([("long", 1280), ("several", 1280), ("short", 400), ("several", 400)], WHITE)]
IN_CI = [(("several", 1280), "light"), (("short", 400), "dark")]


@pytest.mark.parametrize(
    "name, width, scheme",
    [pytest.param(*run, scheme, marks=[] if (run, scheme) in IN_CI else pytest.mark.slow) for run, scheme in SHOWN],
)
def test_all_panels_are_there_in_light_and_dark(name, width, scheme, shown):
    page = shown(name, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.locator("section h2").evaluate_all("all => all.map(h2 => h2.firstChild.data.trim())") == TITLES
    assert coloured(page) == [True] * (len(TITLES) + 1)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == WHITE[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_numbers_are_those_of_the_step_under_the_pointer(folder, shown):
    page = shown("short")
    lines = read_runs([folder / "short"])[0].lines
    for plot, share, at in ((0, 0.42, 8), (5, 0.99, 19), (STRIP, 0.11, 2)):
        assert round(point_at(page, plot, share)) == at + 1
        line, title = lines[at], "mean logp of tokens"
        page.wait_for_function(f"document.querySelector('small').textContent == 'step {at + 1}'")
        expected = [f"{line[name]:.4g}" for name in ("logp/positive", "logp/negative")]
        assert [float(value) for value in read(page, title)[1]] == [float(value) for value in expected]
        assert read(page, title)[0] == f"step {at + 1}"
    page.mouse.move(1, 1)  # away from all: the end of the run
    page.wait_for_function("document.querySelector('small').textContent == 'step 20'")


def test_of_several_runs_each_has_its_number_while_it_lasts(shown):
    page = shown("several")
    assert read(page, "loss")[0] == "steps 20 to 10,000" and "–" not in read(page, "loss")[1]
    assert round(point_at(page, 0, 0.5)) == 5000
    page.wait_for_function("document.querySelector('output:nth-of-type(2)').textContent == '–'")
    step, (first, *others) = read(page, "loss")
    assert abs(int(step.removeprefix("step ").replace(",", "")) - 5000) < 200
    assert float(first) < 0 and others == ["–", "–"]
    colours = page.locator("header span").evaluate_all("all => all.map(span => span.style.color)")
    assert len(set(colours)) == 3 and page.locator("header span").all_inner_texts() == ["long", "middle", "short"]


def test_all_panels_zoom_together_by_dragging_and_by_the_wheel_and_go_back(shown):
    page = shown("long")
    whole = ends(page)
    assert whole == [0.5, 10_000.5]
    point_at(page, 1, 0.25)
    page.mouse.down()
    point_at(page, 1, 0.75)
    page.mouse.up()
    page.wait_for_function("Bokeh.documents[0].roots()[0].x_range.start > 2000")
    start, end = ends(page)
    assert (start, end) == (pytest.approx(2500, abs=60), pytest.approx(7500, abs=60))
    point_at(page, 2, 0.5)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function(f"Bokeh.documents[0].roots()[0].x_range.start > {start + 100}")
    page.locator("button").click()
    assert ends(page) == whole
    page.evaluate("Bokeh.documents[0].roots()[0].x_range.setv({start: 10, end: 20})")
    page.mouse.dblclick(*place(page, 0, 0.5))
    assert ends(page) == whole


def test_the_wheel_alone_moves_the_page(shown):
    page = shown("long")
    point_at(page, 1, 0.5)
    page.mouse.wheel(0, 300)
    page.wait_for_function("scrollY > 100")
    assert ends(page) == [0.5, 10_000.5]


def test_a_finger_moves_the_page_and_does_not_zoom(shown):
    page = shown("short", has_touch=True, is_mobile=True, viewport={"width": 400, "height": 800})
    assert page.evaluate("Bokeh.documents[0].roots().every(({toolbar}) => toolbar.gestures.pan.active == null)")


def test_the_height_follows_what_is_zoomed_to(shown):
    page = shown("long")
    height = "(({start, end}) => end - start)(Bokeh.documents[0].roots()[8].y_range)"
    whole = page.evaluate(height)
    page.evaluate("Bokeh.documents[0].roots()[0].x_range.setv({start: 9900, end: 10000})")
    page.wait_for_function(f"{height} < {whole / 20}")


def test_the_strip_shows_events_of_the_run(shown):
    page = shown("short")  # started again before steps 7 and 13
    point_at(page, STRIP, (7 - 0.5) / 20, 0.2)
    page.locator(".bk-Tooltip").get_by_text("restarts: 1, step 7").wait_for()


def test_names_and_settings_stay_text(tmp_path, opened):
    evil = "script><img src=x onerror=alert(1)>"  # under "<" it is called </script>...
    runs = [write_run(tmp_path / name / evil, 20, model_name=f"</script><b>{name}</b>") for name in ("<", "b")]
    write_page(read_runs(runs), tmp_path / "page.html")
    page = opened(tmp_path / "page.html", viewport={"width": 1280, "height": 800})
    page.wait_for_function("document.querySelector('output')?.textContent && Bokeh.documents[0].is_idle")
    assert page.locator("header span").first.inner_text() == f"</{evil}"
    point_at(page, STRIP, (7 - 0.5) / 20, 0.1)  # the first run's restart
    page.locator(".bk-Tooltip").get_by_text(f"</{evil}: restarts: 1, step 7").wait_for()
    assert page.locator("img, td b").count() == 0 and page.locator("td").get_by_text("</script><b>b</b>").count() == 1
