"""The judge, against a local server that behaves and misbehaves."""

import http.server
import json
import threading
import time

import pytest

from grpo_jax.rewards import judging
from grpo_jax.rewards.judging import judge


class Service:
    """A chat endpoint whose answers are what `answer(request, number)` returns: (status, body)."""

    def __init__(self, answer):
        self.requests, self.headers, self.together, self.most_together = [], [], 0, 0
        lock = threading.Lock()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.requests.append((self.path, content))
                    service.headers.append(dict(self.headers))
                    service.together += 1
                    service.most_together = max(service.most_together, service.together)
                    number = len(service.requests)
                status, body = answer(content, number)
                with lock:
                    service.together -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def grade(service, completions, **settings):
    settings = {"backoff": 0.01, "timeout": 5.0} | settings
    return judge(service.url, "tiny", **settings)(["What is 2 + 2?"] * len(completions), completions)


def test_the_reward_is_the_grade_that_the_judge_ends_with():
    def answer(request, number):
        question = request["messages"][0]["content"]
        assert "What is 2 + 2?" in question
        return says("Right, 4 of 4 points.\n10" if "four" in question else "Wrong: 2 + 2 is 4.\n2.5")

    with Service(answer) as service:
        assert grade(service, ["four", "five", "four"]) == [1.0, 0.25, 1.0]
    (path, request), *_ = service.requests
    assert path == "/v1/chat/completions"
    assert request["model"] == "tiny"
    assert request["temperature"] == 0.0


def test_the_service_is_asked_for_answers_of_a_length_and_a_temperature():
    with Service(lambda request, number: says("7")) as service:
        grade(service, ["x"])
        grade(service, ["x"], max_tokens=9, temperature=0.5)
    asked = [(request["max_tokens"], request["temperature"]) for _, request in service.requests]
    assert asked == [(512, 0.0), (9, 0.5)]


def test_questions_and_grades_may_be_ones_own_and_see_the_rows_columns():
    def ask(prompt, completion, columns):
        return f"{prompt}|{completion}|{columns['answer']}"

    with Service(lambda request, number: says(request["messages"][0]["content"])) as service:
        reward = judge(service.url, "tiny", ask=ask, parse=lambda text: float(text.split("|")[2]))
        assert reward(["p", "p"], ["a", "b"], answer=[3, 4], trainer_state=object()) == [3.0, 4.0]
        messages = [[{"role": "user", "content": "p"}]], [[{"role": "assistant", "content": "a"}]]
        assert reward(*messages, answer=[5]) == [5.0]
    assert service.requests[-1][1]["messages"][0]["content"] == "p|a|5"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Good.\n7", 0.7),
        ("I give it 3/10.", 0.3),
        ("2 errors.\nGrade: **3 out of 10**", 0.3),
        ("10/10", 1.0),
        ("Grade: 7.5", 0.75),
        ("0", 0.0),
        ("Score: -5", None),
        ("7 of 12", None),
        ("Grade: 7\n(more would be too much)", None),
        ("It has 3 errors", None),
        ("100", None),
        ("1.2.3", None),
    ],
    ids=str,
)
def test_the_grade_is_what_the_last_line_ends_with(answer, expected):
    with Service(lambda request, number: says(answer)) as service:
        assert grade(service, ["x"]) == [pytest.approx(expected) if expected is not None else None]


def test_an_answer_that_was_cut_short_is_no_grade():
    cut = {"choices": [{"message": {"content": "First, 2 errors:\n1"}, "finish_reason": "length"}]}
    with Service(lambda request, number: (200, json.dumps(cut).encode())) as service:
        assert grade(service, ["x"], retries=2) == [None]
    assert len(service.requests) == 1  # it would be cut again


@pytest.mark.parametrize("status", [429, 500, 503])
def test_asks_again_after_a_status_that_may_pass(status):
    with Service(lambda request, number: (status, b"busy") if number < 3 else says("7")) as service:
        assert grade(service, ["x"], retries=2) == [0.7]
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    "answer",
    [
        lambda request, number: (503, b"busy"),
        lambda request, number: (200, b"no json"),
        lambda request, number: (200, b'{"choices": []}'),
        lambda request, number: says("I cannot grade this."),
        lambda request, number: says("11"),
    ],
    ids=["busy", "no_json", "no_choice", "no_grade", "out_of_range"],
)
def test_what_cannot_be_graded_is_masked_and_counted(answer):
    found = {}
    with Service(answer) as service:
        reward = judge(service.url, "tiny", retries=1, backoff=0.01)
        assert reward(["p"], ["x"], log_metric=found.__setitem__) == [None]
    assert found == {"judge/failed": 1.0}


def test_each_wait_is_twice_the_one_before(monkeypatch):
    waits = []
    monkeypatch.setattr(judging.time, "sleep", waits.append)
    with Service(lambda request, number: (503, b"")) as service:
        assert grade(service, ["x"], retries=3, backoff=0.25) == [None]
    assert waits == [0.25, 0.5, 1.0]


def test_a_judge_that_hangs_is_given_up_and_one_that_is_not_there_too():
    release = threading.Event()

    def hang(request, number):
        release.wait(10)
        return says("5")

    with Service(hang) as service:
        started = time.monotonic()
        assert grade(service, ["x", "y"], timeout=0.2, retries=1) == [None, None]
        assert time.monotonic() - started < 8
        release.set()
    assert grade(service, ["x"], retries=0) == [None]  # nobody listens there any more


def test_a_request_that_is_wrong_is_an_error_and_not_a_grade():
    with (
        Service(lambda request, number: (401, b"no such key")) as service,
        pytest.raises(ValueError, match=r"/v1/chat/completions answered 401: b'no such key'"),
    ):
        grade(service, ["x"])
    assert len(service.requests) == 1


def test_no_more_requests_at_a_time_than_allowed():
    def slow(request, number):
        time.sleep(0.03)
        return says("5")

    with Service(slow) as service:
        assert grade(service, ["x"] * 12, concurrency=3) == [0.5] * 12
    assert 1 < service.most_together <= 3


def test_the_key_is_that_of_the_argument_or_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    with Service(lambda request, number: says("5")) as service:
        grade(service, ["x"])
        grade(service, ["x"], api_key="given")
        monkeypatch.delenv("OPENAI_API_KEY")
        grade(service, ["x"])
    assert [h.get("Authorization") for h in service.headers] == ["Bearer from-environment", "Bearer given", None]


@pytest.mark.parametrize("setting", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0}], ids=str)
def test_refuses_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="concurrency is at least 1, retries at least 0 and timeout above 0"):
        judge("http://localhost", "tiny", **setting)
