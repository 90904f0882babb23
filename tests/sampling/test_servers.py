"""Servers as samplers, against one that speaks vLLM's and SGLang's routes and draws with the sampler of the package."""

import http.server
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sampling
from grpo_jax.data import make_prompts
from grpo_jax.environments import Turn
from grpo_jax.freezing import bind, partition
from grpo_jax.models import hf, lora
from grpo_jax.run import measured
from grpo_jax.sampling import servers
from grpo_jax.scoring import score
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts, tiny_policy, tiny_tokenizer
from grpo_jax.types import Experience

POLICY = tiny_policy("llama")
G, T, TEMPERATURE, EOS = 2, 8, 0.7, (1, *range(5, 20))
PROMPTS = random_prompts(0, 2, 6)


@jax.jit
def draw(params, tokens, lengths, seed):
    made = sampling.sampler(group_size=G, max_tokens=2 * T, eos_ids=EOS, temperature=TEMPERATURE)
    return made(POLICY, params, PROMPTS._replace(tokens=tokens, lengths=lengths), jax.random.key(seed))


class Engine(http.server.BaseHTTPRequestHandler):
    """What a server does: it reads folders that it is told of, and answers with tokens, log-probs and their end."""

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, content))
            if server.faults:
                return self.reply(*server.faults.pop(0))
            if self.path in ("/v1/completions", "/generate"):
                return self.reply(200, self.generated(content))
            if self.path in ("/collective_rpc", "/update_weights_from_disk"):
                folder = content.get("model_path") or content["kwargs"]["weights_path"]
                server.weights[None] = hf.load_pretrained(folder, compute_dtype=jnp.float32)[1]
            if content.get("lora_name") in server.weights and self.path.endswith("/load_lora_adapter"):
                return self.reply(400, {"error": "it has already been loaded"})
            if self.path.endswith("/load_lora_adapter"):
                read = bind(*hf.load_adapters(POLICY, server.base, content["lora_path"]))
                server.weights[content["lora_name"]] = read
            if self.path.endswith("/unload_lora_adapter"):
                del server.weights[content["lora_name"]]
            return self.reply(200, {"success": True})

    def generated(self, content):
        vllm = self.path == "/v1/completions"
        prompts, of_each = (
            ([content["prompt"]], [content]) if vllm else (content["input_ids"], content["sampling_params"])
        )
        prompt, settings = prompts[0], of_each[0]
        assert (settings["temperature"], settings["stop_token_ids"]) == (TEMPERATURE, list(EOS))
        limit = settings["max_tokens" if vllm else "max_new_tokens"]
        name = content["model"] if vllm else content.get("lora_path")
        params = self.server.weights[None if name == "tiny" else name]
        tokens = np.zeros((2, 40), np.int32)
        tokens[:, : len(prompt)] = prompt
        answers = []
        for one in range(settings["n"] if vllm else len(prompts)):
            # One seed is for all completions of vLLM; SGLang draws the same ones for the same seed.
            seed, g = (settings["seed"], one) if vllm else (of_each[one]["sampling_seed"], 0)
            drawn = jax.device_get(draw(params, tokens, np.full(2, len(prompt), np.int32), seed))
            n = min(limit, drawn.lengths[0, g])
            ids, log_probs = drawn.tokens[0, g, :n].tolist(), drawn.log_probs[0, g, :n].tolist()
            end = "length" if drawn.truncated[0, g] or n < drawn.lengths[0, g] else "stop"
            if vllm:
                choice = {
                    "index": one,
                    "token_ids": ids,
                    "logprobs": {"token_logprobs": log_probs},
                    "finish_reason": end,
                }
                answers.insert(0, choice)  # in any order
            else:
                triples = [[value, token, None] for value, token in zip(log_probs, ids, strict=True)]
                answers.append({"meta_info": {"output_token_logprobs": triples, "finish_reason": {"type": end}}})
        return {"choices": answers} if vllm else answers

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


@pytest.fixture
def engine():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        server.lock, server.asked, server.faults, server.weights, server.base = threading.Lock(), [], [], {}, None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def address(engine):
    return f"http://127.0.0.1:{engine.server_port}"


def server_of(kind, engine, **settings):
    return (
        servers.vllm(address(engine), model="tiny", **settings)
        if kind == "vllm"
        else servers.sglang(address(engine), **settings)
    )


def sampler_of(server, folder, write=hf.save_pretrained, **changes):
    settings = {"group_size": G, "max_tokens": T, "eos_ids": EOS, "temperature": TEMPERATURE, "backoff": 0.01}
    return servers.engine_sampler(server, write=write, folder=folder, **(settings | changes))


PARAMS = jax.jit(POLICY.init)(jax.random.key(0))


def gap(rollout, params):
    """The largest difference of the server's log-probs to those of the params; `sampler_kl` tells of the same."""
    scored = score(POLICY, params, rollout, temperature=TEMPERATURE).log_probs
    _, metrics = measured.sampler_gap()(Experience(rollout, old_log_probs=scored))
    found = summary(metrics)
    mean = np.mean((rollout.log_probs - scored)[np.asarray(rollout.mask)])
    np.testing.assert_allclose(found["sampler_kl"], mean, atol=1e-6)
    return float(found["sampler_gap_max"])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_server_draws_from_the_params_that_it_was_given_and_lags_at_most_as_told(kind, engine, tmp_path):
    (tmp_path / "version_1_killed").mkdir()
    made = sampler_of(server_of(kind, engine), tmp_path, max_lag=1)
    versions = [jax.tree.map(lambda x, n=n: x * (1 + 0.3 * n), PARAMS) for n in range(3)]
    rollouts = [made(POLICY, params, PROMPTS, jax.random.key(n)) for n, params in enumerate(versions)]
    for n, has in enumerate((0, 0, 2)):  # it is given the first and the third
        assert gap(rollouts[n], versions[has]) < 1e-4
        assert n == has or gap(rollouts[n], versions[n]) > 0.01
    (folder,) = tmp_path.iterdir()  # that of a killed run has gone
    assert folder.name.startswith("version_2_")
    assert (rollouts[0].tokens[:, 0] != rollouts[0].tokens[:, 1]).any(-1).all()  # a group differs
    for rollout in rollouts:
        last = jnp.take_along_axis(rollout.tokens, rollout.lengths[..., None] - 1, axis=-1)[..., 0]
        np.testing.assert_array_equal(rollout.truncated, ~jnp.isin(last, jnp.array(EOS)))
    assert (rollouts[0].tokens != rollouts[1].tokens).any()  # other seeds
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


def test_an_adapter_that_a_lost_answer_told_of_is_not_loaded_again(engine, tmp_path):
    made = sampler_of(servers.vllm(address(engine), model="tiny", adapters=True), tmp_path, lambda *given: None)
    engine.faults = [(503, {}), (400, {"error": "The lora adapter has already been loaded"})]
    made.refresh(POLICY, PARAMS)
    assert made.given["version"] == 1
    engine.faults = [(400, {"error": "The lora adapter has already been loaded"})]
    with pytest.raises(RuntimeError, match="already been loaded"):  # by somebody else
        made.refresh(POLICY, PARAMS)


def test_requests_that_fail_are_sent_again_and_answers_that_cannot_be_used_are_told(engine, tmp_path, monkeypatch):
    made = sampler_of(server_of("vllm", engine), tmp_path, retries=1)
    engine.faults = [(503, {"error": "starting"})]
    made(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    again = sampler_of(server_of("vllm", engine), tmp_path, retries=1)
    engine.faults = [(404, {"error": "no such route"})]
    with pytest.raises(RuntimeError, match=r"/collective_rpc: status 404.*no such route"):
        again(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    engine.faults = [(200, {}), (200, {}), (200, {"choices": [{"text": "hello"}]})]
    with pytest.raises(RuntimeError, match=r"no whole completions with token ids and log-probs \(KeyError"):
        again(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    choice = {"index": 0, "token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}
    engine.faults = [(200, {}), (200, {}), (200, {"choices": [choice]})]
    with pytest.raises(RuntimeError, match="a completion ended by 'abort', and not by stop or length"):
        again(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    monkeypatch.setattr(servers, "ANSWER_LIMIT", 1000)
    engine.faults = [(200, "x" * 2000)] * 2
    with pytest.raises(RuntimeError, match="the answer has more than 1000 bytes"):
        again(POLICY, PARAMS, PROMPTS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"call `step\.collect` without jit"):
        jax.jit(lambda params: made(POLICY, params, PROMPTS, jax.random.key(0)))(PARAMS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_lag": -1}, "max_lag and retries"),
        ({"temperature": 0}, "temperature is above 0"),
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
    assert sampler_of(servers.vllm("http://localhost:1", model="tiny"), tmp_path, **changes).truncation is not None
