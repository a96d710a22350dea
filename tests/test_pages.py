"""The page of wsft.inspect in a real browser: content, speed, and that nothing in a rollout is interpreted."""

import contextlib
import time

import numpy as np
import pytest

from wsft.inspect.page import page

pytestmark = pytest.mark.browser
NOBODY_KNOWS = float("nan")


def make_view(rollouts, group_size=2, prompt=2, policy=True, **changes):
    """The view of rollouts, each a list of texts of tokens, in groups; the advantages run from -1 to 1 over each rollout."""
    pieces = {piece: i for i, piece in enumerate(dict.fromkeys(piece for tokens in rollouts for piece in tokens))}
    ids = np.array([pieces[piece] for tokens in rollouts for piece in tokens])
    mask = np.concatenate([np.arange(len(tokens)) >= prompt for tokens in rollouts])
    advantage = np.concatenate([np.linspace(-1, 1, len(tokens)) for tokens in rollouts]) * mask
    logp = np.where(mask, -0.5, NOBODY_KNOWS)
    tokens = dict(piece=ids, id=ids + 100, mask=mask, advantage=advantage, behavior_logp=logp, weight=advantage * 1.25)
    if policy:
        tokens |= dict(logp=logp + np.log(1.25), ratio=np.where(mask, 1.25, NOBODY_KNOWS))
    described = [
        dict(sequence=i % group_size, score=float(i % 2), advantage=0.5, override="", temperature=1.0, logp=-0.5)
        | dict(tokens=len(tokens), trained=max(0, len(tokens) - prompt))
        for i, tokens in enumerate(rollouts)
    ]
    groups = []
    for begin in range(0, len(rollouts), group_size):
        members = [*range(begin, min(begin + group_size, len(rollouts)))]
        scores = [described[i]["score"] for i in members]
        groups.append(dict(name=f"group {len(groups)}", env_id=None, scores=scores, rejected=[], rollouts=members))
    view = dict(title="runs/first, batch 7", metadata={"objective": "ppo_clip", "policy": "the sampler's logps"}, findings=[])
    return view | dict(pieces=[*pieces], groups=groups, rollouts=described, tokens=tokens) | changes


TALK = ["user", ": ", "The", " cap", "ital", "?", "\n", "It", " is", " Par", "is", "."]


@pytest.fixture
def show(opened, tmp_path):
    """`show(rollouts)` is the page of their view, with the first tokens drawn."""

    def open_view(rollouts, context=None, **changes):
        path = tmp_path / "page.html"
        path.write_text(page(make_view(rollouts, **changes)), encoding="utf-8")
        opened_page = opened(path, **(context or {}))
        opened_page.wait_for_selector("#t0")
        return opened_page

    return open_view


def numbers(page):
    """What the tooltip says, by name."""
    names, values = page.locator("#tip dt").all_inner_texts(), page.locator("#tip dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def wait_for_count(page, expected):
    page.wait_for_selector(f"#count >> text=/^{expected}$/")


def inside_the_window(page, selector):
    return page.evaluate(
        """selector => { const {left, top, right, bottom} = document.querySelector(selector).getBoundingClientRect();
        return left >= 0 && top >= 0 && right <= document.documentElement.clientWidth && bottom <= innerHeight }""",
        selector,
    )


def overflow(page):
    """Pixels that the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_every_rollout_and_group_is_shown_with_what_was_rejected(show):
    groups = make_view([TALK] * 5)["groups"]
    groups[1]["rejected"] = [{"sequence": 2, "reason": "ragged", "detail": "12 tokens, 11 masks"}]
    groups[1] |= {"scores": [1.0, 0.25, None], "env_id": 3}
    shown = show([TALK] * 5, groups=groups)
    assert shown.title() == "runs/first, batch 7" == shown.inner_text("h1")
    assert shown.locator("section").count() == 3 and shown.locator("article").count() == 5
    assert shown.locator("section").nth(1).locator("article").count() == 2
    assert "env 3, 2 rollouts" in shown.locator("section h2").nth(1).inner_text()
    assert shown.inner_text(".rejected >> nth=1") == "sequence 2 was left out: ragged, 12 tokens, 11 masks"
    assert "score\t1\t0.25\tnone" in shown.locator("table").nth(1).inner_text()
    assert shown.locator(".chunk").first.inner_text() == "".join(TALK)
    assert "sequence 0" in shown.inner_text("h3 >> nth=0") and "10 of 12 tokens trained" in shown.inner_text("h3 >> nth=0")
    assert "Nothing looks wrong" in shown.inner_text("#findings")


def test_a_batch_of_nothing_is_a_page(opened, tmp_path):
    view = make_view([TALK])
    view |= dict(groups=[], rollouts=[], tokens={name: values[:0] for name, values in view["tokens"].items()})
    (tmp_path / "page.html").write_text(page(view))
    assert opened(tmp_path / "page.html").locator("#count", has_text="0 rollouts").count() == 1


def test_a_hover_shows_the_numbers_of_a_token(show):
    shown = show([TALK, TALK], context={"viewport": {"width": 400, "height": 500}})
    shown.hover("#t23")
    assert numbers(shown) == {
        "token": ".",
        "id": "111",
        "position": "11",
        "mask": "1, trained",
        "advantage": "1",
        "sampler's logp": "-0.5",
        "policy's logp": "-0.2769",
        "ratio": "1.25",
        "weight": "1.25",
    }
    assert inside_the_window(shown, "#tip")
    shown.hover("#t0")
    assert numbers(shown)["mask"] == "0, untrained" and numbers(shown)["ratio"] == "none"
    shown.hover("h1")
    assert not shown.is_visible("#tip")


def test_without_a_policy_its_numbers_are_not_named(show):
    shown = show([TALK], policy=False)
    shown.hover("#t5")
    assert [*numbers(shown)] == ["token", "id", "position", "mask", "advantage", "sampler's logp", "weight"]


def test_a_click_pins_and_keys_move_from_there(show):
    shown = show([TALK, TALK])
    shown.click("#t4")
    shown.hover("#t9")
    assert numbers(shown)["position"] == "4"
    shown.keyboard.press("ArrowRight")
    assert numbers(shown)["position"] == "5" and shown.get_attribute("#t5", "class").endswith("now")
    for _ in range(9):
        shown.keyboard.press("ArrowLeft")
    assert numbers(shown)["position"] == "0"
    shown.hover("h1")
    shown.keyboard.press("Escape")
    assert not shown.is_visible("#tip") and shown.locator(".now").count() == 0
    shown.keyboard.press("/")
    assert shown.evaluate("document.activeElement.type") == "search"
    for _ in range(6):  # the filter, the table's links, the rollout's own, its text
        shown.keyboard.press("Tab")
        if shown.is_visible("#tip"):
            break
    assert numbers(shown)["position"] == "0"


def test_places_of_findings_lead_to_their_token(show):
    findings = [{"text": "It never stops.", "places": [[1, None], [7, 2345]], "more": 3}]
    shown = show([TALK] * 7 + [TALK * 300], findings=findings)
    assert "It never stops. #1 #7:2345 and 3 more" in " ".join(shown.inner_text("#findings").split())
    token = f"#t{7 * 12 + 2345}"
    assert shown.locator(token).count() == 0  # not drawn yet
    shown.click("text=#7:2345")
    shown.wait_for_selector(f"{token}.now")
    assert inside_the_window(shown, token) and "flagged" in shown.get_attribute(token, "class")
    assert numbers(shown)["position"] == "2,345"
    shown.go_back()
    shown.select_option("select", "0")
    shown.click("#findings >> text=#7:2345")  # what the filter hides comes back
    shown.wait_for_selector(f"{token}.now")
    assert inside_the_window(shown, token)
    shown.select_option("select", "2")
    shown.click("#findings >> text=/^#1$/")
    shown.wait_for_selector("#t12")
    assert inside_the_window(shown, "article:has(#t12)")
    shown.go_back()
    shown.reload()  # the address names the place
    shown.wait_for_selector(f"{token}.now")
    assert inside_the_window(shown, token)


def test_search_finds_text_across_tokens(show):
    shown = show([TALK, ["no", "thing", " here"], TALK])
    shown.fill("input", "CAPITAL?")
    shown.wait_for_selector(".hit")
    assert shown.input_value("input") and shown.inner_text("#count") == "2 hits in 2 rollouts"
    assert shown.locator(".hit").all_inner_texts() == [" cap", "ital", "?"] * 2
    assert [article.is_visible() for article in shown.locator("article").all()] == [True, False, True]
    for keys, expected, at in (
        ("Enter", "1 of 2 hits", "t3"),
        ("Enter", "2 of 2 hits", "t18"),
        ("Enter", "1 of 2 hits", "t3"),
        ("Shift+Enter", "2 of 2 hits", "t18"),
    ):
        shown.keyboard.press(keys)
        assert shown.inner_text("#count") == expected and shown.locator(".now").first.get_attribute("id") == at
    shown.fill("input", ".*")  # no pattern
    wait_for_count(shown, "0 hits in 0 rollouts")
    shown.keyboard.press("Enter")
    shown.fill("input", "")
    wait_for_count(shown, "3 rollouts")
    assert shown.locator("article:visible").count() == 3 and shown.locator(".hit").count() == 0


def test_filters_leave_a_group_or_what_has_findings(show):
    shown = show([TALK] * 4, findings=[{"text": "Odd.", "places": [[3, None]], "more": 0}])
    for choice, visible in (("1", [2, 3]), ("found", [3]), ("all", [0, 1, 2, 3])):
        shown.select_option("select", choice)
        assert [i for i, article in enumerate(shown.locator("article").all()) if article.is_visible()] == visible
    assert shown.locator("section:visible").count() == 2


# the colour of a token's background over the paper, and of its text
COLOURS = """id => { const pixel = (...colours) => { const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) };
    const paper = getComputedStyle(document.body).backgroundColor, style = getComputedStyle(document.getElementById(id));
    return [pixel(paper, style.backgroundColor), pixel(paper, style.color)] }"""


def contrast(one, other):
    """WCAG 2's ratio."""
    dark, light = sorted(np.dot((np.array(c) / 255) ** 2.2, (0.2126, 0.7152, 0.0722)) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_weights_have_colours_that_can_be_distinguished_and_read(show, scheme):
    tokens = make_view([TALK])["tokens"]
    tokens["weight"] = np.array([0, 0, -2, -1, 0, 1, 2, NOBODY_KNOWS, 1e6, 1, 1, 1])
    shown = show([TALK], tokens=tokens, context={"color_scheme": scheme})
    ground, text = zip(*[shown.evaluate(COLOURS, f"t{i}") for i in range(9)], strict=True)
    assert all(contrast(*pair) >= 4.5 for pair in zip(ground, text, strict=True))
    assert contrast(ground[0], (255, 255, 255) if scheme == "light" else (0, 0, 0)) < 1.3
    assert ground[6][2] > ground[6][0] and ground[2][0] > ground[2][2]  # blue, and orange
    assert abs(ground[6][2] - ground[6][0]) >= abs(ground[5][2] - ground[5][0]) > 10
    assert ground[0] == ground[4] == ground[7] and text[0] != text[4]
    lines = [shown.evaluate(f"getComputedStyle(t{i}).textDecorationStyle") for i in (0, 4, 7)]
    assert lines == ["solid", "dotted", "wavy"]
    assert shown.locator(".chunk .begin").all_inner_texts() == ["The"]


HOSTILE = {
    "</script><script>alert(1)</script>": None,
    "<img src=x onerror=alert(1)>": None,
    "<!--": None,
    "&lt;b&gt;": None,
    "a\0b\x1b[31m\x7f\x85": "a␀b␛[31m␡<U+0085>",
    "\u202egnirts\u2066\u200b\ufeff": "<U+202E>gnirts<U+2066><U+200B><U+FEFF>",
    "\u2028\r": "<U+2028>␍",
    "e" + "\u0301" * 500: "e⟨399 marks⟩… 501 characters",
    "👩\u200d🚀": None,
    "⟨e2⟩\ufffd": None,
    "שלום עולם": None,
    "x" * 1_000_000: "x" * 400 + "… 1,000,000 characters",
    "": "∅",
    "__proto__": None,
    "THE VIEW $& \\": None,
}


WHERE = """id => { const token = document.getElementById(id); token.scrollIntoView({block: "center"});
    const {left, top} = token.getClientRects()[0]; return [left + 2, top + 8] }"""


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_text_is_shown_and_never_acts(show, width):
    texts = [*HOSTILE]
    rejected = [{"sequence": 0, "reason": texts[0], "detail": texts[1] + texts[5]}]
    groups = [{"name": texts[1] + texts[5], "env_id": texts[0], "scores": [None], "rejected": rejected, "rollouts": [0, 1]}]
    odd = dict(title=texts[0], metadata={texts[1]: texts[0], "long": texts[11]}, groups=groups)
    findings = [{"text": " ".join(texts[:7]), "places": [[0, 3]], "more": 0}]
    floods = ["\u0301", "𝕏", "\t", " " * 3000, "ﷺ" * 300] * 50
    shown = show([texts, floods], context={"viewport": {"width": width, "height": 800}}, findings=findings, **odd)
    for i, (piece, seen) in enumerate(HOSTILE.items()):
        assert shown.evaluate(f"t{i}.textContent") == (piece if seen is None else seen)
        x, y = shown.evaluate(WHERE, f"t{i}")
        shown.mouse.move(x, y)
        assert numbers(shown)["position"] == str(i)
        assert inside_the_window(shown, "#tip")
    assert shown.locator("script").count() == 2 and shown.locator("img, b").count() == 0
    assert shown.locator("h1").inner_text() == texts[0]
    assert overflow(shown) == 0


def test_nothing_leaves_the_page_even_if_markup_came_in(browser, tmp_path):
    (tmp_path / "page.html").write_text(page(make_view([TALK])))
    shown = browser.new_page()
    shown.goto((tmp_path / "page.html").as_uri())
    attempt = """text => new Promise(resolve => { addEventListener("securitypolicyviolation", event =>
        resolve(event.effectiveDirective)); document.querySelector("main").innerHTML = text })"""
    assert shown.evaluate(attempt, "<img src=http://127.0.0.1:9/secret>") == "img-src"
    assert shown.evaluate(attempt, "<iframe src=http://127.0.0.1:9/secret>") == "frame-src"
    shown.close()


def test_a_selection_copies_text_without_the_marks(show):
    shown = show([TALK])
    shown.evaluate("getSelection().selectAllChildren(document.querySelector('.chunk'))")
    assert shown.evaluate("String(getSelection())") == "".join(TALK)


def test_a_rollout_of_a_million_tokens_never_freezes_the_page(show):
    from playwright.sync_api import TimeoutError as NotShown

    shown = show([[f"{i} " for i in range(500)] * 2000, TALK])
    start = time.monotonic()
    for _ in range(5):  # the wheel may turn before the page is laid out, which moves nothing: then once more
        for hash in ("#0:999999", "#0:500000", "#1:3"):
            shown.evaluate(f"location.hash = '{hash}'")
            shown.wait_for_selector(".now")
            shown.evaluate("new Promise(requestAnimationFrame)")
        shown.mouse.wheel(0, -30_000)
        with contextlib.suppress(NotShown):
            shown.wait_for_selector("#t999000", state="attached", timeout=5_000)
            break
    else:
        pytest.fail("the wheel moves nothing")
    assert time.monotonic() - start < 60  # an idle machine takes two; drawn as a whole, it would freeze for minutes
    assert shown.locator(".chunk > span").count() < 20_000
    shown.fill("input", "499 0 1")
    wait_for_count(shown, "1,999 hits in 1 rollout")


def test_a_thousand_rollouts_open_in_seconds(opened, tmp_path, rng):
    words = [f" {word}" for word in rng.integers(0, 10**6, 5000)]
    rollouts = [[words[i] for i in row] for row in rng.integers(0, len(words), (1000, 500))]
    view = make_view(rollouts, group_size=8)
    view["tokens"]["weight"] = rng.normal(size=500_000)
    (tmp_path / "page.html").write_text(page(view))
    needle, start = "".join(rollouts[700][100:103]), time.monotonic()
    shown = opened(tmp_path / "page.html")
    shown.wait_for_selector("#t0")
    shown.fill("input", needle)
    wait_for_count(shown, "1 hit in 1 rollout")
    assert time.monotonic() - start < 15  # an idle machine takes one
    shown.keyboard.press("Enter")
    assert inside_the_window(shown, f"#t{700 * 500 + 100}")
