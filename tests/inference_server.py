"""A server that speaks vLLM's and SGLang's routes and draws with the sampler of the package, for tests."""

import contextlib
import functools
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import sampling
from grpo_jax.freezing import bind
from grpo_jax.models import hf
from grpo_jax.types import Prompts


@functools.cache
def drawer(policy, group_size, max_tokens, eos_ids, temperature):
    """Draws from a policy, compiled once; the likeliest tokens at a temperature of 0."""
    limits = {"max_tokens": max_tokens, "eos_ids": eos_ids}
    made = sampling.greedy(**limits)
    if temperature:
        made = sampling.sampler(group_size=group_size, temperature=temperature, **limits)

    @jax.jit
    def draw(params, tokens, lengths, seed):
        return made(policy, params, Prompts(tokens, lengths), jax.random.key(seed))

    return draw


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
                read = bind(*hf.load_adapters(server.policy, server.base, content["lora_path"]))
                server.weights[content["lora_name"]] = read
            if self.path.endswith("/unload_lora_adapter"):
                del server.weights[content["lora_name"]]
            return self.reply(200, {"success": True})

    def generated(self, content):
        server, vllm = self.server, self.path == "/v1/completions"
        prompts, of_each = (
            ([content["prompt"]], [content]) if vllm else (content["input_ids"], content["sampling_params"])
        )
        prompt, settings = prompts[0], of_each[0]
        limit = settings["max_tokens" if vllm else "max_new_tokens"]
        name = content["model"] if vllm else content.get("lora_path")
        params = server.weights[name if name in server.weights else None]
        tokens = np.zeros((1, server.width), np.int32)
        tokens[:, : len(prompt)] = prompt
        draw = drawer(
            server.policy, server.group_size, server.max_tokens, tuple(settings["stop_token_ids"]),
            settings["temperature"],
        )  # fmt: skip
        answers = []
        for one in range(settings["n"] if vllm else len(prompts)):
            # One seed is for all completions of vLLM; SGLang draws the same ones for the same seed.
            seed, g = (settings["seed"], one) if vllm else (of_each[one]["sampling_seed"], 0)
            drawn = jax.device_get(draw(params, tokens, np.full(1, len(prompt), np.int32), seed))
            n = min(limit, drawn.lengths[0, g])
            ids, log_probs = drawn.tokens[0, g, :n].tolist(), drawn.log_probs[0, g, :n].tolist()
            end = "length" if drawn.truncated[0, g] or n < drawn.lengths[0, g] else "stop"
            stopped = next((m for m in range(1, n + 1) if server.has(settings["stop"], ids[:m])), None)
            if stopped is not None:
                kept = settings["include_stop_str_in_output" if vllm else "no_stop_trim"]
                ids, log_probs, end = ids[: stopped - (not kept)], log_probs[: stopped - (not kept)], "stop"
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
                meta = {"output_token_logprobs": triples, "finish_reason": {"type": end}, "prompt_tokens": len(prompt)}
                answers.append({"meta_info": meta})
        return {"choices": answers, "usage": {"prompt_tokens": len(prompt)}} if vllm else answers

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


@contextlib.contextmanager
def serving(policy, *, group_size, max_tokens, width=40):
    """A server of a policy, whose `asked` has the requests so far; `url` is where it is."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        server.policy, server.group_size, server.max_tokens, server.width = policy, group_size, max_tokens, width
        server.lock, server.asked, server.faults, server.weights, server.base = threading.Lock(), [], [], {}, None
        server.has = lambda strings, ids: any(string in server.text(ids) for string in strings)
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
