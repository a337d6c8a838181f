"""Chat templates that loop, print or grow without end; the ordinary ones are tested with the tokenizer."""

import datetime
import time

import pytest

from jaxserve.frontend.template import TemplateBudget, TemplateProcessError, TemplateRenderer
from jaxserve.frontend.worker_process import WorkerProcess

BUDGET = TemplateBudget(seconds=0.3, characters=100_000, memory=256 * 1024 * 1024)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<b>ö</b>"}]

NESTED = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in [i, j] %}{% endfor %}{% endfor %}{% endfor %}"
)
TIME = r"^the chat template takes more than its budget of 0\.3 s for messages$"
MEMORY = r"^the chat template takes more than its budget of 256 MiB for messages$"
OUTPUT = r"^the chat template makes \d+ characters of messages; its budget is 100000$"


@pytest.fixture(scope="module")
def renderer():
    return TemplateRenderer(BUDGET)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, TIME),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}", TIME),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", None),
        ("{{ (range(99999) | list * 99) | map('string') | map('upper') | list | length }}", None),
        ("{{ 'x' * 10 ** 11 }}", MEMORY),
        (
            "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            f"{MEMORY}|{TIME}",  # a slow machine runs out of time first
        ),
        ("{{ 'x'.center(10 ** 11) }}", MEMORY),
        ("{% for i in range(9999) %}{{ messages[0].content * 50 }}{% endfor %}", OUTPUT),
        ("{% for i in range(10 ** 9) %}{% endfor %}", r"Range too big"),
    ],
)
def test_fault_33_a_template_without_end_is_refused(renderer, template, message):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        renderer.render(template, MESSAGES)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - begin < 60


def test_one_long_operation_ends_the_process_and_the_next_conversation_has_a_new_one(renderer):
    assert renderer.render("{{ messages[0].content }}", MESSAGES) == "hi"
    with pytest.raises(ValueError, match=TIME):
        renderer.render("{{ 7 ** (20000000 * messages|length) % 11 }}", MESSAGES)
    assert renderer.render("{{ messages[0].content }}", MESSAGES) == "hi"


def test_after_an_error_the_same_process_goes_on(renderer):
    assert renderer.render("ok", MESSAGES) == "ok"
    worker = renderer._worker
    with pytest.raises(ValueError, match=TIME):
        renderer.render(NESTED, MESSAGES)
    assert renderer.render("ok", MESSAGES) == "ok"
    assert renderer._worker is worker


def test_what_a_client_sends_counts(renderer):
    """The template is harmless; the conversation makes it large."""
    messages = [{"role": "user", "content": "x" * 1000}] * 101
    with pytest.raises(ValueError, match=OUTPUT):
        renderer.render("{% for m in messages %}{{ m.content }}{% endfor %}", messages)


def test_errors_are_short(renderer):
    with pytest.raises(ValueError, match=r"^messages do not fit the chat template: xxx") as caught:
        renderer.render("{{ raise_exception('x' * 1000000) }}", MESSAGES)
    assert len(str(caught.value)) < 600


def test_everything_that_transformers_offers_is_there(renderer):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% generation %}{{ m | tojson }}"
        "{% endgeneration %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ add_generation_prompt }}"
    )
    year = datetime.datetime.now().year
    text = renderer.render(template, MESSAGES, {"bos_token": "<s>"})
    assert text == f'<s>hi{{"role": "assistant", "content": "<b>ö</b>"}}{year}True'


def test_lone_surrogates_and_nothing_pass(renderer):
    assert renderer.render("{{ messages[0].content }}", [{"role": "user", "content": "a\udcff"}]) == "a\udcff"
    assert renderer.render("", MESSAGES) == ""


def test_a_process_that_was_ended_between_two_conversations_is_replaced(renderer):
    assert renderer.render("ok", MESSAGES) == "ok"
    renderer._worker._process.kill()
    renderer._worker._process.wait()
    assert renderer.render("ok", MESSAGES) == "ok"


def test_a_process_that_is_ended_within_a_conversation_is_replaced_once(renderer, monkeypatch):
    ask, number = WorkerProcess.ask, []

    def ask_and_kill(self, request, seconds):
        if b"template" in request:
            number.append(self._process.pid)
            if len(number) in kills:
                self._process.kill()
        return ask(self, request, seconds)

    monkeypatch.setattr(WorkerProcess, "ask", ask_and_kill)
    kills = (1,)
    assert renderer.render("ok", MESSAGES) == "ok"
    assert len(set(number)) == 2
    kills = (3, 4)
    with pytest.raises(ValueError, match=r"^the process for chat templates ended with exit code -9$"):
        renderer.render("ok", MESSAGES)


@pytest.mark.parametrize(
    ("executable", "words"), [("/bin/false", "ended with exit code 1$"), ("/no/python", "cannot be started: ")]
)
def test_a_process_that_cannot_start_is_named_and_no_fault_of_the_request(monkeypatch, executable, words):
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(TemplateProcessError, match=rf"^the process for chat templates {words}"):
        TemplateRenderer(BUDGET).render("hi", MESSAGES)
