"""A server that speaks vLLM's and SGLang's routes and draws with the sampler of the package, for tests.

Its answers have the fields of vLLM 0.33.0 (`entrypoints/openai/completion`, `entrypoints/serve/{lora,dev}`,
`entrypoints/rl`) and of SGLang 0.5.23 (`srt/entrypoints/http_server.py`, `srt/managers/tokenizer_manager.py`).
"""

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
def drawer(policy, group_size, max_tokens, eos_ids, likeliest):
    """Draws from a policy, or has its likeliest tokens, compiled once."""
    limits = {"max_tokens": max_tokens, "eos_ids": eos_ids}

    @jax.jit
    def draw(params, tokens, lengths, seed, temperature):
        prompts = Prompts(tokens, lengths)
        if not likeliest:
            made = sampling.sampler(group_size=group_size, temperature=temperature, **limits)
            return made(policy, params, prompts, jax.random.key(seed))
        return sampling.greedy(**limits)(policy, params, prompts, jax.random.key(seed))

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
            return self.reply(*self.done(content))

    def done(self, content):
        """The status and the answer of a request."""
        server, route = self.server, self.path
        if route in ("/v1/completions", "/generate"):
            return 200, self.generated(content)
        if route == "/collective_rpc":
            server.weights[None] = hf.load_pretrained(content["kwargs"]["weights_path"], compute_dtype=jnp.float32)[1]
            return 200, {"results": [None]}
        if route == "/reset_prefix_cache":
            return 200, {"success": True}
        if route == "/update_weight_version":
            server.version = content["new_version"]
            return 200, {"success": True, "new_version": server.version}
        if route == "/update_weights_from_disk":
            assert content["load_format"] == "auto"
            assert content["flush_cache"]
            server.weights[None] = hf.load_pretrained(content["model_path"], compute_dtype=jnp.float32)[1]
            server.version = content["weight_version"]
            return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        name, vllm = content["lora_name"], route.startswith("/v1/")
        if route.endswith("/unload_lora_adapter"):
            del server.weights[name]
        elif name in server.weights:
            said = f"The lora adapter '{name}' has already been loaded."
            error = {"message": said, "type": "InvalidUserInput", "param": None, "code": 400}
            return 400, {"error": error} if vllm else {"success": False, "error_message": said, "loaded_adapters": None}
        else:
            server.weights[name] = bind(*hf.load_adapters(server.policy, server.base, content["lora_path"]))
        loaded = {name: "" for name in server.weights if name}
        text = f"Success: LoRA adapter '{name}' added or removed successfully."  # and no JSON
        return 200, text if vllm else {"success": True, "error_message": None, "loaded_adapters": loaded}

    def generated(self, content):
        server, vllm = self.server, self.path == "/v1/completions"
        prompts, of_each = (
            ([content["prompt"]], [content]) if vllm else (content["input_ids"], content["sampling_params"])
        )
        prompt, settings = prompts[0], of_each[0]
        limit, temperature = settings["max_tokens" if vllm else "max_new_tokens"], settings["temperature"]
        name = content["model"] if vllm else content.get("lora_path")
        params = server.weights[name if name in server.weights else None]
        tokens = np.zeros((1, server.width), np.int32)
        tokens[:, : len(prompt)] = prompt
        likeliest = not temperature or settings["top_k"] == 1
        draw = drawer(server.policy, server.group_size, server.max_tokens, tuple(settings["stop_token_ids"]), likeliest)
        answers = []
        for one in range(settings["n"] if vllm else len(prompts)):
            # One seed is for all completions of vLLM; SGLang draws the same ones for the same seed.
            seed, g = (settings["seed"], one) if vllm else (of_each[one]["sampling_seed"], 0)
            drawn = jax.device_get(draw(params, tokens, np.full(1, len(prompt), np.int32), seed, temperature))
            n = min(limit, drawn.lengths[0, g])
            ids, log_probs = drawn.tokens[0, g, :n].tolist(), drawn.log_probs[0, g, :n].tolist()
            if vllm and settings["top_k"] == 1 and not server.raw:  # of the distribution that only has that token
                log_probs = [0.0] * n
            by = None if drawn.truncated[0, g] or n < drawn.lengths[0, g] else ids[-1]
            end = "length" if by is None else "stop"
            ends = [m for m in range(n) if ids[m] in server.ends and not settings["ignore_eos"]]
            if ends and ends[0] < n - 1:
                n, end, by = ends[0] + 1, "stop", None if vllm else ids[ends[0]]
                ids, log_probs = ids[:n], log_probs[:n]
            stopped = next((m for m in range(1, n + 1) if server.has(settings["stop"], ids[:m])), None)
            if stopped is not None:
                n = min(n, stopped + server.late)
                assert settings["include_stop_str_in_output" if vllm else "no_stop_trim"]
                by = next(string for string in settings["stop"] if server.has([string], ids[:stopped]))
                ids, log_probs, end = ids[:n], log_probs[:n], "stop"
            answers.append((ids, log_probs, end, by))
        return (self.of_vllm if vllm else self.of_sglang)(content, prompt, answers)

    def of_vllm(self, content, prompt, answers):
        version = self.server.version or "default"
        choices = [
            {
                "index": index, "text": "",
                "logprobs": {
                    "text_offset": [0] * len(ids), "token_logprobs": log_probs, "tokens": [""] * len(ids),
                    "top_logprobs": [{"": value} for value in log_probs],
                },
                "finish_reason": end, "stop_reason": by, "token_ids": ids if content["return_token_ids"] else None,
                "prompt_logprobs": None, "prompt_token_ids": prompt if content["return_token_ids"] else None,
                "routed_experts": None,
                "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
            }
            for index, (ids, log_probs, end, by) in enumerate(answers)
        ]  # fmt: skip
        count = sum(len(ids) for ids, *_ in answers)
        usage = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + count, "completion_tokens": count}
        # In any order.
        return {"id": "cmpl-0", "object": "text_completion", "choices": choices[::-1], "usage": usage}

    def of_sglang(self, content, prompt, answers):
        assert content["return_logprob"]
        version = self.server.version or "default"
        return [
            {
                "text": "", "output_ids": ids,
                "meta_info": {
                    "finish_reason": (
                        {"type": "length", "length": len(ids)} if end == "length" else {"type": "stop", "matched": by}
                    ),
                    "prompt_tokens": len(prompt), "weight_version": version, "num_retractions": 0,
                    "input_token_logprobs": [], "output_token_logprobs_length": len(ids),
                    "output_token_logprobs": [[v, token, None] for v, token in zip(log_probs, ids, strict=True)],
                    "completion_tokens": len(ids), "cached_tokens": 0,
                },
            }
            for ids, log_probs, end, by in answers
        ]  # fmt: skip

    def reply(self, status, content):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
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
        server.version, server.raw, server.ends, server.late = None, False, (), 0
        server.has = lambda strings, ids: any(string in server.text(ids) for string in strings)
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
