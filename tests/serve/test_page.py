"""The page as a browser has it: columns in step, text that stays text, words for what goes wrong, both widths, light
and dark.

One headless Chromium for all tests, against a server without a model (fake_server.py).
"""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest
from starlette.responses import JSONResponse, Response

from deltaw.serve import page as served
from tests.serve.fake_server import BASE, HOSTILE, NAMES, Fake, serving
from tests.serve.serving import KEY, Running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
SOON = 5_000  # ms

# The contrast (WCAG 2) of every text that is seen to its ground: a canvas lays the grounds over each other as the
# browser does. And what hangs out of the window.
MEASURE = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const seen = colours => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = pen.getImageData(0, 0, 1, 1).data;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const words = [...node.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => n.textContent);
    if (!words.length || !node.checkVisibility() || node.disabled || node.closest("option, .unseen")) continue;
    const grounds = ["#fff"];
    for (let n = node, all = []; n; n = n.parentElement) {
      all.unshift(getComputedStyle(n).backgroundColor);
      if (!n.parentElement) grounds.push(...all);
    }
    const [a, b] = [seen(grounds), seen([...grounds, getComputedStyle(node).color])].sort((x, y) => x - y);
    if ((b + 0.05) / (a + 0.05) < 4.5) low.push(words[0]);
  }
  return {low, wide: document.documentElement.scrollWidth - innerWidth};
}"""

# Any text, cut into tokens and pieces anywhere, is laid out as that text; each token of whole characters is shaded.
LAID = """async () => {
  const {Words} = await import("./page/tokens.js");
  const random = n => Math.floor(Math.random() * n), wrong = [];
  const signs = [..."ab <&>\\n\\t\\u00e9\\u4f60\\ud83d\\ude00\\u202e", " <b>", "\\u0301"];
  for (let round = 0; round < 200; round++) {
    const text = Array.from({length: 1 + random(12)}, () => signs[random(signs.length)]).join("");
    const bytes = [...new TextEncoder().encode(text)], decoder = new TextDecoder();
    const element = document.createElement("p"), words = new Words(element);
    let tokens = [];
    while (bytes.length) {
      const held = bytes.splice(0, 1 + random(4));
      tokens.push({text: random(2) ? "\\ufffd" : "?", bytes: random(9) ? held : null, logprob: -1, top: []});
      const whole = decoder.decode(new Uint8Array(held), {stream: true});
      words.add({text: whole, tokens: whole && random(3) ? tokens.splice(0) : []});
    }
    words.add({text: "", tokens});
    words.end();
    if (element.textContent !== text || words.text !== text) wrong.push([text, element.textContent]);
    if (element.querySelector("b")) wrong.push("HTML");
  }
  return wrong;
}"""

# The same stream, cut into network chunks anywhere, in all forms that the standard of server-sent events has.
STREAMED = """async () => {
  const {answer} = await import("./page/server.js");
  const wrong = [], random = n => Math.floor(Math.random() * n), real = window.fetch;
  for (let round = 0; round < 60; round++) {
    const end = random(2) ? "\\n" : "\\r\\n", parts = ["\\u00e9\\n", "\\ud83d\\ude00", "data: x", "\\n\\n"];
    const piece = content => JSON.stringify({choices: [{delta: {content}}]});
    const lines = parts.map(content => "data:" + (random(2) ? " " : "") + piece(content));
    const text = [...lines, ": ping", "event: x" + end + "data: [DONE]"].map(line => line + end + end).join("");
    const bytes = [...new TextEncoder().encode(text)];
    window.fetch = async () => new Response(new ReadableStream({pull(stream) {
      if (!bytes.length) return stream.close();
      stream.enqueue(new Uint8Array(bytes.splice(0, 1 + random(40))));
    }}));
    let said = "";
    for await (const piece of answer({body: {}})) said += piece.text;
    if (said !== parts.join("")) wrong.push(said);
  }
  window.fetch = real;
  return wrong;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} isn't there: the page is tested in a real browser")
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture
def fake(server: Fake) -> Fake:
    server.key, server.wait, server.plain, server.left = "", 0.0, False, 0
    server.names, server.broken = list(NAMES), set()
    server.asked.clear()
    server.script.clear()
    return server


@pytest.fixture(scope="module")
def tab(browser: "Browser") -> "Page":
    context = browser.new_context()
    context.set_default_timeout(SOON)
    return context.new_page()


@pytest.fixture
def page(tab: "Page", fake: Fake) -> Iterator["Page"]:
    """The page, newly opened; whatever it or its policy complains of fails the test."""
    complaints: list[str] = []

    def on_error(error: Any) -> None:
        complaints.append(str(error))

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.emulate_media(color_scheme="light")
    tab.on("pageerror", on_error)
    tab.on("console", on_console)
    opened(tab, fake)
    yield tab
    tab.goto(f"{fake.url}/page/icon.svg")  # leaving, it keeps the chat
    tab.evaluate("sessionStorage.clear(), localStorage.clear()")
    tab.unroute_all()
    tab.remove_listener("pageerror", on_error)
    tab.remove_listener("console", on_console)
    assert complaints == []


def opened(page: "Page", fake: Fake) -> None:
    page.goto(fake.url, wait_until="commit")
    page.wait_for_selector("#key-form:not([hidden])" if fake.key else ".column")


def ask(page: "Page", words: str) -> list[str]:
    """What the columns answer."""
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")
    return answers(page)


def answers(page: "Page") -> list[str]:
    page.wait_for_selector("#conversation[aria-busy=false]")
    return page.locator(".turn:last-child .answer .words").all_text_contents()


def get(fake: Fake, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(fake.url + path, headers=headers)) as response:
            return response.status, dict(response.headers), response.read()
    except HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize("path", served.FILES)
def test_every_file_has_a_policy_and_a_tag(fake: Fake, path: str) -> None:
    status, headers, body = get(fake, path)
    assert status == 200 and body
    assert "'unsafe" not in headers["content-security-policy"] and "default-src 'none'" in served.POLICY
    assert get(fake, path, **{"If-None-Match": f'"x", W/{headers["etag"]}'})[::2] == (304, b"")
    assert get(fake, path, **{"If-None-Match": '"x"'})[0] == 200


def test_nothing_stands_inline_and_nothing_comes_from_elsewhere(fake: Fake) -> None:
    for path, name in served.FILES.items():
        text = get(fake, path)[2].decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|outerHTML", text), name
    index = get(fake, "/")[2].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", index)
    assert get(fake, "/page/__init__.py")[0] == 404


def test_columns_are_asked_alike_and_go_on_with_their_own_answers(page: "Page", fake: Fake) -> None:
    page.locator(".scale input").last.fill("1.5")
    page.fill("#temperature", "0.7")
    page.fill("#most", "5000")
    page.fill("#prompt", "too long")
    page.press("#prompt", "Enter")
    assert fake.asked == [] and page.locator("#most:invalid").count() == 1
    page.fill("#most", "50")
    page.fill("#seed", "3")
    page.fill("#system", "Be brief.")
    assert ask(page, "One") == [f"{BASE} says: One", "words says: One"]
    ask(page, "Two")
    for body in fake.asked:
        assert (body["temperature"], body["max_tokens"], body["seed"], body["stream"]) == (0.7, 50, 3, True)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body.get("scale") == (None if body["model"] == BASE else 1.5)
        before = ["One", f"{body['model']} says: One"] if body in fake.asked[2:] else []
        last = "Two" if before else "One"
        assert [message["content"] for message in body["messages"][1:]] == [*before, last]
    assert "1.50" in page.locator(".answer h3").last.text_content()

    page.locator(".model").last.select_option("a/b ü")
    page.click("#regenerate")
    page.locator(".answer:last-child", has_text="a/b ü").wait_for()
    assert answers(page) == [f"{BASE} says: Two", "a/b ü says: Two"] and page.locator(".turn").count() == 2

    page.click("#add")  # catches up
    page.locator(".answer").nth(5).wait_for()
    assert answers(page)[2] == "words says: Two"
    assert [len(body["messages"]) for body in fake.asked[-2:]] == [2, 4]
    page.get_by_label("Remove this column").first.click()
    assert answers(page) == ["a/b ü says: Two", "words says: Two"]

    page.click("#new")
    assert ask(page, "Three")[0].endswith("Three") and len(fake.asked[-1]["messages"]) == 2


def test_enter_sends_and_shift_enter_begins_a_line(page: "Page", fake: Fake) -> None:
    page.locator("#prompt").press_sequentially("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    answers(page)
    page.keyboard.press("Enter")  # nothing to send
    assert [body["messages"][-1]["content"] for body in fake.asked] == ["a\nb"] * 2


def test_text_stays_text(page: "Page", fake: Fake) -> None:
    fake.script = {HOSTILE: [HOSTILE, {"error": {"message": HOSTILE}}]}
    assert ask(page, HOSTILE) == [HOSTILE, HOSTILE]
    page.locator(".token").first.hover()
    assert HOSTILE.split()[0] in page.locator("#alternatives").text_content()
    assert page.locator(".error").first.text_content().startswith(HOSTILE)
    assert page.locator("img").count() == 0 and page.title() == "deltaw"


def test_any_text_is_laid_out_as_it_is_and_any_stream_is_read(page: "Page") -> None:
    assert page.evaluate(LAID) == []
    assert page.evaluate(STREAMED) == []


def test_stop_ends_the_request_and_keeps_what_came(page: "Page", fake: Fake) -> None:
    fake.wait = 0.02
    fake.script = {"long": [f" {i}" for i in range(1000)]}
    page.fill("#prompt", "long")
    page.press("#prompt", "Enter")
    for column in (0, 1):
        page.locator(".answer").nth(column).locator(".token").nth(2).wait_for()
    assert page.locator("#send").is_disabled()
    page.click("#stop")
    assert all(words.startswith(" 0 1") for words in answers(page))
    assert re.search(r"\d+ tokens .* stopped", page.locator(".figures").first.text_content())
    for _ in range(100):
        if fake.left == 2:
            break
        page.wait_for_timeout(20)
    assert fake.left == 2 and page.locator("#send").is_enabled()
    assert ask(page, "next")[0].endswith("next")  # and the conversation goes on


def test_probabilities_are_shown_by_pointer_and_by_keys(page: "Page", fake: Fake) -> None:
    ask(page, "One two")
    tip = page.locator("#alternatives")
    token = page.locator(".answer").last.locator(".token")
    token.nth(2).hover()
    assert tip.locator("li").count() == 5 and "20.0" in tip.locator(".own").text_content()
    assert token.nth(2).get_attribute("aria-describedby") == "alternatives"
    page.locator("header").hover()
    assert tip.is_hidden()
    token.first.focus()
    page.keyboard.press("ArrowRight")
    page.evaluate("dispatchEvent(new Event('scroll'))")  # as when the next token is out of sight
    assert "70.0" in tip.locator(".own").text_content() and tip.is_visible()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] >= 0
    shades = token.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(shades)) == 3
    page.uncheck("#probabilities")
    assert len(set(token.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)"))) == 1
    ask(page, "more")
    assert "logprobs" in fake.asked[0] and "logprobs" not in fake.asked[-1]
    assert page.locator(".turn:last-child .token").count() == 0


def test_what_goes_wrong_is_said_in_words(page: "Page", fake: Fake) -> None:
    full = JSONResponse({"error": {"message": "the queue is full"}}, status_code=503, headers={"Retry-After": "3"})
    broken = Response('data: {"choices": [{"delta": {"content": "ab"}}]}\n\n', media_type="text/event-stream")
    fake.script = {"full": full, "broken": broken, "proxy": Response("<h1>Bad gateway</h1>", status_code=502)}
    fake.script |= {"later": ["half", {"error": {"message": "out of memory"}}]}
    said = {}
    for words in fake.script:
        said[words] = ask(page, words)[0], page.locator(".turn:last-child .error").first.text_content()
    assert re.search("queue is full.*3 s", said["full"][1]) and "502" in said["proxy"][1]
    assert said["later"][0] == "half" and "out of memory" in said["later"][1].lower()
    assert said["broken"][0] == "ab" and said["broken"][1]
    ask(page, "and now")  # without the turns that have no answer
    asked = [message["content"] for message in fake.asked[-1]["messages"]]
    assert asked == ["broken", "ab", "later", "half", "and now"]
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "gone")
    assert "doesn't answer" in page.locator(".turn:last-child .error").first.text_content()


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(page: "Page", fake: Fake) -> None:
    fake.key = "secret"
    opened(page, fake)
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#notice:not([hidden])")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector(".column")
    assert page.locator("#key-form").is_hidden() and ask(page, "One")[0].endswith("One")
    stored = page.evaluate("[JSON.stringify({...sessionStorage}), JSON.stringify({...localStorage}), document.cookie]")
    assert "secret" in stored[0] and "secret" not in stored[1] + stored[2]
    with page.expect_download() as download:  # a link can't send the key
        page.get_by_role("link", name="Report").click()
    assert Path(download.value.path()).read_text() == "<h1>report</h1>"


def test_a_report_is_a_link_where_there_is_one(page: "Page", fake: Fake) -> None:
    link = page.get_by_role("link", name="Report")
    assert link.get_attribute("href") == "v1/adapters/words/report"
    page.locator(".model").last.select_option("a/b ü")
    assert link.count() == 0


def test_what_was_trained_on_plain_text_is_asked_so(page: "Page", fake: Fake) -> None:
    fake.plain = True
    opened(page, fake)
    ask(page, "h e l l o -> ")
    ask(page, "next")
    assert [body["prompt"] for body in fake.asked] == ["h e l l o -> "] * 2 + ["next"] * 2
    assert fake.asked[0]["logprobs"] == 5 and page.locator(".token").count() > 4
    page.locator(".token").first.hover()
    assert page.locator("#alternatives li").count() == 5
    page.select_option("#form", "chat")
    ask(page, "chat")
    assert fake.asked[-1]["messages"][-1]["content"] == "chat"


def test_a_reload_keeps_the_chat_and_a_new_chat_forgets_it(page: "Page", fake: Fake) -> None:
    fake.script = {"bad": ["half", {"error": {"message": "out of memory"}}]}
    page.locator(".scale input").last.fill("1.5")
    page.fill("#temperature", "0.7")
    page.fill("#system", "Be brief.")
    said = [ask(page, "One two"), ask(page, "bad")]
    page.click("#add")
    page.locator(".answer").nth(5).wait_for()
    answers(page)
    look = """() => [document.getElementById("conversation").innerText, document.querySelectorAll(".token").length,
                     [...document.querySelectorAll(".model")].map(one => one.value),
                     ["temperature", "system", "form"].map(id => document.getElementById(id).value)]"""
    before = page.evaluate(look)
    page.reload()
    page.wait_for_selector(".column")
    assert page.evaluate(look) == before and before[1] > 6 and len(said) == 2
    page.locator(".token").nth(1).hover()
    assert page.locator("#alternatives li").count() == 5
    ask(page, "Three")
    body = fake.asked[-2]
    assert body["scale"] == 1.5 and [message["content"] for message in body["messages"]][:2] == ["Be brief.", "One two"]

    fake.wait, fake.script = 0.02, {"long": [f" {i}" for i in range(1000)]}
    page.fill("#prompt", "long")
    page.press("#prompt", "Enter")
    page.locator(".turn:last-child .token").nth(4).wait_for()
    page.reload()  # amid an answer
    page.wait_for_selector(".column")
    assert page.locator(".turn:last-child .answer .words").first.text_content().startswith(" 0 1")
    page.evaluate("sessionStorage.setItem('deltaw-chat', '{\"columns\": [1], \"turns\": 3}')")
    page.evaluate("addEventListener('pagehide', event => event.stopImmediatePropagation(), true)")
    page.click("#new")
    page.reload()
    page.wait_for_selector(".column")
    assert page.locator(".turn").count() == 0 and page.locator(".column").count() == 3


def test_what_is_kept_can_be_of_another_version_and_too_large(page: "Page", fake: Fake) -> None:
    ask(page, "One two")
    for text in ("{", "3", '{"columns": [1], "turns": 3}', '{"columns": [{"model": "gone"}], "turns": [{}]}'):
        page.goto(f"{fake.url}/page/icon.svg")
        page.evaluate("text => sessionStorage.setItem('deltaw-chat', text)", text)
        opened(page, fake)
        assert ask(page, "One")[0] == f"{BASE} says: One"
        page.click("#new")
    ask(page, "words")
    page.evaluate(
        "sessionStorage.setItem('other', 'x'.repeat(5 * 2 ** 20 - 700 - sessionStorage['deltaw-chat'].length))"
    )
    ask(page, "more words")  # whose tokens don't fit any more
    page.reload()
    page.wait_for_selector(".column")
    assert page.locator(".turn").count() == 2 and page.locator(".token").count() == 0
    assert page.locator(".answer .words").last.text_content() == "words says: more words"


def test_the_list_follows_the_server_and_a_broken_adapter_is_not_picked(page: "Page", fake: Fake) -> None:
    chosen = [BASE, "words"]
    page.evaluate("performance.now = ((time) => () => time += 2000)(0)")  # long enough to ask again

    def names() -> list[str]:
        return page.locator(".model").first.locator("option").all_text_contents()

    assert page.locator(".model").evaluate_all("all => all.map(one => one.value)") == chosen
    ask(page, "One")
    fake.broken, fake.names = {"a first"}, ["a first", "words", "late"]
    page.locator(".model").first.hover()
    page.locator(".model").first.locator("option", has_text="late").wait_for(state="attached")
    assert names() == ["base", "a first (broken)", "words", "late"] and page.locator(".turn").count() == 1
    assert page.locator(".model").evaluate_all("all => all.map(one => one.value)") == chosen
    page.locator(".model").last.select_option("a first")
    assert "cut short" in page.locator(".problem:not([hidden])").text_content()
    page.locator(".model").last.select_option("words")
    fake.names = ["late"]
    page.evaluate("dispatchEvent(new Event('focus'))")
    page.locator(".model").last.locator("option", has_text="words (gone)").wait_for(state="attached")
    assert names() == ["base", "late"]
    fake.names = ["a first", "words"]
    page.goto(f"{fake.url}/page/icon.svg")
    page.evaluate("sessionStorage.clear()")
    opened(page, fake)
    assert page.locator(".model").evaluate_all("all => all.map(one => one.value)") == chosen


@pytest.mark.parametrize("width", [360, 1280])
def test_it_can_be_read_at_any_width_in_light_and_dark(page: "Page", fake: Fake, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    fake.script = {"x": ["W" * 300, " b", " c", {"error": {"message": "w" * 300}}]}
    ask(page, "One two three")
    ask(page, "x")
    if page.locator("#settings").is_hidden():
        page.click("#settings-button")
    page.evaluate("document.getElementById('key-form').hidden = false")
    page.locator(".token").first.hover()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate(MEASURE) == {"low": [], "wide": 0}, scheme
    page.get_by_label("Dark colours").click()  # against the system's choice, and it stays
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.wait_for_selector(".turn")
    bad_style = "color: #999; min-width: 3000px"
    page.evaluate(f"Object.assign(document.getElementById('empty'), {{hidden: false}}).style = '{bad_style}'")
    bad = page.evaluate(MEASURE)
    assert bad["low"] and bad["wide"] > 0  # the measure sees what it is for


def test_every_control_has_a_name_and_answers_are_announced(page: "Page") -> None:
    ask(page, "One")
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls: list[Any] = [node for node in nodes if node.get("role", {}).get("value") in CONTROLS]
    assert len(controls) >= 15 and [node for node in controls if not node["name"]["value"].strip()] == []
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite" and log.get_attribute("aria-busy") == "false"


CONTROLS = {"button", "combobox", "textbox", "slider", "checkbox", "spinbutton", "link"}


def test_the_real_server_gives_it_to_who_has_the_key(browser: "Browser", running: Running) -> None:
    """And what the page shows is what the API answers; an adapter at scale 0 is the base."""
    context = browser.new_context(http_credentials={"username": "any", "password": KEY})
    context.set_default_timeout(SOON)
    page = context.new_page()
    page.goto(running.address)
    page.wait_for_selector(".column")
    page.select_option("#form", "plain")
    page.fill("#most", "6")
    page.locator(".model").last.select_option("one")
    base = page.locator("#base-name").text_content()
    wanted = []
    for model in (base, "one"):
        status, answer = running.post("/v1/completions", model=model, prompt="a b", temperature=0, max_tokens=6)
        assert status == 200
        wanted.append(answer["choices"][0]["text"])
    assert ask(page, "a b") == wanted and wanted[0] != wanted[1]
    page.locator(".scale input").last.fill("0")
    assert ask(page, "a b") == [wanted[0]] * 2
    assert page.locator(".error:not([hidden])").count() == 0 and page.locator(".token").count() > 0
    context.close()
    assert running.send("GET", "/", key=None)[0] == 401
