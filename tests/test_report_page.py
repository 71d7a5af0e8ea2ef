"""The page of lrlora report in a real browser: Chromium without a window, driven by selenium."""

import json
import shutil

import pytest

pytest.importorskip("selenium", reason="no selenium: pip install 'lrlora_ops[test]'")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from lrlora_ops.finetune.page import render
from lrlora_ops.finetune.run_costs import run_costs
from lrlora_ops.finetune.runs import read_runs
from tests._runs import GROWING, LEARNED, MIXED, rewritten, train_run

pytestmark = pytest.mark.slow
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000")


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no browser: needs chromium and chromedriver, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for plan in (LEARNED, GROWING):
        train_run(plan, directory / plan.name)
    return read_runs([directory / plan.name for plan in (LEARNED, GROWING)])


@pytest.fixture
def page(browser, runs, tmp_path):
    """The page of both runs; at the end, no error may have been logged and nothing requested but the page."""
    yield from visited(browser, runs, tmp_path)


def visited(browser, runs, directory, width=1280):
    path = directory / "report.html"
    path.write_text(render(runs, "H200"), encoding="utf-8")
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages left
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]


def find(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def numbers(page, title, number=int):
    """The numbers in the cells of the heatmap with this title, in reading order."""
    [panel] = [own for own in find(page, "#maps .panel") if own.text.startswith(title)]
    return [number(cell.text) for cell in panel.find_elements(By.CSS_SELECTOR, ".number")]


def in_reading_order(cells, ranks):
    return [ranks[place] for row in cells for place in row]


def test_it_shows_the_last_ranks_and_the_slider_goes_back(page, runs):
    data = json.loads(find(page, "#data")[0].get_attribute("textContent"))["runs"][0]
    cells = data["maps"][0]["cells"]
    assert numbers(page, "Rank by layer and module") == in_reading_order(cells, runs[0].ranks)
    assert find(page, ".time output")[0].text == "after step 12 of 12"
    slider = find(page, ".time input")[0]
    slider.send_keys(Keys.HOME)
    assert find(page, ".time output")[0].text == "after step 0 of 12"
    assert numbers(page, "Rank by layer and module") == [2] * 14
    slider.send_keys(Keys.RIGHT * 5)
    assert numbers(page, "Rank by layer and module") == in_reading_order(cells, runs[0].snapshots[5]["ranks"])


def test_a_trainers_evaluations_stand_in_the_table(browser, runs, tmp_path):
    def evaluated(lines):
        lines.insert(1, {"step": 0, "held_out": {"eval": 2.5}})
        lines.insert(-1, {"step": 12, "held_out": {"eval": 2.25, "eval_code": 3.0}})

    none = "\N{EN DASH}"
    directories = [rewritten(runs[0].directory, tmp_path / "evaluated", evaluated), runs[1].directory]
    for page in visited(browser, read_runs(directories), tmp_path):
        names = [cell.text for cell in find(page, "#table thead th")]
        for name, expected in (("eval", ["2.500 → 2.250", none]), ("eval_code", ["3.000", none])):
            place = names.index(f"held-out loss, {name}")
            assert [
                row.find_elements(By.CSS_SELECTOR, "th, td")[place].text for row in find(page, "#table tbody tr")
            ] == expected


def test_the_switch_shows_the_other_run(page, runs):
    first, second = find(page, "#switch button")
    assert (first.text, second.text) == ("learned", "growing")
    assert (first.get_attribute("aria-pressed"), second.get_attribute("aria-pressed")) == ("true", "false")
    second.click()
    assert (first.get_attribute("aria-pressed"), second.get_attribute("aria-pressed")) == ("false", "true")
    assert find(page, "#ranks-title")[0].text == "Ranks of growing"
    assert numbers(page, "Rank by layer and expert") == runs[1].ranks
    assert "DynamicRank(" in find(page, "#method")[0].text
    share = [100 * share for of in runs[1].end["routing"]["near text"].values() for share in of]
    assert numbers(page, "Share of rows by routing, near text") == pytest.approx(share, abs=0.51)
    find(page, "#table tbody tr")[0].click()
    assert find(page, "#ranks-title")[0].text == "Ranks of learned"
    assert find(page, "#table tr[aria-selected=true]")[0].text.startswith("learned")


def test_tooltips_tell_a_cell_a_step_and_a_bar(page, runs):
    tooltip = find(page, "#tooltip")[0]
    find(page, "#switch button")[1].click()
    assert not tooltip.is_displayed()
    cell = find(page, "#maps .panel svg")[0].find_elements(By.CSS_SELECTOR, "rect")[6]  # layer 1, expert 2
    ActionChains(page).move_to_element(cell).perform()
    assert tooltip.is_displayed()
    share = runs[1].end["routing"]["near text"]["model.layers.1.mlp.experts"][2]
    for words in ("layer 1 · expert 2", f"{runs[1].ranks[6]} of at most 4", f"{100 * share:.0f}", "nats"):
        assert words in tooltip.text
    assert len(tooltip.find_elements(By.CSS_SELECTOR, "polyline")) == 1

    ActionChains(page).move_to_element(find(page, "#overview svg")[0]).perform()
    assert tooltip.text.startswith("step ") and "growing" in tooltip.text and "learned" in tooltip.text
    ActionChains(page).move_to_element(find(page, "#cost rect")[0]).perform()
    assert tooltip.text.startswith("these ranks") and "AdamW" in tooltip.text
    ActionChains(page).move_to_element(find(page, "h1")[0]).perform()
    assert not tooltip.is_displayed()


def test_arrow_keys_read_the_cells(page, runs):
    page.execute_script("document.querySelector('#maps .panel svg').focus()")
    ActionChains(page).send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT).perform()
    rank = runs[0].by_adapter(runs[0].ranks)["model.layers.1.self_attn.k_proj"][0]
    assert "layer 1 · self_attn.k_proj" in find(page, "#tooltip")[0].text
    assert f"{rank} of at most 6" in find(page, "#tooltip")[0].text


def test_play_ends_at_the_last_step(page):
    page.execute_script("window.setInterval = work => { for (let i = 0; i < 12; i++) work(); return 1; }")
    find(page, ".time button")[0].click()
    assert find(page, ".time output")[0].text == "after step 12 of 12"
    assert find(page, ".time button")[0].text == "Play"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_are_readable(page, theme):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    script = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    ink, paper = (luminance(color) for color in page.execute_script(script))
    light, dark = max(ink, paper), min(ink, paper)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG's contrast for small text
    assert (paper > ink) == (theme == "light")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(color):
    """WCAG's, of ``rgb(r, g, b)``."""
    channels = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(browser, runs, tmp_path, width):
    for page in visited(browser, runs, tmp_path, width):
        for button in find(page, "#switch button"):
            button.click()
            assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_stable_ranks_have_heatmaps_and_charts_of_their_own(browser, runs, tmp_path):
    train_run(MIXED, tmp_path / "mixed")
    [mixed] = read_runs([tmp_path / "mixed"])
    for page in visited(browser, [mixed, runs[0]], tmp_path):
        maps = json.loads(find(page, "#data")[0].get_attribute("textContent"))["runs"][0]["maps"]
        stable = in_reading_order(maps[1]["cells"], mixed.stable_ranks)
        assert numbers(page, "Stable rank by layer and module", float) == pytest.approx(stable, abs=0.051)
        assert numbers(page, "Rank by layer and module") == [3] * 6
        growth = [own.text for own in find(page, "#growth h3")]
        for title in ("Rank of mlp: mean", "Stable rank of self_attn: mean", "Mean stable rank of each layer"):
            assert any(own.startswith(title) for own in growth)
        overview = [own.text.partition(":")[0] for own in find(page, "#overview h3")]
        assert overview == ["Training loss, smoothed", "Rank", "Stable rank"]
        heads = [own.text for own in find(page, "#all h3")]
        assert "mixed: stable rank by layer and module" in heads and "learned: rank by layer and module" in heads
        assert "mean stable rank" in find(page, "#table")[0].text
        cost = find(page, "#cost")[0].text
        assert "LoRA of these ranks" in cost and "it has a third product" in cost
        arms = run_costs(mixed, "H200")["arms"]
        assert len(find(page, "#cost rect")) == sum(len(arm["held"]) + 1 for arm in arms)  # bars of memory, and of time
        find(page, "#switch button")[1].click()
        assert not any(own.text.startswith("Stable") for own in find(page, "#maps h3, #growth h3"))


def test_a_run_without_a_step_and_one_without_sizes_say_so(browser, runs, tmp_path):
    def empty(lines):
        del lines[1:]
        lines[0].update(layers=[], no_layers="a model of another kind")

    alone = read_runs([rewritten(runs[0].directory, tmp_path / "run", empty)])
    for page in visited(browser, alone, tmp_path):
        text = find(page, "body")[0].text
        assert "No step was recorded yet" in text and "not ended: 0 of 12 steps" in text
        assert "The sizes of this model's layers are not known: a model of another kind" in text
        assert not find(page, "#switch")[0].is_displayed()
        assert numbers(page, "Rank by layer and module") == [2] * 14


@pytest.mark.parametrize(
    "script, words",
    [("nothing()", "nothing is not defined"), ("navigator.sendBeacon('http://127.0.0.1:9/x')", "http://127.0.0.1:9/x")],
)
def test_an_error_and_a_request_would_be_seen(browser, runs, tmp_path, monkeypatch, script, words):
    """The checks of ``visited``, on a page that does what it must not."""
    monkeypatch.setitem(globals(), "render", lambda *_: f"<link rel=icon href=data:,><script>{script}</script>")
    with pytest.raises(AssertionError, match=words):
        list(visited(browser, runs, tmp_path))
