"""The settings of scripts for inference servers."""

import dataclasses

import pytest

from grpo_jax import sampling
from grpo_jax.run.serving import ServerSettings
from grpo_jax.testing import tiny_tokenizer

STOP = sampling.stop_strings(tiny_tokenizer(259), ("end",))
SAMPLER = sampling.sampler(group_size=3, max_tokens=5, eos_ids=(1, 2), temperature=0.8, stop=STOP)
GIVEN = {"stop": ("end",), "model": "tiny", "tokenizer": None, "folder": "engine"}


def test_without_a_server_the_sampler_is_itself():
    assert ServerSettings().serve(SAMPLER, **GIVEN) is SAMPLER


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_draws_under_the_settings_of_the_sampler(kind):
    made = ServerSettings(server="http://localhost:1", server_kind=kind).serve(SAMPLER, max_lag=2, **GIVEN)
    assert (made.group_size, made.max_tokens, made.eos_ids, made.temperature) == (3, 5, (1, 2), 0.8)
    assert (made.stop, made.max_lag, made.server.url, made.on_host) == (("end",), 2, "http://localhost:1", True)
    drawing = {"group_size": 1, "max_tokens": 5, "temperature": 0.8, "seed": 0, "stop": [], "eos_ids": [1]}
    drawing |= {"top_p": None, "top_k": None, "min_p": None}
    route, content = made.server.generate([7], drawing, None)
    assert route == {"vllm": "/v1/completions", "sglang": "/generate"}[kind]
    assert content.get("model") == {"vllm": "tiny", "sglang": None}[kind]


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"server_model": "tiny"}, {}, "are of a --server"),
        ({"server_kind": "sglang"}, {}, "are of a --server"),
        ({"server": "http://localhost:1", "server_kind": "sglang"}, {"top_p": 0.9}, "not under top_k"),
        ({"server": "http://localhost:1"}, {"record_experts": True}, "do not tell the experts"),
        ({"server": "http://localhost:1"}, {"slots": 2}, "has slots of its own: leave out --slots 2"),
        ({"server": "localhost:1"}, {}, "begins with http"),
    ],
)
def test_what_cannot_be_is_refused(settings, changes, message):
    drawing = dataclasses.replace(SAMPLER, **changes)
    with pytest.raises(ValueError, match=message):
        ServerSettings(**settings).serve(drawing, **GIVEN)
    with pytest.raises(ValueError, match="are of a --server"):
        ServerSettings().serve(SAMPLER, max_lag=1, **GIVEN)
