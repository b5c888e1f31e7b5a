"""The client of OpenAI-compatible servers, against a server that behaves."""

import asyncio
import math

import pytest

from tests.backends.asking import (
    QUESTION,
    answered,
    asked,
    during,
    failed,
    most_tokens,
    with_stub,
)
from tests.backends.stub_server import Reply, StubServer
from thrifty.backends.backend import Answered, Asking, AskingFailed
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.retries import Retries
from thrifty.core.budget import Cost
from thrifty.costs.flops import decode_flops

# -- a server that behaves ------------------------------------------------------------------------


def test_a_question_is_answered_and_its_tokens_are_counted():
    outcome, stub, endpoint = asked([Reply(texts=("it is 42",))], key_variable="")
    assert [c.text for c in outcome.completions] == ["it is 42"]
    assert outcome.completions[0].ended
    assert outcome.completions[0].tokens == 3
    assert outcome.trusted
    assert outcome.cost.tokens == 5 + 3
    assert outcome.cost.flops == 0
    assert outcome.cost.dollars is None
    assert 0 < outcome.cost.seconds < 5
    assert endpoint.notes == ()
    [request] = stub.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert "authorization" not in request.headers
    assert request.json == {
        "model": "m",
        "messages": [{"role": "user", "content": "what is 6 x 7"}],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_p": 1.0,
    }


def test_everything_that_is_asked_for_is_sent():
    asking = Asking(
        prompt=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "6 x 7"}],
        count=3,
        max_tokens=9,
        temperature=0.0,
        top_p=0.9,
        stop=("\n", "Q:"),
        seed=5,
        settings={"top_k": 4, "temperature": 0.3},
    )
    outcome, stub, _ = asked([Reply()], asking, fields={"min_p": 0.1, "top_p": None})
    assert len(outcome.completions) == 3
    sent = stub.requests[0].json
    assert sent["messages"] == list(asking.prompt)
    assert (sent["n"], sent["max_tokens"], sent["seed"]) == (3, 9, 5)
    assert (sent["stop"], sent["top_k"], sent["temperature"]) == (["\n", "Q:"], 4, 0.3)
    assert sent["min_p"] == 0.1
    assert "top_p" not in sent


def test_a_beginning_is_continued():
    asking = Asking(prompt="6 x 7?", prefix="It is 4")
    _, stub, _ = asked([Reply(texts=("2",))], asking)
    sent = stub.requests[0].json
    assert sent["messages"][-1] == {"role": "assistant", "content": "It is 4"}
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False
    outcome, stub, _ = asked([Reply(texts=("2",))], asking, kind="completions")
    assert stub.requests[0].path == "/v1/completions"
    assert stub.requests[0].json["prompt"] == "6 x 7?It is 4"
    assert outcome.completions[0].text == "2"
    assert outcome.trusted


def test_messages_are_not_put_to_text_completions():
    asking = Asking(prompt=[{"role": "user", "content": "6 x 7"}])
    assert "takes a text" in str(failed([Reply()], asking, kind="completions"))


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_confidence_is_the_mean_log_probability(kind):
    outcome, stub, _ = asked([Reply(logprob=-0.25)], kind=kind, logprobs=True)
    assert outcome.completions[0].confidence == pytest.approx(math.exp(-0.25))
    assert stub.requests[0].json["logprobs"]
    assert answered([Reply()], kind=kind, logprobs=True).completions[0].confidence is None
    assert answered([Reply(logprob=math.nan)], logprobs=True).completions[0].confidence is None
    assert answered([Reply(logprob=3.0)], logprobs=True).completions[0].confidence is None


def test_prices_and_flops_are_charged_by_the_token(shape):
    usage = {"prompt_tokens": 7, "completion_tokens": 12}
    cost = answered([Reply(usage=usage)], prompt_price=3, completion_price=15, shape=shape).cost
    assert cost.dollars == pytest.approx((7 * 3 + 12 * 15) / 1e6)
    assert cost.flops == decode_flops(shape, 1, 7, 12)
    assert cost.joules is None
    three = answered([Reply(usage=usage)], Asking(prompt="x", count=3, max_tokens=9), shape=shape)
    once, first = decode_flops(shape, 1, 7, 4), decode_flops(shape, 1, 7, 1)
    assert three.cost.flops == pytest.approx(3 * once - 2 * first)
    assert three.cost.dollars is None
    assert answered([Reply()], prompt_price=3).cost.dollars is None


def test_free_is_not_unknown():
    assert answered([Reply()], prompt_price=0, completion_price=0).cost.dollars == 0


def test_an_answer_that_was_cut_off_says_so():
    assert not answered([Reply(finish_reason="length")]).completions[0].ended


def test_tokens_of_several_completions_add_up_to_what_was_told():
    texts = ("a b c d e f", "a", "")
    outcome = answered([Reply(texts=texts)], Asking(prompt="x", count=3, max_tokens=8))
    tokens = [c.tokens for c in outcome.completions]
    assert sum(tokens) == pytest.approx(7)
    assert tokens[0] > tokens[1] > tokens[2] > 0


def test_upper_holds_for_the_most_that_can_be_told(shape):
    asking = Asking(prompt="what is 6 x 7", count=3, max_tokens=16)
    for lost in (0, 1, 2):
        retries = Retries(lost=lost, first_wait_seconds=0.001)
        options = dict(prompt_price=1, completion_price=2, shape=shape, retries=retries)
        endpoint = Endpoint("http://localhost:1", "m", **options)
        most = most_tokens(endpoint, asking) - 48
        usage = {"prompt_tokens": int(most), "completion_tokens": 48}
        for choices in (1, 2, 3, 7):
            script = [Reply(usage=usage, choices=choices), Reply()]
            outcome, _, _ = asked(script, asking, **options)
            assert outcome.trusted


# -- how many completions came --------------------------------------------------------------------


def test_more_completions_than_asked_for_are_left():
    asking = Asking(prompt="x", count=2, max_tokens=9)
    outcome, stub, _ = asked([Reply(choices=7, texts=("a", "b", "c"))], asking)
    assert [c.text for c in outcome.completions] == ["a", "b"]
    assert len(stub.requests) == 1


def test_missing_completions_are_asked_for_again_under_other_seeds():
    asking = Asking(prompt="x", count=5, max_tokens=9, seed=10)
    outcome, stub, endpoint = asked([Reply(choices=2), Reply(choices=2), Reply()], asking)
    assert len(outcome.completions) == 5
    assert outcome.trusted
    assert [(r.json.get("n", 1), r.json["seed"]) for r in stub.requests] == [
        (5, 10),
        (3, 12),
        (1, 14),
    ]
    assert outcome.cost.tokens == 3 * 1 + 5 * 4
    assert endpoint.notes == ()


def test_a_server_that_gives_one_each_is_asked_so():
    asking = Asking(prompt="x", count=3, max_tokens=9, seed=0)

    async def twice(endpoint: Endpoint) -> list[Answered]:
        return [await endpoint.ask(asking), await endpoint.ask(asking)]

    outcomes, stub, endpoint = with_stub([Reply(choices=1)], twice)
    assert [len(outcome.completions) for outcome in outcomes] == [3, 3]
    assert [r.json.get("n", 1) for r in stub.requests] == [3, 1, 1, 1, 1, 1]
    assert [r.json["seed"] for r in stub.requests] == [0, 1, 2, 0, 1, 2]
    assert "one completion a request" in endpoint.notes[0]


def test_a_server_that_counts_one_of_several_is_charged_its_most_and_asked_for_each():
    asking = Asking(prompt="x", count=3, max_tokens=9, seed=0)

    async def twice(endpoint: Endpoint) -> list[Answered]:
        return [await endpoint.ask(asking), await endpoint.ask(asking)]

    of_one = Reply(usage={"prompt_tokens": 5, "completion_tokens": 4})
    (first, second), stub, endpoint = with_stub([of_one], twice)
    assert [r.json.get("n", 1) for r in stub.requests] == [3, 1, 1, 1]
    assert not first.trusted
    assert first.cost.tokens > 3 * 9
    assert second.trusted
    assert second.cost.tokens == 3 * (5 + 4)
    assert "does not count all completions" in endpoint.notes[0]


def test_a_prompt_that_cannot_be_is_no_reason_to_ask_for_each():
    asking = Asking(prompt="x", count=3, max_tokens=9)

    async def twice(endpoint: Endpoint) -> list[Answered]:
        return [await endpoint.ask(asking), await endpoint.ask(asking)]

    absurd = Reply(usage={"prompt_tokens": 10**6, "completion_tokens": 12})
    outcomes, stub, endpoint = with_stub([absurd], twice)
    assert [r.json["n"] for r in stub.requests] == [3, 3]
    assert not any(outcome.trusted for outcome in outcomes)
    assert "raise template_tokens" in endpoint.notes[0]


def test_fewer_completions_come_where_more_were_not_held_for():
    asking = Asking(prompt="word " * 400, count=9, max_tokens=4)
    usage = {"prompt_tokens": 2000, "completion_tokens": 4}
    outcome, stub, _ = asked([Reply(choices=1, usage=usage)], asking)
    assert 1 < len(outcome.completions) < 9
    assert len(stub.requests) == len(outcome.completions)


def test_what_there_is_comes_back_when_the_rest_fails():
    asking = Asking(prompt="x", count=3, max_tokens=9)
    outcome, _, _ = asked([Reply(choices=1), Reply(status=401)], asking)
    assert len(outcome.completions) == 1
    assert outcome.trusted
    outcome, _, endpoint = asked(
        [Reply(choices=1), Reply(cut=3)], asking, retries=Retries(attempts=1)
    )
    assert len(outcome.completions) == 1
    assert not outcome.trusted
    assert outcome.cost.tokens == 5 + most_tokens(endpoint, Asking(prompt="x", max_tokens=9))


def test_numbers_and_names_of_replies_may_be_anything():
    choices = [{"index": 0, "message": {"content": text}} for text in "ab"]
    reply = Reply(body={"id": "same", "model": "other\x1b[31m", "choices": choices})

    async def twice(endpoint: Endpoint) -> list[str]:
        asking = Asking(prompt="x", count=2)
        both = [await endpoint.ask(asking), await endpoint.ask(asking)]
        return [c.text for outcome in both for c in outcome.completions]

    texts, _, endpoint = with_stub([reply], twice)
    assert texts == ["a", "b", "a", "b"]
    assert any("'other\\\\x1b[31m' answers" in note for note in endpoint.notes)


def test_notes_are_bounded():
    names = iter(range(1000))

    async def often(endpoint: Endpoint) -> None:
        for _ in range(60):
            await endpoint.ask(QUESTION)

    _, _, endpoint = with_stub(lambda _: Reply(model=f"name {next(names)} {'x' * 999}"), often)
    assert len(endpoint.notes) == 20
    assert max(map(len, endpoint.notes)) < 300


# -- what cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asking",
    [
        Asking(prompt="x", count=0),
        Asking(prompt="x", max_tokens=0),
        Asking(prompt="half \ud800"),
        *(Asking(prompt=wrong) for wrong in (None, 7, ["x"], [None], [{"role": object()}])),
        Asking(prompt="x", temperature=math.nan),
        Asking(prompt="x", settings={"top_k": object()}),
        *(Asking(prompt="x", settings={name: 10**6}) for name in ("n", "max_tokens", "stream")),
    ],
)
def test_what_cannot_be_sent_is_a_failure_before_anything_is_sent(asking):
    failure, stub, _ = asked([Reply()], asking)
    assert str(failure)
    assert failure.cost == Cost()
    assert stub.requests == []


@pytest.mark.parametrize(
    "options",
    [
        dict(concurrency=0),
        dict(timeout_seconds=0),
        dict(prompt_price=-1),
        dict(completion_price=math.nan),
        dict(kind="talk"),
        dict(limit_name="n"),
        dict(fields={"n": 5}),
    ],
)
def test_a_wrong_option_is_refused(options):
    with pytest.raises(ValueError, match="hint: "):
        Endpoint("http://localhost:1", "m", **options)


def test_another_name_for_the_limit():
    asking = Asking(prompt="x", max_tokens=7)
    _, stub, _ = asked(
        [Reply()], asking, limit_name="max_completion_tokens", fields={"temperature": None}
    )
    assert stub.requests[0].json["max_completion_tokens"] == 7
    assert not {"max_tokens", "temperature"} & stub.requests[0].json.keys()


# -- many at a time -------------------------------------------------------------------------------


def test_no_more_than_allowed_are_asked_at_a_time():
    async def many(endpoint: Endpoint) -> list[Answered]:
        return await asyncio.gather(*(endpoint.ask(QUESTION) for _ in range(40)))

    outcomes, stub, _ = with_stub([Reply(delay=0.02)], many, concurrency=4)
    assert len(outcomes) == 40
    assert stub.most_at_once == 4


def test_who_is_cancelled_leaves_and_others_go_on():
    slow = lambda request: Reply(delay=5.0 if "slow" in request.prompt else 0.0)  # noqa: E731

    async def cancelling(endpoint: Endpoint) -> Answered:
        task = asyncio.create_task(endpoint.ask(Asking(prompt="slow")))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await endpoint.ask(QUESTION)

    outcome, stub, _ = with_stub(slow, cancelling, concurrency=1)
    assert outcome.trusted
    assert [request.dropped for request in stub.requests] == [True, False]


def test_an_endpoint_lives_through_several_event_loops():
    with StubServer() as stub:
        endpoint = Endpoint(stub.url, "m")

        async def ask() -> Answered:
            outcome = await endpoint.ask(QUESTION)
            await endpoint.close()
            return outcome

        assert all(asyncio.run(ask()).trusted for _ in range(3))


# -- what is there --------------------------------------------------------------------------------


def test_the_models_of_a_server_are_listed():
    with StubServer(models=("a", "b")) as stub:
        endpoint = Endpoint(stub.url, "a")

        async def look() -> list[str]:
            found = await endpoint.models()
            await endpoint.close()
            return found

        assert asyncio.run(look()) == ["a", "b"]
        assert stub.requests[0].path == "/v1/models"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=404, body=b"<html>not here</html>"),
        Reply(status=401),
        Reply(body=b"<html>"),
        Reply(body={"data": {}}),
        Reply(body=b"x" * 2**20, repeat=64),
        Reply(delay=9),
        Reply(cut=-1),
    ],
)
def test_a_server_that_is_none_is_told(reply):
    async def look(endpoint: Endpoint) -> None:
        with pytest.raises(AskingFailed, match=r"m at http://127.*(?s:.*)\nhint: "):
            await endpoint.models()

    during(lambda _: reply, look, timeout_seconds=0.5)
