"""The chat page in a real browser, before a server that says what each test has written for it.

With SCREENSHOTS=FOLDER in the environment, `-k screenshots` makes the pictures of the docs.
"""

import json
import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "gptjax" / "serving" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
  "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
expect = sync_api.expect
expect.set_options(timeout=5_000)

PROSE = "The first part. " * 6
INJECTED = """\
<img src=x onerror=alert(1)><script>alert(2)</script><iframe src='https://evil.test/'></iframe>

[a](javascript:alert(3)) [b](java\tscript:alert(4)) [c](data:text/html,<script>alert(5)</script>)
![d](https://evil.test/pixel.png) <a href="javascript:alert(6)">e</a>
[f](https://ok.test/"onclick=alert(7)) <javascript:alert(8)> https://ok.test/"onclick=alert(9)

| <svg onload=alert(10)> |
|---|
| <style>*{display:none}</style> |

```<b>
</code><script>alert(11)"""


class Scripted:
  """What the server is to say next, and what it was asked."""

  def __init__(self):
    self.models = ["gpt-small", "gpt-other"]
    self.pieces: list[str] = ["Hello."]
    self.pause = 0.0  # Seconds between pieces.
    self.gate = threading.Event()  # Where a piece is "WAIT", the server waits for this.
    self.finish = "stop"
    self.key: str | None = None
    self.refusals: list[tuple[int, dict, str]] = []  # Status, headers, message of the next answers.
    self.asked: list[dict] = []
    self.cut = ""  # How the stream ends in the middle: "broken" or "ended".
    self.aborted = threading.Event()


class Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def answer(self, status, content_type, body, headers=()):
    self.send_response(status)
    for name, value in (("Content-Type", content_type), ("Content-Length", len(body)), *headers):
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(body)

  def refuse(self, status, message, headers=()):
    error = {"message": message, "type": "refused", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    self.answer(status, "application/json", body, headers)

  def allowed(self):
    key = self.server.scripted.key
    if key is None or self.headers["Authorization"] == f"Bearer {key}":
      return True
    self.refuse(401, "The key is wrong.")
    return False

  def do_GET(self):
    if self.path == "/v1/models":
      if self.allowed():
        models = {"object": "list", "data": [{"id": name} for name in self.server.scripted.models]}
        self.answer(200, "application/json", json.dumps(models).encode())
      return
    file = PAGE / (self.path.lstrip("/") or "index.html")
    if file.parent == PAGE and file.is_file():
      headers = [("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff")]
      self.answer(200, TYPES[file.suffix], file.read_bytes(), headers)
    else:
      self.refuse(404, "There is no such page.")

  def do_POST(self):
    scripted = self.server.scripted
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if not self.allowed():
      return
    scripted.asked.append(json.loads(body))
    if scripted.refusals:
      status, headers, message = scripted.refusals.pop(0)
      return self.refuse(status, message, headers.items())
    self.send_response(200)
    self.send_header("Content-Type", "text/event-stream")
    self.send_header("Transfer-Encoding", "chunked")
    self.end_headers()
    try:
      self.stream(scripted)
    except OSError:
      scripted.aborted.set()
      self.close_connection = True

  def stream(self, scripted):
    self.event({"choices": [{"delta": {"role": "assistant"}}]})
    for piece in scripted.pieces:
      if piece == "WAIT":
        while not scripted.gate.wait(0.05):
          self.write(b": still here\n\n")  # Fails once the page has gone away.
      else:
        self.event({"choices": [{"delta": {"content": piece}}]})
        time.sleep(scripted.pause)
    if scripted.cut == "broken":
      raise OSError
    if scripted.cut == "ended":
      self.wfile.write(b"0\r\n\r\n")
      return
    self.event({"choices": [{"delta": {}, "finish_reason": scripted.finish}]})
    self.event({"choices": [], "usage": {"completion_tokens": len(scripted.pieces)}})
    self.write(b"data: [DONE]\n\n")
    self.wfile.write(b"0\r\n\r\n")

  def event(self, data):
    self.write(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

  def write(self, data):
    """In two chunks, cut where no line ends, and maybe within a character."""
    for part in (data[:-5], data[-5:]):
      self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
      self.wfile.flush()


@pytest.fixture
def scripted():
  return Scripted()


@pytest.fixture
def base_url(scripted):
  """The address of a server with the page and the API."""
  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads = True
  server.scripted = scripted
  threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}"
  scripted.gate.set()
  server.shutdown()
  server.server_close()


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
    )
    yield browser
    browser.close()


@pytest.fixture
def new_page(browser, base_url):
  """Opens the page; at the end, whatever was done, it has been no danger and in no trouble."""
  contexts, wrong = [], []

  def watch(page):
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))

  def said(message):  # A refused request is told as an error, too.
    if message.type == "error" and "Failed to load resource" not in message.text:
      wrong.append(f"console: {message.text}")

  def asked(request):
    if not request.url.startswith((base_url, "data:", f"blob:{base_url}")):
      wrong.append(f"request: {request.url}")

  def opened(**options):
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    contexts.append(context)
    context.set_default_timeout(5_000)
    for event, call in (("page", watch), ("console", said), ("request", asked)):
      context.on(event, call)
    page = context.new_page()
    page.goto(base_url)
    expect(page.locator("#model-name")).to_have_text("gpt-small")  # All is there.
    return page

  yield opened
  for context in contexts:
    context.close()
  assert wrong == []


@pytest.fixture
def page(new_page):
  return new_page()


def say(page, text):
  page.locator("#box").fill(text)
  page.get_by_role("button", name="Send", exact=True).click()


def answers(page):
  return page.locator(".assistant .body")


def ask(page, text):
  """Says something and waits for the end of the answer."""
  say(page, text)
  expect(page.locator(".running")).to_have_count(0)
  expect(page.locator("#stop")).to_be_hidden()


def test_an_answer_appears_bit_by_bit(page, scripted):
  scripted.pieces = [
    PROSE + "\n\n- one\n- tw",
    "WAIT",
    "o, **bold**\n\n```python\nx = 1\n",
    "```\n",
  ]
  say(page, "Hi")
  expect(answers(page).locator("li").last).to_have_text("tw")
  expect(page.locator(".running")).to_have_attribute("aria-busy", "true")
  # What is finished is not made again.
  page.evaluate("document.querySelector('.assistant .body p').mark = 'same'")
  scripted.gate.set()
  expect(answers(page).locator("li").last).to_have_text("two, bold")
  expect(answers(page).locator("strong")).to_have_text("bold")
  expect(answers(page).locator("pre code")).to_have_text("x = 1")
  expect(answers(page).locator(".code-head span")).to_have_text("python")
  assert page.evaluate("document.querySelector('.assistant .body p').mark") == "same"
  expect(page.locator(".figures")).to_contain_text("4 tokens")
  expect(page.locator(".figures")).to_contain_text("first token after")
  expect(page.locator("#live")).to_contain_text("The answer has ended.")
  [asked] = scripted.asked
  assert asked["messages"] == [{"role": "user", "content": "Hi"}]
  assert asked["stream"] is True
  assert asked["stream_options"] == {"include_usage": True}
  assert asked["model"] == "gpt-small"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_was_written(page, scripted, how):
  scripted.pieces = ["Half of it", "WAIT", " and the rest"]
  say(page, "Hi")
  expect(answers(page)).to_have_text("Half of it")
  if how == "button":
    page.get_by_role("button", name="Stop").click()
  else:
    page.keyboard.press("Escape")
  expect(page.locator(".figures")).to_contain_text("Stopped")
  assert scripted.aborted.wait(5)
  expect(answers(page)).to_have_text("Half of it")


def test_an_answer_cut_by_its_length_says_so(page, scripted):
  scripted.finish = "length"
  ask(page, "Hi")
  expect(page.locator(".figures")).to_contain_text("Cut at the limit of tokens")


def test_another_answer_and_another_question_are_branches(page, scripted):
  scripted.pieces = ["Answer one"]
  ask(page, "Question one")
  scripted.pieces = ["Answer two"]
  page.get_by_role("button", name="Another answer").click()
  expect(page.locator(".assistant .branches")).to_contain_text("2 / 2")
  expect(answers(page)).to_have_text("Answer two")
  page.get_by_role("button", name="Previous version").click()
  expect(answers(page)).to_have_text("Answer one")
  scripted.pieces = ["Answer 1b"]
  page.get_by_role("button", name="Another answer").click()
  expect(page.locator(".assistant .branches")).to_contain_text("3 / 3")
  expect(answers(page)).to_have_text("Answer 1b")
  for shown in ("Answer two", "Answer one"):
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text(shown)

  page.locator("#box").focus()
  page.keyboard.press("ArrowUp")  # In an empty box: edits the last message.
  scripted.pieces = ["Answer three"]
  field = page.get_by_role("textbox", name="Edit the message")
  expect(field).to_be_focused()
  field.fill("Question two")
  field.press("Enter")
  expect(answers(page)).to_have_text("Answer three")
  assert scripted.asked[-1]["messages"] == [{"role": "user", "content": "Question two"}]
  expect(page.locator(".user .branches")).to_contain_text("2 / 2")
  page.get_by_role("button", name="Previous version").click()
  expect(page.locator(".user .body")).to_have_text("Question one")
  expect(answers(page)).to_have_text("Answer one")

  ask(page, "More")  # Of the branch that is shown.
  said = [message["content"] for message in scripted.asked[-1]["messages"]]
  assert said == ["Question one", "Answer one", "More"]


def test_a_reload_keeps_conversation_branch_and_settings(page, scripted):
  page.locator("#panel-open").click()
  page.get_by_label("System prompt").fill("Be brief.")
  page.get_by_label("Temperature").fill("0.5")
  page.get_by_label("Stop at").fill("END\n###")
  page.get_by_role("combobox", name="Model").select_option("gpt-other")
  ask(page, "Hi")
  scripted.pieces = ["Other"]
  page.get_by_role("button", name="Another answer").click()
  expect(answers(page)).to_have_text("Other")
  page.get_by_role("button", name="Previous version").click()
  expect(answers(page)).to_have_text("Hello.")
  page.wait_for_timeout(100)
  page.reload()
  expect(answers(page)).to_have_text("Hello.")
  expect(page.locator(".assistant .branches")).to_contain_text("1 / 2")
  ask(page, "Again")
  asked = scripted.asked[-1]
  assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
  assert (asked["temperature"], asked["stop"], asked["model"]) == (0.5, ["END", "###"], "gpt-other")
  assert "top_p" not in asked

  page.get_by_role("button", name="New chat").click()  # Has its own settings, but for the model.
  ask(page, "New")
  assert "temperature" not in scripted.asked[-1]
  assert scripted.asked[-1]["model"] == "gpt-other"


def test_a_number_out_of_range_is_not_used(page, scripted):
  page.locator("#panel-open").click()
  page.get_by_label("Temperature").fill("0.5")
  page.get_by_label("Temperature").fill("7")
  expect(page.locator("#invalid")).to_contain_text("Temperature")
  ask(page, "Hi")
  assert scripted.asked[-1]["temperature"] == 0.5


def inert(page):
  """Nothing but what the page itself writes is an element, or an address."""
  page.wait_for_timeout(150)
  assert page.locator("#messages :is(script, img, iframe, style, object, form)").count() == 0
  assert page.locator("#messages svg[onload]").count() == 0
  marks = "all => all.map(a => [a.protocol, a.rel, a.target])"
  links = page.locator("#messages a").evaluate_all(marks)
  assert all(link == ["https:", "noopener noreferrer", "_blank"] for link in links)
  names = "all => all.flatMap(e => [...e.attributes].map(a => a.name))"
  known = {"alt", "class", "data-id", "lang", "href", "rel", "target", "tabindex", "type", "title"}
  known |= {"aria-busy", "aria-label", "disabled"}
  assert set(page.locator("#messages *").evaluate_all(names)) <= known


def test_injected_text_is_inert(page, scripted):
  scripted.pieces = list(INJECTED)  # Every beginning of it is shown.
  ask(page, INJECTED)
  expect(answers(page)).to_contain_text("<script>alert(2)</script>")
  expect(page.locator(".user .body")).to_contain_text("<script>alert(2)</script>")
  inert(page)
  page.locator("#search").fill("<img src=x")
  expect(page.locator("#conversations .name")).to_have_count(1)


def test_an_imported_file_is_inert_and_a_bad_one_loses_nothing(page, scripted):
  ask(page, "Mine")

  def bring(data):
    text = data if isinstance(data, str) else json.dumps(data)
    file = {"name": "a.json", "mimeType": "application/json", "buffer": text.encode()}
    page.locator("#file").set_input_files(file)

  first = {"id": "a", "parent": None, "role": "user", "content": INJECTED, "created": 1}
  second = {"id": "b", "parent": "a", "role": "assistant", "content": INJECTED, "created": 2}
  conversation = {"id": "x", "title": INJECTED, "created": 1, "updated": 2}
  conversation |= {"settings": {}, "chosen": {}, "messages": [first, second]}
  whole = {"format": "gptjax-chat", "version": 1, "conversations": [conversation]}
  toast = page.locator("#toast")

  def broken(*messages):
    return {**whole, "conversations": [conversation, {**conversation, "messages": list(messages)}]}

  for bad, sentence in (
    ("{", "The file is not JSON."),
    ({"a": 1}, "The file was not exported from this page."),
    (broken({**first, "parent": "b"}, second), "has a message 1 that follows none"),
    (broken(first, {**second, "role": "system"}), "Conversation 2 of the file has a wrong role"),
    (broken(first, {**second, "content": {"a": 1}}), "has no text or date at message 2"),
  ):
    bring(bad)
    expect(toast).to_contain_text("Nothing was imported.")
    expect(toast).to_contain_text(sentence)
  expect(page.locator("#conversations .name")).to_have_text(["Mine"])

  bring(whole)
  expect(toast).to_contain_text("Imported 1 of 1")
  page.locator("#conversations .name").last.click()
  expect(answers(page)).to_contain_text("alert(2)")
  inert(page)
  bring(whole)
  expect(toast).to_contain_text("1 were here already")


def test_what_is_exported_can_be_imported(page, new_page, scripted):
  ask(page, "First question")
  page.get_by_role("button", name="Another answer").click()
  expect(page.locator(".assistant .branches")).to_contain_text("2 / 2")
  page.get_by_role("button", name="New chat").click()
  ask(page, "Second question")

  def exported(page):
    with page.expect_download() as download:
      page.get_by_role("button", name="Export all conversations").click()
    return Path(download.value.path()).read_bytes()

  written = exported(page)
  assert len(json.loads(written)["conversations"]) == 2
  other = new_page()  # Another browser, where nothing is kept yet.
  file = {"name": "a.json", "mimeType": "application/json", "buffer": written}
  other.locator("#file").set_input_files(file)
  expect(other.locator("#conversations .name")).to_have_text(["Second question", "First question"])
  assert json.loads(exported(other)) == json.loads(written)


def test_rename_search_delete_and_undo(page, scripted):
  ask(page, "About whales")
  page.get_by_role("button", name="New chat").click()
  ask(page, "About owls")
  names = page.locator("#conversations .name")
  names.last.hover()
  page.get_by_role("button", name="Rename About whales").click()
  page.get_by_role("textbox", name="Title").fill("Large animals")
  page.keyboard.press("Enter")
  expect(names).to_have_text(["About owls", "Large animals"])
  page.locator("#search").fill("whales")  # In its messages.
  expect(names).to_have_text(["Large animals"])
  page.locator("#search").fill("")
  names.first.hover()
  page.get_by_role("button", name="Delete About owls").click()
  expect(names).to_have_text(["Large animals"])
  page.get_by_role("button", name="Undo").click()
  expect(names).to_have_text(["About owls", "Large animals"])
  expect(page.locator(".user .body")).to_have_text("About owls")


def test_a_wrong_key_is_asked_for(page, scripted):
  dialog = page.get_by_role("dialog", name="This server asks for a key")

  def give(key):
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key").fill(key)
    dialog.get_by_role("button", name="Continue").click()

  scripted.key = "secret"
  page.reload()
  give("wrong")
  expect(page.locator("#wrong-key")).to_be_visible()
  give("secret")
  expect(page.locator("#model-name")).to_have_text("gpt-small")
  scripted.key = "another"  # While the page is open.
  say(page, "Hi")
  give("another")
  expect(answers(page)).to_have_text("Hello.")
  page.reload()
  expect(answers(page)).to_have_text("Hello.")
  expect(dialog).to_be_hidden()
  assert page.evaluate("localStorage.length") == 0  # The key is kept for this tab alone.
  assert page.evaluate("sessionStorage.getItem('gptjax:key')") == "another"


def test_a_busy_server_is_told_and_asked_again(page, scripted):
  scripted.refusals = [(503, {"Retry-After": "2"}, "all slots are taken")]
  say(page, "Hi")
  failure = page.locator("#failure")
  expect(failure).to_contain_text("The server is busy: all slots are taken")
  expect(failure).to_contain_text("taken. It asks to wait 2 s.")
  again = failure.get_by_role("button")
  expect(again).to_have_text(re.compile(r"^Try again \(\d s\)$"))
  expect(again).to_have_text("Try again")
  again.click()
  expect(answers(page)).to_have_text("Hello.")
  expect(failure).to_be_hidden()
  assert [len(asked["messages"]) for asked in scripted.asked] == [1, 1]


@pytest.mark.parametrize("cut", ["broken", "ended"])
def test_a_connection_that_breaks_keeps_what_came(page, scripted, cut):
  scripted.pieces, scripted.cut, scripted.pause = ["Half"], cut, 0.1
  ask(page, "Hi")
  expect(page.locator("#failure")).to_contain_text("The connection was lost")
  expect(answers(page)).to_have_text("Half")
  expect(page.locator(".figures")).to_contain_text("Interrupted")
  scripted.cut = ""
  page.get_by_role("button", name="Try again").click()
  expect(page.locator(".assistant .branches")).to_contain_text("2 / 2")


def test_a_server_that_is_away_is_told(page, scripted):
  page.route("**/v1/**", lambda route: route.abort())
  say(page, "Hi")
  expect(page.locator("#failure")).to_contain_text("The server cannot be reached")
  page.unroute("**/v1/**")
  page.get_by_role("button", name="Try again").click()
  expect(answers(page)).to_have_text("Hello.")


def test_a_full_browser_is_told(page, scripted):
  full = "IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError') }"
  page.evaluate(f"() => {{ {full} }}")
  ask(page, "Hi")
  expect(page.locator("#toast")).to_contain_text("room for this page is full")
  expect(answers(page)).to_have_text("Hello.")


def test_a_phone_has_drawers_and_no_sideways_scroll(new_page, scripted):
  page = new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
  scripted.pieces = [
    "|a|b|\n|-|-|\n|" + "x" * 90 + "|y|\n\n```\n" + "z" * 300 + "\n```\n",
    "w" * 200,
  ]

  def fits():
    within = "s => s.scrollWidth <= s.clientWidth && document.body.scrollWidth <= innerWidth"
    return page.locator("#scroll").evaluate(within)

  assert fits()
  page.locator("#box").fill("Hi")
  page.locator("#box").press("Enter")  # A new line: no phone has Shift+Enter.
  assert scripted.asked == []
  ask(page, "Hi")
  assert fits()
  for name, shown in (("List of conversations", "#side"), ("Settings, model gpt-small", "#panel")):
    expect(page.locator(shown)).to_be_hidden()
    page.get_by_role("button", name=name).tap()
    expect(page.locator(shown)).to_be_in_viewport(ratio=1)
    assert fits()
    page.keyboard.press("Escape")
    expect(page.locator(shown)).to_be_hidden()


def test_keys(page, scripted):
  box = page.locator("#box")
  box.press_sequentially("one")
  box.press("Shift+Enter")
  box.press_sequentially("two?")
  expect(page.get_by_role("dialog")).to_have_count(0)
  box.press("Enter")
  expect(answers(page)).to_have_text("Hello.")
  assert scripted.asked[0]["messages"][0]["content"] == "one\ntwo?"
  box.press("Control+/")
  expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
  page.keyboard.press("Escape")
  page.locator("#title").click()
  page.keyboard.press("?")
  expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
  page.keyboard.press("Escape")
  page.keyboard.press("Control+Shift+O")
  expect(page.locator("#empty")).to_be_visible()
  expect(box).to_be_focused()
  page.keyboard.press("Control+k")
  expect(page.locator("#search")).to_be_focused()


def test_enter_that_ends_a_composition_does_not_send(page, scripted):
  box = page.locator("#box")
  box.focus()
  page.context.new_cdp_session(page).send(
    "Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6}
  )
  for marks in ({"isComposing": True}, {"keyCode": 229}):
    event = {"key": "Enter", "bubbles": True, "cancelable": True, **marks}
    box.evaluate("(box, e) => box.dispatchEvent(new KeyboardEvent('keydown', e))", event)
  page.wait_for_timeout(200)
  assert scripted.asked == []
  expect(box).to_have_value("ni hao")
  box.fill("你好")
  box.press("Enter")
  expect(page.locator(".user .body")).to_have_attribute("lang", "zh-Hans")
  expect(answers(page)).to_have_text("Hello.")


def test_the_end_stays_in_sight_only_if_it_was(page, scripted):
  long = [f"Paragraph {i}.\n\n" for i in range(60)]
  scripted.pieces = [*long, "WAIT", *long]
  say(page, "Hi")
  expect(answers(page).locator("p")).to_have_count(60)
  away = "s => s.scrollHeight - s.scrollTop - s.clientHeight"
  assert page.locator("#scroll").evaluate(away) < 48
  expect(page.locator("#to-end")).to_be_hidden()
  page.locator("#scroll").evaluate("s => s.scrollTop = 100")
  expect(page.locator("#to-end")).to_be_visible()
  scripted.gate.set()
  expect(answers(page).locator("p")).to_have_count(120)
  assert page.locator("#scroll").evaluate("s => s.scrollTop") == 100
  page.get_by_role("button", name="Jump to the end").click()
  expect(page.locator("#to-end")).to_be_hidden()
  assert page.locator("#scroll").evaluate(away) < 48


MARKDOWN = {
  "**注意：**后面 ***both*** ~~gone~~ a_b_c": (
    "<p><strong>注意：</strong>后面 <strong><em>both</em></strong> <del>gone</del> a_b_c</p>"
  ),
  "*a **b** c* **d *e*** 2 * 3 * 4": (
    "<p><em>a <strong>b</strong> c</em> <strong>d <em>e</em></strong> 2 * 3 * 4</p>"
  ),
  "$a_1 * b_1$ costs $5 and $6, \\(x_i\\), \\*no\\*": (
    '<p><span class="math">$a_1 * b_1$</span> costs $5 and $6, '
    '<span class="math">\\(x_i\\)</span>, *no*</p>'
  ),
  "1. a\n  - b\n    more\n2. c\n\ntext": (
    "<ol><li><p>a</p><ul><li><p>b<br>more</p></li></ul></li><li><p>c</p></li></ol><p>text</p>"
  ),
  "> q\nlazy\n> - i\n\n---\n## T ##": (
    "<blockquote><p>q<br>lazy</p><ul><li><p>i</p></li></ul></blockquote><hr><h4>T</h4>"
  ),
  "a|b\n-|-:\n`x|y`|1\\|2\n": (
    '<div class="table" tabindex="0"><table>'
    '<thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td><code>x|y</code></td><td class="right">1|2</td></tr></tbody></table></div>'
  ),
  "``a`b`` `c": "<p><code>a`b</code> `c</p>",
  "[t*x*](mailto:a@b.c) [no](/etc/passwd)": (
    '<p><a href="mailto:a@b.c" rel="noopener noreferrer" target="_blank">t<em>x</em></a> '
    "[no](/etc/passwd)</p>"
  ),
}


def test_markdown_is_the_same_whole_or_letter_by_letter(page):
  module = "const { MarkdownView } = await import('/markdown.js');"
  whole = f"""async text => {{ {module}
    const root = document.createElement('div'); new MarkdownView(root).update(text);
    return root.innerHTML }}"""
  parts = f"""async text => {{ {module}
    const root = document.createElement('div'), view = new MarkdownView(root);
    for (let i = 0; i <= text.length; i++) view.update(text.slice(0, i));
    return root.innerHTML }}"""
  for text, html in MARKDOWN.items():
    assert page.evaluate(whole, text) == html
    assert page.evaluate(parts, text) == html
  everything = "\n\n".join([*MARKDOWN, CONVERSATION[1]])
  assert page.evaluate(parts, everything) == page.evaluate(whole, everything)


def test_markdown_of_hostile_length_takes_little_time(page):
  took = page.evaluate(
    """async texts => { const { MarkdownView } = await import('/markdown.js');
    return texts.map(text => { const start = performance.now();
      new MarkdownView(document.createElement('div')).update(text.repeat(30000 / text.length));
      return [text, performance.now() - start] }) }""",
    [
      *("*a ", "**a *b ", "***a ", "_a", "`a ", "[a", "[a](", "\\("),
      *("> ", "- ", "a|", "~~a ", "$a ", "http://a(", "<"),
    ],
  )
  slow = [(text, milliseconds) for text, milliseconds in took if milliseconds > 1500]
  assert slow == []


def test_an_answer_goes_on_while_another_conversation_is_read(page, scripted):
  scripted.pieces = ["Some", "WAIT", " more"]
  say(page, "Slow")
  expect(answers(page)).to_have_text("Some")
  page.get_by_role("button", name="New chat").click()
  expect(page.locator("#stop")).to_be_hidden()
  expect(page.locator("#conversations .busy")).to_have_count(1)
  scripted.gate.set()
  expect(page.locator("#conversations .busy")).to_have_count(0)
  page.get_by_role("button", name="Slow", exact=True).click()
  expect(answers(page)).to_have_text("Some more")
  expect(page.locator(".figures")).to_contain_text("3 tokens")


def test_what_one_tab_writes_is_seen_in_another(page, scripted, base_url):
  other = page.context.new_page()
  other.goto(base_url)
  page.bring_to_front()
  ask(page, "Hi")
  other.get_by_role("button", name="Hi", exact=True).click()
  expect(answers(other)).to_have_text("Hello.")
  page.bring_to_front()
  ask(page, "And?")
  expect(answers(other)).to_have_count(2)


def test_a_refused_answer_leaves_the_branch_as_it_was(page, scripted):
  for text in ("One", "Two"):
    scripted.pieces = [text]
    if text == "One":
      ask(page, "Hi")
    else:
      page.get_by_role("button", name="Another answer").click()
    expect(answers(page)).to_have_text(text)
  page.get_by_role("button", name="Previous version").click()
  scripted.refusals = [(400, {}, "no more tokens fit")]
  page.get_by_role("button", name="Another answer").click()
  expect(page.locator("#failure")).to_contain_text("The server refused: no more tokens fit")
  expect(page.locator(".assistant .branches")).to_contain_text("1 / 2")
  expect(answers(page)).to_have_text("One")


def test_a_question_without_an_answer_can_be_asked_again(page, scripted):
  scripted.pieces = ["WAIT", "Late"]
  say(page, "Hi")
  page.get_by_role("button", name="Stop").click()
  expect(answers(page)).to_have_count(0)
  page.wait_for_timeout(100)
  page.reload()
  expect(page.locator("#failure")).to_contain_text("This has no answer yet.")
  scripted.gate.set()
  page.get_by_role("button", name="Try again").click()
  expect(answers(page)).to_have_text("Late")


def test_the_theme_follows_the_system_or_the_button(new_page):
  page = new_page(color_scheme="dark")
  colour = "getComputedStyle(document.body).backgroundColor"
  dark = page.evaluate(colour)
  page.get_by_role("button", name="Theme: as the system").click()
  light = page.evaluate(colour)
  assert dark != light
  page.reload()
  expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
  assert page.evaluate(colour) == light


def test_every_control_has_a_name(page, scripted):
  scripted.pieces = ["```\nx\n```\n"]
  ask(page, "Hi")
  page.get_by_role("button", name="Another answer").click()
  expect(page.locator(".assistant .branches")).to_contain_text("2 / 2")
  page.locator("#panel-open").click()
  nameless = page.locator("button, input, select, textarea").evaluate_all(
    """all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim()
      || e.labels?.[0]?.textContent.trim())).map(e => e.outerHTML)"""
  )
  assert nameless == []
  ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
  assert len(ids) == len(set(ids))
  page.keyboard.press("Tab")
  outline = "getComputedStyle(document.activeElement).outlineStyle"
  assert page.evaluate(outline) == "solid"


CONVERSATION = [
  "How does a learning rate schedule with warmup and cosine decay look in Python?",
  """A warmup starts small, since the first gradients are large and noisy; the cosine then lets \
the rate fall slowly to a fraction of its peak.

```python
import math

def learning_rate(step, peak=3e-4, warmup=1_000, total=20_000, floor=0.1):
  \"\"\"Linear warmup, then a cosine down to `floor * peak`.\"\"\"
  if step < warmup:
    return peak * (step + 1) / warmup
  done = min(1.0, (step - warmup) / (total - warmup))
  return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
```

| Step | Phase | Rate |
|---:|---|---:|
| 0 | first step | 3.0e-7 |
| 1 000 | **peak** | 3.0e-4 |
| 10 500 | half way | 1.7e-4 |
| 20 000 | end | 3.0e-5 |

Two things worth checking: that the *last* step is reached, and that `warmup` is well below \
`total`.""",
]


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS names no folder")
def test_screenshots(new_page, scripted):
  from PIL import Image

  folder = Path(os.environ["SCREENSHOTS"])
  scripted.models, scripted.pause = ["gpt-small"], 0.02
  phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
  desktop = {"viewport": {"width": 1280, "height": 900}}
  for name, scheme, options in (("chat", "light", desktop), ("chat_phone", "dark", phone)):
    page = new_page(color_scheme=scheme, device_scale_factor=2, **options)
    for earlier in ("What does perplexity measure?", "用三句话说明注意力机制。"):
      scripted.pieces = ["It depends."]
      ask(page, earlier)
      page.keyboard.press("Control+Shift+O")
    scripted.pieces = CONVERSATION[1].replace(" ", " \0").split("\0")
    ask(page, CONVERSATION[0])
    page.locator("#scroll").evaluate("s => s.scrollTop = 0")
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    page.screenshot(path=folder / f"{name}.png")
    image = Image.open(folder / f"{name}.png").convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
