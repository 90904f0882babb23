"""A decoder-only transformer behind the policy contract.

Letters: `B` prompts, `G` completions, `S` tokens read now, `C` columns of the
completions' cache, `P` prompt columns, `D` width, `N` query heads, `K` key-value
heads, `h` head width, `L` layers. The layers are one scanned block, so params
are stacked on axis 0 and compile time does not grow with depth.

Tokens go through the layers in streams: those of completions, alone or with a stream of their prompts before them. In
each layer the prompts' keys and values are made first and the completions then attend to them, both by the same
weights, which several devices gather once for both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import experts, float16, lora, mixture, quantized, rope, sharding
from grpo_jax.models.attention import KeyValues, MaskInputs, head_copies, over_mesh
from grpo_jax.models.config import DecoderConfig
from grpo_jax.policies import Policy, Routes, kept_columns, reset_rows
from grpo_jax.types import Array, Params, PRNGKey

Streams = tuple[Array, ...]  # of each stream [B, G, S, ...], prompts' with G = 1; or the rows of all, see `_rows`


class Stream(NamedTuple):
    """What is read of prompts or of completions."""

    tokens: Array  # [B, G, S] int32
    mask_inputs: MaskInputs


class PromptCache(NamedTuple):
    """Keys and values of all prompt tokens but the last."""

    layers: KeyValues  # [L, B, P, K, h]
    lengths: Array  # [B] int32, columns that hold a token


class Cache(NamedTuple):
    """Keys and values of the completions so far; of all layers together, or of each apart, see `_apart`."""

    layers: KeyValues | list[KeyValues]  # [L, B, G, C, K, h], or L times [B, G, K, C, h]
    positions: Array  # [B, G, C] int32, -1 where empty
    column: Array  # [] int32, the next to be written


class RMSNorm(nn.Module):
    """`scale * (x / rms(x))`, normalised in float32 and rounded before the scale, as Llama does, or after it."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        initializer = nn.initializers.constant(1.0 - c.norm_offset)
        width = streams[0].shape[-1]
        scale = sharding.gather(c.mesh, self.param("scale", initializer, (width,), c.param_dtype), "scale")
        if c.norm_offset:
            scale = scale.astype(jnp.float32) + c.norm_offset

        def of_stream(x: Array) -> Array:
            x32 = x.astype(jnp.float32)
            normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.rms_norm_eps)
            if c.norm_float32:
                return (scale.astype(jnp.float32) * normed).astype(c.dtype)
            return scale.astype(c.dtype) * normed.astype(c.dtype)

        return tuple(map(of_stream, streams))


class Linear(nn.Module):
    """`x @ kernel + bias`; the kernel may be quantised, and what adapters beside it add is added."""

    config: DecoderConfig
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        streams = tuple(x.astype(c.dtype) for x in streams)
        kernel: Any = self.get_variable("params", "kernel")
        if not quantized.is_quantized(kernel):
            initializer = nn.initializers.normal(c.initializer_range)
            kernel = self.param("kernel", initializer, (streams[0].shape[-1], self.features), c.param_dtype)
        outputs = self._products(streams, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype)
            bias = self._gathered(bias, "bias").astype(c.dtype)
            outputs = tuple(y + bias for y in outputs)
        if self.has_variable("params", lora.A):
            a, b = (self._gathered(self.get_variable("params", name), name) for name in (lora.A, lora.B))
            scale: Array = self.get_variable("params", lora.SCALE)
            outputs = tuple(y + lora.delta(x, a, b, scale) for x, y in zip(streams, outputs, strict=True))
        return outputs

    def _products(self, streams: Streams, kernel: Any) -> Streams:
        dtype = self.config.dtype

        def products(streams: Streams, kernel: Any) -> Streams:
            kernel = kernel if quantized.is_quantized(kernel) else kernel.astype(dtype)
            kernel = quantized.dequantize(self._gathered(kernel, "kernel")).astype(dtype)
            return tuple(x @ kernel for x in streams)

        # For the backward pass codes are kept, not floats; with rematerialisation neither is.
        apart = quantized.is_quantized(kernel) and not self.config.remat
        return (jax.checkpoint(products) if apart else products)(streams, kernel)

    def _gathered(self, leaf: Any, name: str) -> Any:
        return sharding.gather(self.config.mesh, leaf, f"{self.name}/{name}")


class Attention(nn.Module):
    """Projections, rotation, the cache and the joint attention of one layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        cache: tuple[KeyValues, Array] | None,
        layer: Array | None,
        prompt: KeyValues | None,
        masks: tuple[MaskInputs, ...],
        rotations: tuple[tuple[Array, Array], ...],
    ) -> tuple[Streams, KeyValues | None, KeyValues]:
        """Reads streams `[B, G, S, D]`; returns the outputs, and of the last stream the cache and new keys and values.

        The cache is of all layers, of which this one is `layer`; or of this layer alone, and `layer` is None. The
        prompt is what a single stream attends to; of two the second attends to the first.
        """
        c = self.config
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        rows = _rows(c, streams)
        query, key, value = (
            Linear(c, number * c.head_dim, c.qkv_bias, name=name)(rows) for name, number in heads.items()
        )
        if c.qk_norm == "width":
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)
        query, key, value = (
            tuple(y.reshape(*y.shape[:-1], y.shape[-1] // c.head_dim, c.head_dim) for y in _streams(rows, streams))
            for rows in (query, key, value)
        )
        if c.qk_norm == "head":
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)

        options: dict[str, Any] = {}
        if c.attention_soft_cap is not None:
            options["soft_cap"] = c.attention_soft_cap
        if c.attention_sinks:
            initializer = nn.initializers.normal(c.initializer_range)
            options["sinks"] = self.param("sinks", initializer, (c.num_heads,), c.param_dtype)
        outs: list[Array] = []
        stored: KeyValues | None = None
        new: KeyValues | None = None
        for q, k, v, mask_inputs, rotation in zip(query, key, value, masks, rotations, strict=True):
            if new is not None:  # that of the prompts, which are read by one row each
                prompt = jax.tree.map(lambda x: sharding.constrain(c.mesh, x[:, 0], None, "tensor", None), new)
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
            if c.query_scale is not None:  # an attention divides by the root of the width
                q = _scaled(q, c.query_scale * c.head_dim**0.5)
            q, k, v = (sharding.constrain(c.mesh, x, None, "tensor", None) for x in (q, k, v))
            own = new = KeyValues(k, v)
            if cache is not None:
                stored, own = _written(*cache, layer, new, mask_inputs.own.shape[-1])
            if c.remat:
                # Masks are the same in all layers, so that JAX takes them out of the loop over these and keeps them
                # until the backward pass, a byte for each query, key and head. Bound to the query they stay within
                # their layer.
                q, mask_inputs = jax.lax.optimization_barrier((q, mask_inputs))
            out = over_mesh(c.attention, c.mesh)(q, own, prompt, mask_inputs, **options)
            outs.append(out.reshape(*out.shape[:3], c.num_heads * c.head_dim))
        assert new is not None
        rows = Linear(c, c.hidden_size, c.o_bias, name="o_proj")(_rows(c, tuple(outs)))
        return _streams(rows, streams), stored, new


def _written(
    stored: KeyValues, column: Array, layer: Array | None, new: KeyValues, columns: int
) -> tuple[KeyValues, KeyValues]:
    """The cache with new keys and values from a column on, and what it holds in its first `columns`."""

    def of_all_layers(held: Array, update: Array) -> tuple[Array, Array]:
        assert layer is not None
        held = jax.lax.dynamic_update_slice(held, update[None].astype(held.dtype), (layer, 0, 0, column, 0, 0))
        size = (1, *held.shape[1:3], columns, *held.shape[4:])
        return held, jax.lax.dynamic_slice(held, (layer, 0, 0, 0, 0, 0), size)[0].astype(update.dtype)

    def of_this_layer(held: Array, update: Array) -> tuple[Array, Array]:
        update = update.swapaxes(2, 3)
        held = jax.lax.dynamic_update_slice(held, update.astype(held.dtype), (0, 0, 0, column, 0))
        return held, held[:, :, :, :columns].swapaxes(2, 3).astype(update.dtype)

    write = of_this_layer if layer is None else of_all_layers
    keys, values = write(stored.keys, new.keys), write(stored.values, new.values)
    return KeyValues(keys[0], values[0]), KeyValues(keys[1], values[1])


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        rows = _rows(c, streams)
        gate = Linear(c, c.intermediate_size, c.mlp_bias, name="gate_proj")(rows)
        up = Linear(c, c.intermediate_size, c.mlp_bias, name="up_proj")(rows)

        def gated(gate: Array, up: Array) -> Array:
            return c.activation(gate) * up

        inner = tuple(float16.in_float32(gated, *each) for each in zip(gate, up, strict=True))
        return _streams(Linear(c, c.hidden_size, c.mlp_bias, name="down_proj")(inner), streams)


class Routed(NamedTuple):
    """What a layer's router did; of tokens that do not count only the first."""

    experts: Array  # [B, G, S, k] int16, those that were chosen
    probabilities: Array | None  # [B, G, E] float32, of each expert, summed over the tokens that count
    choices: Array | None  # [B, G, E] float32, how many of them chose it


class Stack(nn.Module):
    """The leaves of one linear layer of all experts, gathered; see `mixture.linear`."""

    config: DecoderConfig
    shape: tuple[int, int, int]
    use_bias: bool

    @nn.compact
    def __call__(self) -> Params:
        c = self.config
        kernel: Any = self.get_variable("params", "kernel")
        if not quantized.is_quantized(kernel):
            initializer = nn.initializers.normal(c.initializer_range)
            kernel = self.param("kernel", initializer, self.shape, c.param_dtype).astype(c.dtype)
        leaves = {"kernel": kernel}
        if self.use_bias:
            leaves["bias"] = self.param("bias", nn.initializers.zeros, (self.shape[0], self.shape[2]), c.param_dtype)
        if self.has_variable("params", lora.A):
            leaves |= {name: self.get_variable("params", name) for name in (lora.A, lora.B, lora.SCALE)}
        return {name: sharding.gather(c.mesh, leaf, f"{self.name}/{name}") for name, leaf in leaves.items()}


class Mixture(nn.Module):
    """A router and its experts; see `grpo_jax.models.experts`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, streams: Streams, given: Array | None, counted: Array | None) -> tuple[Streams, Routed]:
        """Of streams `[B, G, S, D]`, the last by the experts given `[B, G, S, k]`, if any; with its routes.

        `counted [B, G, S]` as in `Routed`.
        """
        c, e = self.config, self.config.experts
        assert e is not None
        weights: dict[str, Any] = {
            name: Stack(c, shape, e.bias, name=name)() for name, shape in experts.shapes(e, c.hidden_size).items()
        }
        router = {"router": (c.hidden_size, e.number)} | ({"router_bias": (e.number,)} if e.bias else {})
        for name, shape in router.items():
            initializer = nn.initializers.zeros if len(shape) == 1 else nn.initializers.normal(c.initializer_range)
            leaf = self.param(name, initializer, shape, c.param_dtype)
            # In float32 whatever the rest is in: a rounded logit of the router is another expert.
            weights[name] = sharding.gather(c.mesh, leaf.astype(jnp.float32), name)

        def of_stream(x: Array, chosen: Array | None, counted: Array | None, weights: Params) -> tuple[Array, Routed]:
            chosen = None if chosen is None else chosen.reshape(-1, e.per_token).astype(jnp.int32)
            mixed = mixture.mixture(x.reshape(-1, c.hidden_size), weights, e, c.activation, chosen)
            rows = mixed.rows.astype(c.dtype).reshape(x.shape)
            chosen = mixed.experts.reshape(*x.shape[:-1], e.per_token)
            probabilities = choices = None
            if counted is not None:
                shares = jax.nn.softmax(mixed.logits).reshape(*x.shape[:-1], e.number)
                probabilities = jnp.einsum("bgse,bgs->bge", shares, counted.astype(jnp.float32))
                # Tokens that do not count choose an expert that there is not.
                of_counted = jnp.where(counted[..., None], chosen, e.number).reshape(*x.shape[:2], -1)
                choices = jax.vmap(jax.vmap(lambda x: jnp.bincount(x, length=e.number)))(of_counted).astype(jnp.float32)
            return rows, Routed(chosen.astype(jnp.int16), probabilities, choices)

        def of_streams(read: tuple[Any, ...], weights: Params) -> tuple[tuple[Array, Routed], ...]:
            return tuple(of_stream(x, chosen, counted, weights) for x, chosen, counted in read)

        # As in `Linear`, codes are kept for the backward pass, not floats.
        apart = quantized.is_quantized(weights["experts_gate"]["kernel"]) and not c.remat
        compute = jax.checkpoint(of_streams) if apart else of_streams
        *before, last = (x.astype(c.dtype) for x in streams)
        read = (*((x, None, None) for x in before), (last, given, counted))
        mixed = sharding.each_its_rows(c.mesh, compute)(read, weights)
        return tuple(rows for rows, _ in mixed), mixed[-1][1]


class Block(nn.Module):
    """One layer; its cache, or that of all layers, rides in the carry, which is updated in place."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Streams, KeyValues | None],
        layer: Array | None,
        prompt: KeyValues | None,
        window: Array | None,
        which_rotation: Array | None,
        given: Array | None,
        masks: tuple[MaskInputs, ...],
        rotations: tuple[tuple[Array, Array], ...],
        column: Array | None,
        counted: Array | None,
    ) -> tuple[tuple[Streams, KeyValues | None], tuple[KeyValues, Routed | None]]:
        c = self.config
        streams, stored = carry
        cache = None if stored is None or column is None else (stored, column)
        rotations = rotations if which_rotation is None else jax.tree.map(lambda x: x[which_rotation], rotations)

        def norm(streams: Streams, name: str, there: bool) -> Streams:
            return RMSNorm(c, name=name)(streams) if there else streams

        def added(x: Array, out: Array) -> Array:
            return sharding.constrain(c.mesh, float16.within(x + _scaled(out, c.residual_scale)), None, None)

        # Where there are four norms, transformers calls the second of them what is else the one before the MLP.
        before_mlp = "pre_feedforward_layernorm" if c.post_norm else "post_attention_layernorm"
        outs, stored, new = Attention(c, name="self_attn")(
            norm(streams, "input_layernorm", c.pre_norm),
            cache,
            layer,
            prompt,
            tuple(mask_inputs._replace(window=window) for mask_inputs in masks),
            rotations,
        )
        streams = tuple(map(added, streams, norm(outs, "post_attention_layernorm", c.post_norm)))
        read, routed = norm(streams, before_mlp, c.pre_norm), None
        if c.experts is None:
            outs = MLP(c, name="mlp")(read)
        else:
            outs, routed = Mixture(c, name="mlp")(read, given, counted)
        streams = tuple(map(added, streams, norm(outs, "post_feedforward_layernorm", c.post_norm)))
        return (streams, stored), (new, routed)


def _scaled(x: Array, factor: float) -> Array:
    """`factor * x` in float32, then rounded: bfloat16 has two or three digits of a factor such as 0.22."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def _soft_capped(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _rotations(config: DecoderConfig, positions: Array) -> tuple[tuple[Array, Array], Array | None]:
    """Cosine and sine of positions, and None; or of each kind of layer, stacked, and which kind `[L]` a layer is."""
    of_layer = [config.rope] * config.num_layers
    if config.local_rope is not None and config.windows is not None:
        of_layer = [config.rope if window is None else config.local_rope for window in config.windows]
    if config.rotated is not None:
        of_layer = [x if rotated else rope.none(x) for x, rotated in zip(of_layer, config.rotated, strict=True)]
    kinds = list(dict.fromkeys(of_layer))
    if len(kinds) == 1:
        return rope.angles(kinds[0], positions), None
    cos, sin = zip(*(rope.angles(kind, positions) for kind in kinds), strict=True)
    return (jnp.stack(cos), jnp.stack(sin)), jnp.array([kinds.index(x) for x in of_layer])


class Decoder(nn.Module):
    """Embedding, layers, last norm; and the head as a function of its own."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        initializer = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=initializer,
        )
        # prevent_cse=False: the scan already keeps the recomputation apart.
        policy = c.remat if callable(c.remat) else None
        block = nn.remat(Block, prevent_cse=False, policy=policy) if c.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            # It traces a layer twice. Weights of a seed are what they are by it, and elsewhere it has no use.
            check_constancy_invariants=self.is_initializing(),
        )(c)
        last_dtype = c.dtype if c.last_norm_dtype is None else c.last_norm_dtype
        self.norm = RMSNorm(dataclasses.replace(c, dtype=last_dtype))
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", initializer, (c.hidden_size, c.vocab_size), c.param_dtype)

    def __call__(
        self,
        streams: tuple[Stream, ...],
        prompt: KeyValues | None = None,
        stored: KeyValues | list[KeyValues] | None = None,
        column: Array | None = None,
        given: Array | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, KeyValues | list[KeyValues] | None, KeyValues, Routed | None]:
        """Hidden states `[B, G, S, D]`, the updated cache, and keys, values and routes of every layer.

        All of the last stream. It is read after `prompt`, of all layers, or after the stream before it; by the experts
        `given [L, B, G, S, k]`, if any.
        """
        c = self.config
        windows = None
        if c.windows is not None:
            no_limit = np.iinfo(np.int32).max
            windows = jnp.array([no_limit if window is None else window for window in c.windows], jnp.int32)
        x = self._embed(tuple(stream.tokens for stream in streams))
        if c.embedding_scale != 1:
            x = tuple(each * jnp.asarray(c.embedding_scale, c.dtype) for each in x)
        masks = tuple(stream.mask_inputs for stream in streams)
        rotations, which_rotation = zip(*(_rotations(c, mask_inputs.queries) for mask_inputs in masks), strict=True)
        of_layers = (prompt, windows, which_rotation[0], given)
        of_all = (masks, rotations, column, counted)
        if isinstance(stored, list):
            x, stored, (new, routed) = self._layers_apart(x, stored, of_layers, of_all)
        else:
            (x, stored), (new, routed) = self.layers((x, stored), jnp.arange(c.num_layers), *of_layers, *of_all)
        return self.norm(x[-1:])[0], stored, new, routed

    def _layers_apart(
        self, x: Streams, stored: list[KeyValues], of_layers: tuple[Any, ...], of_all: tuple[Any, ...]
    ) -> tuple[Streams, list[KeyValues], tuple[KeyValues, Routed | None]]:
        """The layers one after the other."""
        layers = self.variables["params"]["layers"]
        apply: Callable[..., Any] = Block(self.config, parent=None).apply
        outputs, after = [], []
        for n, cache in enumerate(stored):
            weights = layers[n] if isinstance(layers, list) else _layer(layers, n)
            (x, cache), output = apply({"params": weights}, (x, cache), None, *_layer(of_layers, n), *of_all)
            after.append(cache)
            outputs.append(output)
        return x, after, jax.tree.map(lambda *each: jnp.stack(each), *outputs)

    def _embed(self, streams: Streams) -> Streams:
        c = self.config

        def look_up(tokens: Array) -> Array:
            if c.mesh is None:  # rounded after it: the gradient of a table is then summed as the table is
                return jnp.take(self.embed_tokens.embedding, tokens, axis=0).astype(c.dtype)
            return sharding.look_up(c.mesh, self.embed_tokens.embedding.astype(c.dtype), tokens)

        # One sum of gradients of a table, which is the largest parameter of many models.
        return _streams(tuple(map(look_up, _side_by_side(c, streams))), streams)

    def unembed(self, hidden: Array) -> Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`."""
        c = self.config
        if c.tie_embeddings:
            head = sharding.gather(c.mesh, self.embed_tokens.embedding, "embed_tokens/embedding").T
        else:
            head = sharding.gather(c.mesh, self.lm_head, "lm_head")
        rows = _rows(c, (hidden,))[0].astype(c.logits_dtype)
        logits = jnp.matmul(rows, head.astype(c.logits_dtype), preferred_element_type=jnp.float32)
        logits = _soft_capped(logits / c.logits_divisor if c.logits_divisor != 1 else logits, c.logits_soft_cap)
        return sharding.constrain(c.mesh, logits.reshape(*hidden.shape[:-1], c.vocab_size), "tensor")


def _rows(c: DecoderConfig, streams: Streams) -> Streams:
    """For what is done to each token alone: `[N, D]` of each stream, as plain products are faster on CPUs.

    Over devices rows stay apart, and streams side by side: the gradient of a weight is summed over devices once.
    """
    return tuple(x.reshape(-1, x.shape[-1]) for x in streams) if c.mesh is None else _side_by_side(c, streams)


def _side_by_side(c: DecoderConfig, streams: Streams) -> Streams:
    """Streams `[B, G, S, ...]` as one `[B, 1, N, ...]`; as they are where completions are divided over devices."""
    if len(streams) == 1 or (c.mesh is not None and any(sharding.rows(c.mesh, *x.shape[:2])[1] for x in streams)):
        return streams
    return (jnp.concatenate([x.reshape(x.shape[0], 1, -1, *x.shape[3:]) for x in streams], axis=2),)


def _streams(rows: Streams, like: Streams) -> Streams:
    """Rows `[..., F]` as streams `[B, G, S, F]` of the sizes of others."""
    if len(rows) < len(like):
        ends = np.cumsum([x.shape[1] * x.shape[2] for x in like])
        rows = tuple(jnp.split(rows[0], ends[:-1], axis=2))
    return tuple(y.reshape(*x.shape[:3], y.shape[-1]) for x, y in zip(like, rows, strict=True))


def _layer(tree: Any, n: int) -> Any:
    """What is layer `n`'s of arrays of all layers."""
    return jax.tree.map(lambda x: x[n], tree)


def _apart(c: DecoderConfig) -> bool:
    """Whether a decode step has its layers one after the other, each with weights and a cache of its own.

    In a loop over the layers XLA copies, on a CPU, a layer's weights and all that its cache holds for each token: on W1
    of the benchmarks 31 MiB, six times what its matrix products write.
    """
    return jax.default_backend() == "cpu" if c.layers_apart is None and c.mesh is None else bool(c.layers_apart)


def _constrain_layers(c: DecoderConfig, cache: KeyValues) -> KeyValues:
    """Of all layers `[L, B, (G,) C, K, h]`: by rows and heads."""
    if c.mesh is None:
        return cache
    return jax.tree.map(jax.vmap(lambda x: sharding.constrain(c.mesh, x, None, "tensor", None)), cache)


def _with_kernels_cast(c: DecoderConfig, params: Params) -> Params:
    """Params over devices or on a TPU, whose layers' kernels are in the compute dtype before the loop over the layers.

    Their gradients come out of the loop as they are computed, too. Were they cast within it, they would be float32
    there, of all layers, and a TPU's compiler takes the cast before the loop all the same.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf.astype(c.dtype) if path[-1].key == "kernel" and not quantized.is_quantized(leaf) else leaf

    if c.mesh is None and jax.default_backend() != "tpu":
        return params
    layers = jax.tree_util.tree_map_with_path(cast, params["layers"], is_leaf=quantized.is_quantized)
    return params | {"layers": layers}


def _of_layers(given: Array | None) -> Array | None:
    """Experts `[B, G, S, L, k]` as `[L, B, G, S, k]`."""
    return None if given is None else jnp.moveaxis(given, 3, 0)


def _routes(routed: Routed | None) -> Routes | None:
    """What the routers of all layers did, layers after tokens."""
    if routed is None:
        return None
    sums = [None if x is None else jnp.moveaxis(x, 0, 2) for x in (routed.probabilities, routed.choices)]
    return Routes(jnp.moveaxis(routed.experts, 0, 3), *sums)


@functools.cache
def decoder(config: DecoderConfig) -> Policy:
    """The decoder as a policy; the same config gives the same functions, so that jit does not compile again."""
    if config.mesh is not None:
        head_copies(config.mesh.shape["tensor"], config.num_heads, config.num_kv_heads)
    module = Decoder(config)
    apply: Callable[..., Any] = module.apply  # its own type allows for mutable collections

    def init(key: PRNGKey) -> Params:
        tokens = jnp.zeros((1, 1, 1), jnp.int32)
        return module.init(key, (Stream(tokens, MaskInputs(tokens, tokens)),))["params"]

    in_float32 = {"router", "router_bias", "sinks"} | ({"scale"} if config.norm_float32 else set())

    def cast(params: Params) -> Params:
        def cast_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            if quantized.is_quantized(leaf) or path[-1].key in in_float32:
                return leaf  # which is used as it is
            head = "embed_tokens" if config.tie_embeddings else "lm_head"
            if path[0].key == "norm" and config.last_norm_dtype is not None:
                return leaf.astype(config.last_norm_dtype)
            return leaf.astype(config.logits_dtype if path[0].key == head else config.dtype)

        cast = jax.tree_util.tree_map_with_path(cast_leaf, params, is_leaf=quantized.is_quantized)
        return sharding.gather_all(config.mesh, cast)

    def for_decoding(params: Params) -> Params:
        if not _apart(config):
            return params
        return params | {"layers": [_layer(params["layers"], n) for n in range(config.num_layers)]}

    def check_positions(highest: int) -> None:
        if config.max_positions is not None and highest > config.max_positions:
            raise ValueError(
                f"{highest} positions of prompt and completion, and this model's rotation is another beyond "
                f"{config.max_positions}, for all of a batch's tokens, which the decoder does not do: take fewer tokens"
            )

    def of_prompts(tokens: Array, lengths: Array) -> Stream:
        tokens = tokens[:, None, :-1]  # the last column can only hold a last token, which the completions' stream has
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        # A pad id may lie outside the vocabulary; its embedding is NaN, and a weight of 0 does not remove that.
        return Stream(jnp.where(positions < lengths[:, None, None], tokens, 0), MaskInputs(positions, positions))

    def prefill(params: Params, tokens: Array, lengths: Array) -> PromptCache:
        check_positions(tokens.shape[-1])
        _, _, new, _ = apply({"params": params}, (of_prompts(tokens, lengths),))
        layers = jax.tree.map(lambda layers: layers[:, :, 0], new)
        return PromptCache(_constrain_layers(config, layers), lengths - 1)

    def init_cache(B: int, G: int, T: int) -> Cache:
        dtype = config.dtype if config.cache_dtype is None else config.cache_dtype
        positions, column = jnp.full((B, G, T), -1, jnp.int32), jnp.zeros((), jnp.int32)
        if _apart(config):
            empty = jnp.zeros((B, G, config.num_kv_heads, T, config.head_dim), dtype)
            return Cache([KeyValues(empty, empty)] * config.num_layers, positions, column)
        empty = jnp.zeros((config.num_layers, B, G, T, config.num_kv_heads, config.head_dim), dtype)
        return Cache(_constrain_layers(config, KeyValues(empty, empty)), positions, column)

    def extend_routed(
        params: Params,
        tokens: Array,
        positions: Array,
        prompt_cache: PromptCache,
        cache: Cache | None = None,
        segments: Array | None = None,
        columns: int | None = None,
        given: Array | None = None,
        counted: Array | None = None,
        descendants: Array | None = None,
    ) -> tuple[Array, Cache | None, Routes | None]:
        own, column, stored = positions, None, None
        if cache is not None:
            stored, column = cache.layers, cache.column % cache.positions.shape[-1]
            written = jax.lax.dynamic_update_slice(cache.positions, positions, (0, 0, column))
            own = written[..., :columns]
        if segments is not None and cache is not None:
            raise ValueError("segments keep packed completions apart and go without a cache")
        check_positions(prompt_cache.layers.keys.shape[2] + 1 + own.shape[-1])
        held = jnp.broadcast_to(prompt_cache.lengths[:, None], positions.shape[:2])
        stream = Stream(tokens, MaskInputs(positions, own, held, segments, descendants=descendants))
        hidden, stored, _, routed = apply(
            {"params": params}, (stream,), prompt_cache.layers, stored, column, _of_layers(given), counted
        )
        cache = None if cache is None else Cache(stored, written, cache.column + tokens.shape[-1])
        return hidden, cache, _routes(routed)

    def forward(
        params: Params,
        prompts: Array,
        lengths: Array,
        tokens: Array,
        positions: Array,
        segments: Array | None = None,
        descendants: Array | None = None,
        given: Array | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, Routes | None]:
        check_positions(prompts.shape[-1] + tokens.shape[-1])
        held = jnp.broadcast_to(lengths[:, None] - 1, positions.shape[:2])
        stream = Stream(tokens, MaskInputs(positions, positions, held, segments, descendants=descendants))
        streams = of_prompts(prompts, lengths), stream
        params = _with_kernels_cast(config, params)
        hidden, _, _, routed = apply({"params": params}, streams, given=_of_layers(given), counted=counted)
        return hidden, _routes(routed)

    def extend(*arguments: Any, **options: Any) -> tuple[Array, Cache | None]:
        hidden, cache, _ = extend_routed(*arguments, **options)
        return hidden, cache

    def unembed(params: Params, hidden: Array) -> Array:
        return apply({"params": params}, hidden, method="unembed")

    def gather_prompts(prompt_cache: PromptCache, rows: Array) -> PromptCache:
        layers = jax.tree.map(lambda layers: layers[:, rows], prompt_cache.layers)
        return PromptCache(_constrain_layers(config, layers), prompt_cache.lengths[rows])

    def gather_rows(cache: Cache, rows: Array) -> Cache:
        positions = cache.positions[rows]
        if isinstance(cache.layers, list):
            return cache._replace(layers=jax.tree.map(lambda x: x[rows], cache.layers), positions=positions)
        layers = jax.tree.map(lambda layers: layers[:, rows], cache.layers)
        return cache._replace(layers=_constrain_layers(config, layers), positions=positions)

    def compact(cache: Cache, ends: Array) -> Cache:
        order, positions, column = kept_columns(cache.positions, ends)
        if isinstance(cache.layers, list):
            move = functools.partial(jnp.take_along_axis, indices=order[:, :, None, :, None], axis=3)
            return Cache(jax.tree.map(move, cache.layers), positions, column)
        order = order[None, ..., None, None]
        layers = jax.tree.map(lambda layers: jnp.take_along_axis(layers, order, axis=3), cache.layers)
        return Cache(_constrain_layers(config, layers), positions, column)

    return Policy(
        config, init, cast, prefill, init_cache, extend, unembed, gather_prompts, reset_rows, gather_rows, compact,
        for_decoding=for_decoding,
        by_rows=functools.partial(sharding.by_rows, config.mesh, config.dtype),
        extend_routed=None if config.experts is None else extend_routed,
        forward=forward,
    )  # fmt: skip
