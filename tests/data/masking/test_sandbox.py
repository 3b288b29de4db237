"""Hostile chat templates are stopped, each with an error that names the row."""

import os

import pytest
from test_chat import CHATML, M, assistant, fails, make_tokenizer, trained, user

from sftjax.data import DataError, encode
from sftjax.data.masking import sandbox

RECORD = {M: [user("q"), assistant("a")]}


@pytest.fixture
def low_limits(monkeypatch):
    """A worker that is stopped soon, and none of it left for the other tests."""
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    monkeypatch.setattr(sandbox, "MEMORY", 1 << 30)
    monkeypatch.setattr(sandbox, "CHARACTERS", 100_000)
    sandbox._stop()
    yield
    sandbox._stop()


LOOP = "{% for a in range(99999) %}" * 5 + "{% endfor %}" * 5
ENDLESS = {
    "loops": LOOP,
    "one long operation": "{{ 9 ** (9 ** 9) }}",
    "only for some data": "{% if messages[0].content == 'q' %}" + LOOP + "{% endif %}" + CHATML,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(name, low_limits):
    with pytest.raises(DataError) as error:
        encode(RECORD, make_tokenizer(ENDLESS[name]), where="f.jsonl:7")
    expected = "the chat template was stopped: it took more than 1 s of processor time"
    assert expected in str(error.value) and "data.template=FILE" in str(error.value)
    assert str(error.value).startswith("f.jsonl:7: ") == (name == "only for some data")
    assert trained(RECORD)  # the next template gets a new process


def test_a_template_that_calls_itself_for_ever_is_refused():
    template = "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}"
    assert "the chat template failed: RecursionError" in fails(RECORD, make_tokenizer(template))


@pytest.mark.parametrize("length", [1 << 31, 1 << 36])
def test_a_template_that_fills_the_memory_is_stopped(length, low_limits):
    message = fails(RECORD, make_tokenizer("{{ 'x' * " + str(length) + " }}"))
    assert "it used more memory than a chat template is given" in message


def test_a_template_that_writes_too_much_is_stopped(low_limits):
    message = fails(RECORD, make_tokenizer("{{ 'x' * 100001 }}"))
    assert "it wrote 100,001 characters, more than 100,000" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set _ = messages.append(messages[0]) %}",
    ],
)
def test_attributes_that_are_no_template_s_business_are_refused(template):
    message = fails(RECORD, make_tokenizer(template))
    assert "the chat template failed: SecurityError" in message or "undefined" in message.lower()


def test_the_row_at_which_a_template_is_stopped_is_named(low_limits):
    template = "{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}" + CHATML
    chats = [
        dict(messages=[user(text)], tools=None, options={}, blocks=False, where=f"row {n}")
        for n, text in enumerate(("q", "bad", "r"), 1)
    ]
    with pytest.raises(DataError, match="^row 2: the chat template was stopped"):
        sandbox.render(template, {}, chats)


def test_what_is_no_plain_data_is_a_placeholder():
    chat = dict(messages=[dict(role="user", content="q", at=object())], options={})
    chats = [chat | dict(tools=None, blocks=False)]
    [result] = sandbox.render("{{ messages[0].at }}", {}, chats)
    assert result == {"text": "<object>"}


def test_a_worker_that_was_ended_is_replaced():
    assert trained(RECORD)
    worker = sandbox._workers[os.getpid()]
    worker.kill()
    worker.wait()
    assert trained({M: [user("other"), assistant("b")]})


def test_a_worker_that_can_not_start_is_no_fault_of_the_template(low_limits, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(sandbox, "WORKER", tmp_path / "broken.py")
    with pytest.raises(RuntimeError, match="broken.py ended with code 3"):
        encode(RECORD, make_tokenizer(CHATML + " "))
