"""An inference server as a sampler: vLLM or SGLang behind HTTP, which is given the policy's weights as folders.

    server = servers.vllm("http://localhost:8000", model="Qwen/Qwen3-8B")
    sampler = servers.engine_sampler(
        server, group_size=8, max_tokens=512, eos_ids=eos_ids, folder="runs/grpo/engine", max_lag=1,
        write=lambda policy, params, folder: hf.save_pretrained(policy, params, folder, tokenizer=tokenizer),
    )
    step = make_train_step(policy, optimizer, sampler, loss=losses.grpo(weight=losses.truncated_importance(2.0)),
                           score_old=True, transforms=(measured.sampler_gap(),)).jit()

Token ids go in and token ids with their log-probs come out; no text is encoded or decoded on the way. Requests and
answers are those of vLLM 0.33.0 and SGLang 0.5.23, by their source: neither has been run.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from grpo_jax.event_loop import all_of, run_async
from grpo_jax.policies import Policy
from grpo_jax.sampling.blank import BlankSampler
from grpo_jax.sampling.engines import from_engine
from grpo_jax.sampling.samplers import PolicySampler, sampler
from grpo_jax.sampling.server_answers import Asked, Drawn, are_before_truncation, checked, is_cut, versions_of
from grpo_jax.sampling.stopping import StopStrings
from grpo_jax.truncation import Truncation
from grpo_jax.types import Number, Params, PRNGKey, Prompts, Rollout

TRANSIENT = (408, 409, 425, 429)  # statuses after which a request is sent again, beside 5xx
ANSWER_LIMIT = 1 << 28  # bytes of one answer, which may hold a group of long completions with log-probs
LATER = ("/update_weight_version",)  # routes that older servers lack, and go without
COLDEST, HOTTEST = 0.01, 2.0  # temperatures: vLLM takes a lower one for 0.01, and refuses a higher one

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

Request = tuple[str, dict[str, Any]]  # a route of the server, and the JSON that is posted to it


class Server(NamedTuple):
    """Where a server is and what it is asked."""

    url: str
    generate: Callable[[list[int], Mapping[str, Any], str | None], Request]  # (prompt, settings, adapters) -> request
    read: Callable[[Any], list[Drawn]]  # its answer
    load: Callable[[str, str, str | None], list[Request]]  # (folder, name, name of the earlier one) -> requests
    adapters: bool  # folders hold adapters, as PEFT writes them, and no whole model
    truncates: bool  # log-probs are those under top-k, top-p and min-p, as a step scores them


def vllm(url: str, *, model: str, adapters: bool = False) -> Server:
    """The routes of vLLM, of a server that was started with `--logprobs-mode processed_logprobs`.

    Without that option its log-probs are those before the temperature. Whole models are reloaded in place, for which
    it needs `VLLM_SERVER_DEV_MODE=1`; adapters, `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.

    What a request leaves out, vLLM takes from the model's `generation_config.json`, penalties for repetition among it;
    so all is told. Its own end tokens are ignored (`ignore_eos`): those of the sampler are `stop_token_ids`.

    Args:
      url: of the server, without `/v1`.
      model: its name there.
      adapters: see `Server`.
    """

    def generate(prompt: list[int], settings: Mapping[str, Any], loaded: str | None) -> Request:
        content = {
            "model": loaded or model,
            "prompt": prompt,
            "n": settings["group_size"],
            "max_tokens": settings["max_tokens"],
            "temperature": settings["temperature"],
            "top_p": settings["top_p"] or 1.0,
            "top_k": settings["top_k"] or -1,
            "min_p": settings["min_p"] or 0.0,
            "seed": settings["seed"],
            "stop": settings["stop"],
            "stop_token_ids": settings["eos_ids"],
            "ignore_eos": True,
            "watermarking": False,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "return_weight_versions": True,
        }
        return "/v1/completions", content | NEUTRAL | {"min_tokens": 0}

    def read(answer: Any) -> list[Drawn]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Drawn(
                choice["token_ids"],
                choice["logprobs"]["token_logprobs"],
                is_cut(choice["finish_reason"]),
                ended_by=choice.get("stop_reason"),
                prompt=choice.get("prompt_token_ids"),
                prompt_tokens=(answer.get("usage") or {}).get("prompt_tokens"),
                versions=versions_of(choice.get("weight_versions")),
            )
            for choice in choices
        ]

    def load(folder: str, name: str, earlier: str | None) -> list[Request]:
        if not adapters:
            return [("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
                    ("/reset_prefix_cache", {}), ("/update_weight_version", {"new_version": name})]  # fmt: skip
        gone = [] if earlier is None else [("/v1/unload_lora_adapter", {"lora_name": earlier})]
        return [("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}), *gone]

    return Server(url, generate, read, load, adapters, truncates=True)


def sglang(url: str, *, adapters: bool = False) -> Server:
    """The routes of SGLang, with `--enable-lora` for adapters, and without `SGLANG_RETURN_ORIGINAL_LOGPROB`.

    With that variable its log-probs are those before the temperature. Those that it has are never under top-k, top-p or
    min-p, which are therefore refused. A group is a batch of equal prompts with a seed for each: a seed of several
    completions would be the seed of each of them. All is told, since it may have been started with preferred settings;
    its own end tokens it does not ignore without ignoring the sampler's, so that they belong to these.

    Args:
      url: of the server.
      adapters: see `Server`.
    """

    def generate(prompt: list[int], settings: Mapping[str, Any], loaded: str | None) -> Request:
        sampling_params = {
            "max_new_tokens": settings["max_tokens"],
            "temperature": settings["temperature"],
            "top_p": settings["top_p"] or 1.0,
            "top_k": settings["top_k"] or -1,
            "min_p": settings["min_p"] or 0.0,
            "stop": settings["stop"],
            "stop_token_ids": settings["eos_ids"],
            "ignore_eos": False,
            "min_new_tokens": 0,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        } | NEUTRAL
        count = settings["group_size"]
        seeds = np.random.default_rng(settings["seed"]).integers(2**31, size=count).tolist()
        content = {
            "input_ids": [prompt] * count,
            "sampling_params": [sampling_params | {"sampling_seed": seed} for seed in seeds],
            "return_logprob": True,
        }
        return "/generate", content | ({} if loaded is None else {"lora_path": loaded})

    def read(answer: Any) -> list[Drawn]:
        drawn = []
        for one in answer:
            meta = one["meta_info"]
            pairs = [(token, value) for value, token, *_ in meta["output_token_logprobs"]]
            reason, version = meta["finish_reason"], meta.get("weight_version")
            drawn.append(
                Drawn(
                    [token for token, _ in pairs],
                    [value for _, value in pairs],
                    is_cut(reason["type"]),
                    ended_by=reason.get("matched"),
                    prompt_tokens=meta.get("prompt_tokens"),
                    versions=() if version is None else [version],
                )
            )
        return drawn

    def load(folder: str, name: str, earlier: str | None) -> list[Request]:
        if not adapters:
            # Not in the server's own format, which may be that of a server that begins with random weights.
            told = {"model_path": folder, "load_format": "auto", "flush_cache": True, "weight_version": name}
            return [("/update_weights_from_disk", told)]
        gone = [] if earlier is None else [("/unload_lora_adapter", {"lora_name": earlier})]
        return [("/load_lora_adapter", {"lora_name": name, "lora_path": folder}), *gone]

    return Server(url, generate, read, load, adapters, truncates=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSampler:
    """Draws completions from a server; made by `engine_sampler`."""

    server: Server
    drawing: PolicySampler  # the settings; `stop` has the texts that end a completion, which servers find themselves
    stop: tuple[str, ...]
    stop_table: StopStrings | None
    write: Callable[[Policy, Params, pathlib.Path], None]
    folder: pathlib.Path
    max_lag: int
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    run: str  # of this process, in the names of versions: a server refuses the name of one that it has
    given: dict[str, Any]  # what the server has: `version`, its `leaves`, and `lag`, the batches drawn since the first;
    # and whether its log-probs have been `probed`
    lock: threading.Lock  # held while a batch is drawn, of one version
    on_host: ClassVar[bool] = True

    @property
    def group_size(self) -> int:
        """Completions of a prompt."""
        return self.drawing.group_size

    @property
    def max_tokens(self) -> int:
        """Of a completion."""
        return self.drawing.max_tokens

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return self.drawing.eos_ids

    @property
    def temperature(self) -> Number:
        """Of the server and of the scorer."""
        return self.drawing.temperature

    @property
    def greedy(self) -> bool:
        """Whether the likeliest completion is asked for."""
        return self.drawing.greedy

    @property
    def truncation(self) -> Truncation | None:
        """Under which the step scores what was drawn."""
        return self.drawing.truncation

    @property
    def blank(self) -> BlankSampler:
        """The shapes of its rollouts."""
        return BlankSampler(
            group_size=self.group_size,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            truncation=self.truncation,
        )

    def __call__(self, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey) -> Rollout:
        """Draws `group_size` completions for each prompt, after giving the server the params if its are too old.

        Raises:
          RuntimeError: if the server cannot be reached or does not answer as it should, after all attempts.
          ValueError: under jit; in a run of several processes; for completions that cannot be the policy's, see
            `from_engine`.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, prompts, key))):
            raise ValueError("a server cannot be called from a program: call `step.collect` without jit")
        with self.lock:
            self.refresh(policy, params)
            tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths).tolist()
            groups = self.draw(
                [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)],
                seeds=seeds_of(key, len(lengths)),
                limits=[self.max_tokens] * len(lengths),
                group_size=self.group_size,
            )
        return from_engine(
            prompts,
            [[one.tokens for one in group] for group in groups],
            [[one.log_probs for one in group] for group in groups],
            truncated=[[one.truncated for one in group] for group in groups],
            eos_ids=self.eos_ids,
            max_tokens=self.max_tokens,
        )

    def refresh(self, policy: Policy, params: Params) -> None:
        """Gives the server the params if its own are others and too old; to be called once a batch.

        Raises:
          ValueError: in a run of several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(
                f"a server is given the weights by one process, and this run has {jax.process_count()}: use the "
                "devices of one"
            )
        has = [leaf() for leaf in self.given["leaves"]]
        if has and all(a is b for a, b in zip(has, jax.tree.leaves(params), strict=True)):
            return
        if self.given["version"] == 0 or self.given["lag"] >= self.max_lag:
            self._give(policy, params)
        else:
            self.given["lag"] += 1

    def draw(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], limits: Sequence[int], group_size: int
    ) -> list[list[Drawn]]:
        """Asks for `group_size` completions of each prompt, of at most so many tokens, all together."""
        settings = {
            "group_size": group_size, "eos_ids": [*self.eos_ids], "stop": [*self.stop],
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": self.drawing.top_k, "top_p": self.drawing.top_p, "min_p": self.drawing.min_p,
        }  # fmt: skip
        same = self.temperature == 1.0 and self.truncation is None  # before them and after
        if self.server.truncates and not (self.given["probed"] or self.greedy or same):
            self._probe(prompts[:8])
        each = [{"seed": seed, "max_tokens": limit} for seed, limit in zip(seeds, limits, strict=True)]
        return self._ask([(prompt, settings | one) for prompt, one in zip(prompts, each, strict=True)])

    def _ask(self, wanted: Sequence[tuple[list[int], Mapping[str, Any]]]) -> list[list[Drawn]]:
        """Completions under some settings of each prompt, checked."""
        name = self._name(self.given["version"])
        loaded, version = (name, None) if self.server.adapters else (None, name)
        requests = [self.server.generate(prompt, settings, loaded) for prompt, settings in wanted]
        answers = run_async(self._post(requests))
        groups = []
        for (prompt, settings), answer in zip(wanted, answers, strict=True):
            asked = Asked(
                prompt, settings["group_size"], settings["max_tokens"], self.eos_ids, settings["stop"],
                self.stop_table if settings["stop"] else None, version,
            )  # fmt: skip
            groups.append(_read(self.server, answer, asked))
        return groups

    def _probe(self, prompts: Sequence[list[int]]) -> None:
        """Asks for the likeliest tokens and refuses log-probs that are not of the distribution which has them alone.

        vLLM's are those before the temperature and truncation unless it is told otherwise when it starts, and nothing
        in an answer says which they are.
        """
        likeliest = {
            "group_size": 1, "eos_ids": [*self.eos_ids], "stop": [], "seed": 0, "max_tokens": min(8, self.max_tokens),
            "temperature": self.temperature, "top_k": 1, "top_p": None, "min_p": None,
        }  # fmt: skip
        if are_before_truncation([one for (one,) in self._ask([(prompt, likeliest) for prompt in prompts])]):
            raise ValueError(
                f"the log-probs of {self.server.url} are those before the temperature, which is {self.temperature}, "
                "and before top-k, top-p and min-p, so that a ratio to them would be wrong: start vLLM with "
                "--logprobs-mode processed_logprobs"
            )
        self.given["probed"] = True

    def _name(self, version: int) -> str:
        return f"version_{version}_{self.run}"

    def _give(self, policy: Policy, params: Params) -> None:
        """Writes the params and has the server read them; folders of versions before go, also of earlier runs."""
        version = self.given["version"] + 1
        folder = self.folder / self._name(version)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
        self.write(policy, params, folder)
        earlier = self._name(version - 1) if version > 1 else None
        for request in self.server.load(os.path.abspath(folder), folder.name, earlier):
            run_async(self._post([request]))
        for other in self.folder.glob("version_*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        # Not the arrays themselves, which would be a whole model in memory where those that learn are others.
        self.given.update(version=version, lag=0, leaves=[*map(weakref.ref, jax.tree.leaves(params))])

    async def _post(self, requests: Sequence[Request]) -> list[Any]:
        """Sends requests together; the answers in their order."""
        import httpx2

        slots = asyncio.Semaphore(self.concurrency)
        # The answer comes as it is: a compressed one could unfold to any size.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}

        async def send(client: Any, route: str, content: dict[str, Any]) -> tuple[int, bytes]:
            url, posted = self.server.url.rstrip("/") + route, json.dumps(content).encode()
            async with client.stream("POST", url, content=posted, headers=headers) as response:
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > ANSWER_LIMIT:
                        raise ValueError(f"the answer has more than {ANSWER_LIMIT} bytes")
                return response.status_code, bytes(body)

        async def one(client: Any, route: str, content: dict[str, Any]) -> Any:
            reason = ""
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
                try:
                    async with slots, asyncio.timeout(self.timeout):
                        status, body = await send(client, route, content)
                    reason = f"status {status}: {body[:300].decode(errors='replace')}"
                    if status in (404, 405) and route in LATER:
                        return None
                    answer = _parsed(body)
                    if status < 300:
                        # vLLM says so where blocks of its cache are still held: they belong to the weights before.
                        if not isinstance(answer, dict) or answer.get("success") is not False:
                            return answer
                        continue
                    # An attempt whose answer was lost has loaded it, or removed it.
                    if attempt and route.endswith("/load_lora_adapter") and b"already" in body:
                        return None
                    if attempt and route.endswith("/unload_lora_adapter") and status in (400, 404):
                        return None
                    if status not in TRANSIENT and status < 500:
                        break
                except (httpx2.HTTPError, OSError, ValueError) as error:
                    reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{self.server.url}{route}: {reason}")

        async with httpx2.AsyncClient(follow_redirects=False, timeout=None) as client:
            return await all_of(one(client, *request) for request in requests)


def engine_sampler(
    server: Server,
    *,
    write: Callable[[Policy, Params, pathlib.Path], None],
    folder: str | os.PathLike[str],
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] = (),
    stop_table: StopStrings | None = None,
    max_lag: int = 0,
    timeout: float = 600.0,
    retries: int = 3,
    backoff: float = 1.0,
    concurrency: int = 64,
) -> EngineSampler:
    """A sampler whose completions a server draws, with its own log-probs.

    The server is given the policy's params as a folder that it reads: at the first call of a process, and whenever its
    own are more than `max_lag` calls old. It needs to see that folder. A rollout's log-probs are the server's: score
    the old policy, too (`score_old=True`), correct for the difference by a weight (`losses.truncated_importance`), and
    `measured.sampler_gap()` logs it as `sampler_kl`, which holds both the other kernels and the lag.

    The seed of a request follows from the step's key. Servers do not promise the same completions for it, so that a
    run is not resumed to the bit.

    Args:
      server: `vllm(url, model=...)` or `sglang(url)`.
      write: `(policy, params, folder)`, writes what the server reads: a whole model by `hf.save_pretrained`; or
        adapters by `hf.save_adapters(policy, *partition(params, "^(?!.*lora_[ab]$)"), folder, base_model=...)`, with
        `freezing.partition`.
      folder: of this sampler alone: where versions are written, as `version_*`, of which the newest stays.
      group_size: as in `sampler`, and so the next seven.
      max_tokens: of a completion.
      eos_ids: tokens that end one.
      temperature: of the server and of the scorer.
      top_k: most likely tokens that are kept.
      top_p: of the probability that is kept.
      min_p: share of the likeliest token's probability.
      stop: strings that end a completion.
      stop_table: `stop_strings(tokenizer, stop)`, by which a completion is cut that the server ends late.
      max_lag: 0 gives the server new params at every call, 1 at every second one; never those that it has.
      timeout: seconds for a request, with the time that the server has it wait.
      retries: requests after the first that failed.
      backoff: seconds before the first of them, doubled each time.
      concurrency: the most requests at a time.

    Raises:
      ValueError: for a setting out of range, for `stop` without its table, for top-k, top-p or min-p with a server
        whose log-probs are not under them, and for top-p with min-p. When called, for a vLLM whose log-probs are those
        before the temperature.
    """
    if max_lag < 0 or retries < 0 or concurrency < 1 or not timeout > 0:
        raise ValueError(
            "max_lag and retries are at least 0, concurrency at least 1 and timeout above 0, got "
            f"{max_lag}, {retries}, {concurrency} and {timeout}"
        )
    if not server.url.startswith(("http://", "https://")):
        raise ValueError(f"a server's url begins with http:// or https://, got {server.url!r}")
    if not COLDEST <= temperature <= HOTTEST:
        raise ValueError(
            f"servers draw at temperatures from {COLDEST} to {HOTTEST}, got temperature = {temperature} (vLLM takes a "
            f"lower one for {COLDEST}, at which a step would not score)"
        )
    if (len(stop) > 0) != (stop_table is not None) or isinstance(stop, str) or not all(stop):
        raise ValueError(
            f"stop has texts that are not empty, with stop_table=stop_strings(tokenizer, stop), got {stop!r} and "
            f"{'none' if stop_table is None else 'a table'}"
        )
    made = EngineSampler(
        server=server,
        write=write,
        folder=pathlib.Path(folder),
        drawing=sampler(
            group_size=group_size,
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        ),
        stop=tuple(stop),
        stop_table=jax.device_get(stop_table),  # on the host, where answers are looked at
        max_lag=max_lag,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        concurrency=concurrency,
        run=secrets.token_hex(4),
        given={"version": 0, "lag": 0, "leaves": [], "probed": False},
        lock=threading.Lock(),
    )
    if top_p is not None and min_p is not None:
        raise ValueError(
            "vLLM keeps by min_p before top_p, and a step the other way round, so that the tokens under top_p = "
            f"{top_p} and min_p = {min_p} are not the same: give one of them"
        )
    if made.truncation is not None and not server.truncates:
        raise ValueError(
            f"the server's log-probs are not under top_k = {top_k}, top_p = {top_p} and min_p = {min_p}, under which a "
            "step would score: leave them out, or sample with vLLM"
        )
    return made


def seeds_of(key: PRNGKey, count: int) -> list[int]:
    """Seeds for so many requests, of 31 bits."""
    return list(np.asarray(jax.random.bits(key, (count,), np.uint32) >> 1).tolist())


def _parsed(body: bytes) -> Any:
    """The JSON of an answer; None for other text, in which vLLM tells of adapters."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _read(server: Server, answer: Any, asked: Asked) -> list[Drawn]:
    try:
        return checked(server.read(answer), asked)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"{server.url} gave no whole completions with token ids and log-probs ({type(error).__name__}: {error}): "
            f"{json.dumps(answer)[:300]}"
        ) from error
