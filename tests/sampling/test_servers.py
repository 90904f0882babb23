"""Servers as samplers, against one that speaks vLLM's and SGLang's routes and draws with the sampler of the package."""

import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_server import serving

from grpo_jax import data, sampling
from grpo_jax.data import make_prompts
from grpo_jax.environments import Turn
from grpo_jax.freezing import bind, partition
from grpo_jax.models import hf, lora
from grpo_jax.run import measured
from grpo_jax.sampling import servers
from grpo_jax.scoring import score
from grpo_jax.statistics import summary
from grpo_jax.study.evaluation import make_mean_rewards
from grpo_jax.testing import random_prompts, tiny_policy, tiny_tokenizer
from grpo_jax.types import Experience

POLICY = tiny_policy("llama")
G, T, TEMPERATURE, EOS = 2, 8, 0.7, (1, *range(5, 20))
PROMPTS = random_prompts(0, 2, 6)


@pytest.fixture
def engine():
    with serving(POLICY, group_size=G, max_tokens=2 * T) as server:
        yield server


def server_of(kind, engine, **settings):
    return (
        servers.vllm(engine.url, model="tiny", **settings) if kind == "vllm" else servers.sglang(engine.url, **settings)
    )


def sampler_of(server, folder, write=hf.save_pretrained, **changes):
    settings = {"group_size": G, "max_tokens": T, "eos_ids": EOS, "backoff": 0.01}
    return servers.engine_sampler(server, write=write, folder=folder, **(settings | changes))


PARAMS = jax.jit(POLICY.init)(jax.random.key(0))


def copied():
    """Params that a server does not have yet."""
    return jax.tree.map(jnp.copy, PARAMS)


def gap(rollout, params, temperature=1.0):
    """The largest difference of the server's log-probs to those of the params; `sampler_kl` tells of the same."""
    scored = score(POLICY, params, rollout, temperature=temperature).log_probs
    _, metrics = measured.sampler_gap()(Experience(rollout, old_log_probs=scored))
    found = summary(metrics)
    mean = np.mean((rollout.log_probs - scored)[np.asarray(rollout.mask)])
    np.testing.assert_allclose(found["sampler_kl"], mean, atol=1e-6)
    return float(found["sampler_gap_max"])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_server_draws_from_the_params_that_it_was_given_and_lags_at_most_as_told(kind, engine, tmp_path):
    (tmp_path / "version_1_killed").mkdir()
    made = sampler_of(server_of(kind, engine), tmp_path, max_lag=1, temperature=TEMPERATURE)
    versions = [jax.tree.map(lambda x, n=n: x * (1 + 0.3 * n), PARAMS) for n in range(3)]
    rollouts = [made(POLICY, params, PROMPTS, jax.random.key(n)) for n, params in enumerate(versions)]
    for n, has in enumerate((0, 0, 2)):  # it is given the first and the third
        assert gap(rollouts[n], versions[has], TEMPERATURE) < 1e-4
        assert n == has or gap(rollouts[n], versions[n], TEMPERATURE) > 0.01
    (folder,) = tmp_path.iterdir()  # that of a killed run has gone
    assert folder.name.startswith("version_2_")
    assert (rollouts[0].tokens[:, 0] != rollouts[0].tokens[:, 1]).any(-1).all()  # a group differs
    assert jax.eval_shape(lambda: made.blank(POLICY, None, PROMPTS, None)) == jax.eval_shape(lambda: rollouts[0])
    for rollout in rollouts:
        last = jnp.take_along_axis(rollout.tokens, rollout.lengths[..., None] - 1, axis=-1)[..., 0]
        np.testing.assert_array_equal(rollout.truncated, ~jnp.isin(last, jnp.array(EOS)))
    assert (rollouts[0].tokens != rollouts[1].tokens).any()  # other seeds
    drawing = [one for _, content in engine.asked for one in content.get("sampling_params", [content])]
    settings = [one for one in drawing if "temperature" in one]
    # What is left out a server takes from the model's generation_config.json, or from its own command line.
    told = {"stop_token_ids": list(EOS), "top_p": 1.0, "min_p": 0.0, "stop": [], "skip_special_tokens": False}
    told |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    told |= {"min_tokens": 0, "watermarking": False} if kind == "vllm" else {"min_new_tokens": 0}
    assert all(told.items() <= one.items() for one in settings)
    # The log-probs of vLLM are looked at once, by the likeliest tokens.
    by_kind = [(one["temperature"], one["top_k"]) for one in settings]
    probes = 2 if kind == "vllm" else 0
    assert by_kind[:probes] == [(TEMPERATURE, 1)] * probes
    assert {*by_kind[probes:]} == {(TEMPERATURE, -1)}
    prompts = [content.get("prompt") or content.get("input_ids", [None])[0] for _, content in engine.asked]
    assert np.asarray(PROMPTS.tokens)[0, : int(PROMPTS.lengths[0])].tolist() in prompts


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_adapters_go_to_the_server_as_a_folder_of_peft(kind, engine, tmp_path):
    adapters, base = lora.adapt(POLICY, PARAMS, rank=2, alpha=4.0, key=jax.random.key(1))
    engine.base = engine.weights[None] = PARAMS

    def write(policy, params, folder):
        hf.save_adapters(policy, *partition(params, "^(?!.*lora_[ab]$)"), folder, base_model="tiny")

    made = sampler_of(server_of(kind, engine, adapters=True), tmp_path, write)
    for n in range(2):
        params = bind(jax.tree.map(lambda x, n=n: x + 0.05 * (n + 1), adapters), base)
        assert gap(made(POLICY, params, PROMPTS, jax.random.key(0)), params) < 1e-4
    (folder,) = pathlib.Path(tmp_path).iterdir()
    assert set(engine.weights) == {None, folder.name}
    assert (folder / "adapter_config.json").exists()
    # A run that is resumed meets a server that has the adapters of the one before.
    resumed = sampler_of(server_of(kind, engine, adapters=True), tmp_path, write)
    assert gap(resumed(POLICY, params, PROMPTS, jax.random.key(0)), params) < 1e-4
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_holds_conversations(kind, engine, tmp_path):
    """What the environment says is read by the server with all tokens so far, and is masked."""
    tokenizer = tiny_tokenizer(259)  # bytes
    rows = [{"prompt": "ab"}, {"prompt": "c"}]
    prompts = make_prompts([[20, 30], [40, 3]], rows=[0, 1])
    asked = []

    def respond(row, messages):
        asked.append(len(messages))
        return Turn("!" * 3, reward=0.5)

    def as_ids(messages, last):
        return [7, 8, 9]

    made = sampler_of(server_of(kind, engine), tmp_path, max_tokens=2 * T)
    talking = sampling.conversations(made, respond, tokenizer, rows, max_turns=3, between=as_ids)
    rollout = talking(POLICY, PARAMS, prompts, jax.random.key(0))
    assert gap(rollout, PARAMS) < 1e-4
    ends = np.asarray(rollout.turns.ends)
    assert (ends[..., 1] > 0).sum() >= 2
    assert 6 in asked or 4 in asked
    for place in np.ndindex(2, G):
        length, tokens, mask = (np.asarray(x[place]) for x in (rollout.lengths, rollout.tokens, rollout.mask))
        assert length == ends[place].max() <= 2 * T
        for end in ends[place][ends[place] > 0]:
            if end < length:
                assert tokens[end : end + 3].tolist() == [7, 8, 9]
                assert not mask[end : end + 3].any()
                assert mask[end - 1]
                assert mask[end + 3]
    assert sum(path == ("/v1/completions" if kind == "vllm" else "/generate") for path, _ in engine.asked) >= 6


@pytest.mark.parametrize("late", [0, 2], ids=["at once", "late"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_strings_end_completions_with_the_token_that_completes_them(kind, late, engine, tmp_path):
    """Also where the server returns tokens after it."""
    tokenizer = tiny_tokenizer(259)  # bytes
    engine.text, engine.late = tokenizer.decode, late
    made = sampler_of(server_of(kind, engine), tmp_path)
    free = jax.device_get(made(POLICY, PARAMS, PROMPTS, jax.random.key(0)))
    drawn = [token for token in free.tokens[free.mask].tolist() if token not in EOS]
    string = tokenizer.decode([max(drawn, key=drawn.count)])
    stopping = sampler_of(
        server_of(kind, engine), tmp_path, stop=(string,), stop_table=sampling.stop_strings(tokenizer, (string,))
    )
    rollout = jax.device_get(stopping(POLICY, PARAMS, PROMPTS, jax.random.key(0)))
    stopped = 0
    for place in np.ndindex(2, G):
        whole = free.tokens[place][: free.lengths[place]].tolist()
        end = next((n for n in range(1, len(whole) + 1) if string in tokenizer.decode(whole[:n])), None)
        assert rollout.tokens[place][: rollout.lengths[place]].tolist() == whole[:end]
        assert rollout.truncated[place] == (end is None and free.truncated[place])
        stopped += end is not None
    assert stopped > 0


def test_an_adapter_that_a_lost_answer_told_of_is_not_loaded_again(engine, tmp_path):
    made = sampler_of(servers.vllm(engine.url, model="tiny", adapters=True), tmp_path, lambda *given: None)
    engine.faults = [(503, {}), (400, {"error": "The lora adapter has already been loaded"})]
    params = copied()
    made.refresh(POLICY, params)
    made.refresh(POLICY, {**params})
    assert made.given["version"] == 1
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    del params
    assert not any(leaf() is not None for leaf in held)  # no second model stays in memory
    engine.faults = [(400, {"error": "The lora adapter has already been loaded"})]
    with pytest.raises(RuntimeError, match="already been loaded"):  # by somebody else
        made.refresh(POLICY, copied())


def test_requests_that_fail_are_sent_again_and_answers_that_cannot_be_used_are_told(engine, tmp_path, monkeypatch):
    made = sampler_of(server_of("vllm", engine), tmp_path, retries=1)
    engine.faults = [(503, {"error": "starting"})]
    made(POLICY, copied(), PROMPTS, jax.random.key(0))
    again = sampler_of(server_of("vllm", engine), tmp_path, retries=1)
    engine.faults = [(404, {"error": "no such route"})]
    with pytest.raises(RuntimeError, match=r"/collective_rpc: status 404.*no such route"):
        again(POLICY, copied(), PROMPTS, jax.random.key(0))
    engine.faults = [(200, {})] * 3 + [(200, {"choices": [{"text": "hello"}]})] * 2
    with pytest.raises(RuntimeError, match=r"no whole completions with token ids and log-probs \(KeyError"):
        again(POLICY, copied(), PROMPTS, jax.random.key(0))
    choice = {"index": 0, "token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}
    engine.faults = [(200, {})] * 3 + [(200, {"choices": [choice]})] * 2
    with pytest.raises(RuntimeError, match="a completion ended by 'abort', and not by stop or length"):
        again(POLICY, copied(), PROMPTS, jax.random.key(0))
    monkeypatch.setattr(servers, "ANSWER_LIMIT", 1000)
    engine.faults = [(200, "x" * 2000)] * 2
    with pytest.raises(RuntimeError, match="the answer has more than 1000 bytes"):
        again(POLICY, copied(), PROMPTS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"call `step\.collect` without jit"):
        jax.jit(lambda params: made(POLICY, params, PROMPTS, jax.random.key(0)))(PARAMS)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    talking = sampling.conversations(made, lambda row, messages: None, tiny_tokenizer(259), [], max_turns=2)
    for drawing in (made, talking):
        with pytest.raises(ValueError, match="by one process, and this run has 2: use the devices of one"):
            drawing(POLICY, PARAMS, make_prompts([[20, 30]], rows=[0]), jax.random.key(0))


def drawn_once(server, folder, talks):
    """A completion of a prompt of two tokens, or a conversation that begins with them."""
    made = sampler_of(server, folder, lambda *given: None, group_size=1)
    if talks:
        rows, tokenizer = [{"prompt": "ab"}], tiny_tokenizer(259)
        made = sampling.conversations(made, lambda row, messages: None, tokenizer, rows, max_turns=2)
    return made(POLICY, PARAMS, make_prompts([[20, 30]], rows=[0]), jax.random.key(0))


@pytest.mark.parametrize("settings", [{"temperature": TEMPERATURE}, {"top_p": 0.9}], ids=["temperature", "top_p"])
def test_log_probs_before_the_temperature_are_refused(settings, engine, tmp_path):
    """Those of vLLM are, unless `--logprobs-mode processed_logprobs` was given, and nothing in an answer says so."""
    engine.raw = True
    made = sampler_of(server_of("vllm", engine), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"before the temperature, which is .* --logprobs-mode processed_logprobs"):
        made(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    plain = sampler_of(server_of("vllm", engine), tmp_path)  # at 1 both are the same
    assert gap(plain(POLICY, PARAMS, PROMPTS, jax.random.key(0)), PARAMS) < 1e-4


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_end_of_the_servers_own_is_ignored_or_told(kind, engine, tmp_path):
    """As `<|eom_id|>` of Llama 3 in SGLang, and whatever `generation_config.json` names in both."""
    engine.ends = tuple(range(40, 259))
    made = sampler_of(server_of(kind, engine), tmp_path)
    if kind == "vllm":
        rollout = jax.device_get(made(POLICY, PARAMS, PROMPTS, jax.random.key(0)))
        begins_so = np.isin(rollout.tokens[..., 0], engine.ends)
        assert begins_so.any()
        assert (rollout.lengths[begins_so] > 1).all()
        return
    with pytest.raises(RuntimeError, match="the server has an end of its own, which belongs to eos_ids, too"):
        made(POLICY, PARAMS, PROMPTS, jax.random.key(0))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_was_started_again_is_told_by_the_name_of_its_weights(kind, engine, tmp_path):
    made = sampler_of(server_of(kind, engine), tmp_path)
    made(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    engine.version = None
    with pytest.raises(RuntimeError, match=r"drawn by the weights default, and not by version_1_.*started again"):
        made(POLICY, PARAMS, PROMPTS, jax.random.key(0))


def test_a_cache_that_was_not_emptied_is_not_drawn_with(engine, tmp_path):
    """The answer of vLLM is 200 and `success: false` while blocks are held; what they hold is of the weights before."""
    made = sampler_of(server_of("vllm", engine), tmp_path, retries=1)
    made(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    engine.faults = [(200, {"results": [None]}), (200, {"success": False})]
    made(POLICY, copied(), PROMPTS, jax.random.key(0))
    assert [path for path, _ in engine.asked].count("/reset_prefix_cache") == 3
    engine.faults = [(200, {"results": [None]}), (200, {"success": False}), (200, {"success": False})]
    with pytest.raises(RuntimeError, match=r"/reset_prefix_cache: status 200.*false"):
        made(POLICY, copied(), PROMPTS, jax.random.key(0))


def test_a_vllm_that_knows_no_versions_of_weights_is_served_without(engine, tmp_path):
    made = sampler_of(server_of("vllm", engine), tmp_path)
    choice = {"index": 0, "token_ids": [3, 1], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}
    choices = [choice | {"index": n} for n in range(G)]
    engine.faults = [(200, ""), (200, ""), (404, {"detail": "Not Found"})] + [(200, {"choices": choices})] * 2
    rollout = made(POLICY, copied(), PROMPTS, jax.random.key(0))
    assert rollout.log_probs[..., :2].sum() == -3.0 * G * 2


WRONG = {
    "NaN": ({"log_probs": [-1.0, float("nan")]}, "has the log-prob nan"),
    "no log-prob": ({"log_probs": [None, -1.0]}, "None is no log-prob"),
    "a probability": ({"log_probs": [0.5, 0.5]}, "has the log-prob 0.5"),
    "tokens after the end": ({"tokens": [1, 3]}, "goes on after its end-of-sequence token 1"),
    "text for a token": ({"tokens": ["3", 1]}, "'3' is no token id"),
    "a token below 0": ({"tokens": [-1, 1]}, "-1 is no token id"),
    "another prompt": ({"prompt_tokens": 3}, "read 3 tokens for a prompt of 2, or others: it cuts prompts"),
    "another token": ({"prompt": [20, 31]}, "for a prompt of 2, or others"),
    "an end of its own": ({"tokens": [3, 30]}, "ended with the token 30 .*, which is none of the end tokens"),
    "a fault": ({"by": "NaN happened"}, "by 'NaN happened'.*, which is none of the end tokens"),
    "a short context": ({"tokens": [3, 30], "end": "length"}, "of 2 tokens, cut, where 8 were left: is the context"),
    "too many completions": ({"count": 2}, "2 completions in place of 1"),
}


@pytest.mark.parametrize(
    ("wrong", "kind", "talks"),
    [
        *((wrong, "vllm", True) for wrong in (None, *WRONG)),
        *((wrong, "sglang", True) for wrong in (None, "NaN", "text for a token", "another prompt", "a fault")),
        *((wrong, "vllm", False) for wrong in (None, "no log-prob", "a token below 0", "another prompt")),
        *((wrong, "sglang", False) for wrong in ("an end of its own", "a short context")),
    ],
)
def test_completions_that_cannot_be_the_policys_are_refused(wrong, kind, talks, engine, tmp_path):
    change, message = WRONG[wrong] if wrong else ({}, "")
    given = {"tokens": [3, 1], "log_probs": [-1.0, -2.0], "prompt_tokens": 2, "count": 1, "end": "stop"}
    given |= {"prompt": [20, 30], "by": None} | change
    if kind == "vllm":
        one = {"token_ids": given["tokens"], "logprobs": {"token_logprobs": given["log_probs"]}}
        one |= {"finish_reason": given["end"], "stop_reason": given["by"], "prompt_token_ids": given["prompt"]}
        choices = [one | {"index": n} for n in range(given["count"])]
        faults = [{}, {}, {}, {"choices": choices, "usage": {"prompt_tokens": given["prompt_tokens"]}}]
    else:
        pairs = [[value, token, None] for value, token in zip(given["log_probs"], given["tokens"], strict=True)]
        meta = {"output_token_logprobs": pairs, "finish_reason": {"type": given["end"], "matched": given["by"]}}
        faults = [{}, [{"meta_info": meta | {"prompt_tokens": given["prompt_tokens"]}}] * given["count"]]
    engine.faults = [(200, answer) for answer in faults]  # to the weights, too
    if wrong is None:
        rollout = jax.device_get(drawn_once(server_of(kind, engine), tmp_path, talks))
        assert rollout.tokens[0, 0].tolist() == [3, 1, *[0] * (T - 2)]
        assert rollout.log_probs[0, 0].tolist() == [-1.0, -2.0, *[0] * (T - 2)]
        return
    with pytest.raises((ValueError, RuntimeError), match=message):
        drawn_once(server_of(kind, engine), tmp_path, talks)


@pytest.mark.parametrize("talks", [False, True], ids=["completions", "conversations"])
def test_a_log_prob_too_few_is_told(talks, engine, tmp_path):
    """NumPy would take a single one for all tokens of a turn."""
    choice = {"index": 0, "token_ids": [3, 1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}
    engine.faults = [(200, {})] * 3 + [(200, {"choices": [choice]})] * 2
    with pytest.raises(RuntimeError, match="2 tokens and 1 log-probs"):
        drawn_once(server_of("vllm", engine), tmp_path, talks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_lag": -1}, "max_lag and retries"),
        ({"temperature": 0}, "temperatures from 0.01 to 2.0"),
        ({"temperature": 0.001}, r"temperatures from 0.01 to 2.0, got temperature = 0.001"),
        ({"temperature": 2.5}, "temperatures from 0.01 to 2.0"),
        ({"stop": ("end",)}, "with stop_table=stop_strings"),
        ({"timeout": 0}, "timeout above 0"),
        ({"top_p": 2.0}, "top_p is above 0 and at most 1, got 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sampler_of(servers.sglang("http://localhost:1"), tmp_path, **changes)
    with pytest.raises(ValueError, match="begins with http"):
        sampler_of(servers.sglang("localhost:1"), tmp_path)


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_truncation_that_the_log_probs_of_sglang_do_not_know_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="the server's log-probs are not under top_k"):
        sampler_of(servers.sglang("http://localhost:1"), tmp_path, **changes)
    server = servers.vllm("http://localhost:1", model="tiny")
    assert sampler_of(server, tmp_path, **changes).truncation is not None
    if "top_k" not in changes:
        with pytest.raises(ValueError, match="vLLM keeps by min_p before top_p, and a step the other way round"):
            sampler_of(server, tmp_path, **({"top_p": 0.9, "min_p": 0.1} | changes))


@pytest.mark.parametrize("group_size", [None, G])
def test_an_evaluation_is_of_the_params_that_it_is_given_and_gives_them_once(group_size, engine, tmp_path):
    """Whatever the lag of the run's sampler, which then has them, too."""
    made = sampler_of(server_of("vllm", engine), tmp_path, max_lag=3)
    made(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    tokenizer, rows = tiny_tokenizer(259), [{"prompt": "ab"}, {"prompt": "c"}, {"prompt": "d"}]
    ids = [[20, 30], [40, 3], [7, 8]]
    seen = []

    def length(completions):
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    newer = jax.tree.map(lambda x: 1.5 * x, PARAMS)
    evaluate = make_mean_rewards(
        POLICY, made, tokenizer, data.PromptSet(rows, ids), [length], group_size=group_size, batch_size=2
    )
    first, again = evaluate(newer, None), evaluate(newer, None)
    assert first == again
    assert first["eval/reward"] > 0
    assert len(seen) == 6 * (group_size or 1)
    pushed = [content for path, content in engine.asked if path == "/collective_rpc"]
    assert len(pushed) == 2
    asked = [content["temperature"] for path, content in engine.asked if path == "/v1/completions"]
    assert asked == [1.0] * 2 + [1.0 if group_size else 0.0] * 6  # twice 3 prompts
    made(POLICY, newer, PROMPTS, jax.random.key(1))
    assert made.given["lag"] == 0
