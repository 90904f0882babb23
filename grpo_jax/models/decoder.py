"""A decoder-only transformer behind the policy contract.

Letters: `B` prompts, `G` completions, `S` tokens read now, `C` columns of the
completions' cache, `P` prompt columns, `D` width, `N` query heads, `K` key-value
heads, `h` head width, `L` layers. The layers are one scanned block, so params
are stacked on axis 0 and compile time does not grow with depth.
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
    def __call__(self, x: Array) -> Array:
        c = self.config
        initializer = nn.initializers.constant(1.0 - c.norm_offset)
        scale = sharding.gather(c.mesh, self.param("scale", initializer, (x.shape[-1],), c.param_dtype), "scale")
        if c.norm_offset:
            scale = scale.astype(jnp.float32) + c.norm_offset
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.rms_norm_eps)
        if c.norm_float32:
            return (scale.astype(jnp.float32) * normed).astype(c.dtype)
        return scale.astype(c.dtype) * normed.astype(c.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`; the kernel may be quantised, and what adapters beside it add is added."""

    config: DecoderConfig
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, x = self.config, x.astype(self.config.dtype)
        kernel: Any = self.get_variable("params", "kernel")
        if not quantized.is_quantized(kernel):
            initializer = nn.initializers.normal(c.initializer_range)
            kernel = self.param("kernel", initializer, (x.shape[-1], self.features), c.param_dtype)
        y = self._product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype)
            y = y + self._gathered(bias, "bias").astype(c.dtype)
        if self.has_variable("params", lora.A):
            a, b = (self._gathered(self.get_variable("params", name), name) for name in (lora.A, lora.B))
            y = y + lora.delta(x, a, b, self.get_variable("params", lora.SCALE))
        return y

    def _product(self, x: Array, kernel: Any) -> Array:
        dtype = self.config.dtype

        def product(x: Array, kernel: Any) -> Array:
            kernel = kernel if quantized.is_quantized(kernel) else kernel.astype(dtype)
            return x @ quantized.dequantize(self._gathered(kernel, "kernel")).astype(dtype)

        # For the backward pass codes are kept, not floats; with rematerialisation neither is.
        apart = quantized.is_quantized(kernel) and not self.config.remat
        return (jax.checkpoint(product) if apart else product)(x, kernel)

    def _gathered(self, leaf: Any, name: str) -> Any:
        return sharding.gather(self.config.mesh, leaf, f"{self.name}/{name}")


class Attention(nn.Module):
    """Projections, rotation, the cache and the joint attention of one layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: tuple[KeyValues, Array] | None,
        layer: Array | None,
        prompt: KeyValues | None,
        mask_inputs: MaskInputs,
        rotation: tuple[Array, Array],
    ) -> tuple[Array, KeyValues | None, KeyValues]:
        """Reads `x [B, G, S, D]`; returns the output, the cache and the new keys and values.

        The cache is of all layers, of which this one is `layer`; or of this layer alone, and `layer` is None.
        """
        c = self.config
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        rows = _rows(c, x)
        query, key, value = (
            Linear(c, number * c.head_dim, c.qkv_bias, name=name)(rows) for name, number in heads.items()
        )
        if c.qk_norm == "width":
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)
        query, key, value = (
            y.reshape(*x.shape[:-1], y.shape[-1] // c.head_dim, c.head_dim) for y in (query, key, value)
        )
        if c.qk_norm == "head":
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)
        query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        if c.query_scale is not None:  # an attention divides by the root of the width
            query = _scaled(query, c.query_scale * c.head_dim**0.5)
        query, key, value = (sharding.constrain(c.mesh, x, None, "tensor", None) for x in (query, key, value))

        own = new = KeyValues(key, value)
        stored = None
        if cache is not None:
            stored, own = _written(*cache, layer, new, mask_inputs.own.shape[-1])

        options: dict[str, Any] = {}
        if c.attention_soft_cap is not None:
            options["soft_cap"] = c.attention_soft_cap
        if c.attention_sinks:
            initializer = nn.initializers.normal(c.initializer_range)
            options["sinks"] = self.param("sinks", initializer, (c.num_heads,), c.param_dtype)
        if c.remat:
            # Masks are the same in all layers, so that JAX takes them out of the loop over these and keeps them until
            # the backward pass, a byte for each query, key and head. Bound to the query they stay within their layer.
            query, mask_inputs = jax.lax.optimization_barrier((query, mask_inputs))
        out = over_mesh(c.attention, c.mesh)(query, own, prompt, mask_inputs, **options)
        out = _rows(c, out.reshape(*x.shape[:-1], c.num_heads * c.head_dim))
        out = Linear(c, c.hidden_size, c.o_bias, name="o_proj")(out)
        return out.reshape(x.shape), stored, new


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
    def __call__(self, x: Array) -> Array:
        c = self.config
        rows = _rows(c, x)
        gate = Linear(c, c.intermediate_size, c.mlp_bias, name="gate_proj")(rows)
        up = Linear(c, c.intermediate_size, c.mlp_bias, name="up_proj")(rows)
        product = float16.in_float32(lambda gate, up: c.activation(gate) * up, gate, up)
        return Linear(c, c.hidden_size, c.mlp_bias, name="down_proj")(product).reshape(x.shape)


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
    def __call__(self, x: Array, given: Array | None, counted: Array | None) -> tuple[Array, Routed]:
        """Of `x [B, G, S, D]`, by the experts given `[B, G, S, k]`, if any; `counted [B, G, S]` as in `Routed`."""
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

        def of_rows(given: tuple[Array, Array | None, Array | None], weights: Params) -> tuple[Array, Routed]:
            x, chosen, counted = given
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

        # As in `Linear`, codes are kept for the backward pass, not floats.
        apart = quantized.is_quantized(weights["experts_gate"]["kernel"]) and not c.remat
        compute = jax.checkpoint(of_rows) if apart else of_rows
        return sharding.each_its_rows(c.mesh, compute)((x.astype(c.dtype), given, counted), weights)


class Block(nn.Module):
    """One layer; its cache, or that of all layers, rides in the carry, which is updated in place."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KeyValues | None],
        layer: Array | None,
        prompt: KeyValues | None,
        window: Array | None,
        which_rotation: Array | None,
        given: Array | None,
        mask_inputs: MaskInputs,
        rotations: tuple[Array, Array],
        column: Array | None,
        counted: Array | None,
    ) -> tuple[tuple[Array, KeyValues | None], tuple[KeyValues, Routed | None]]:
        c = self.config
        x, stored = carry
        cache = None if stored is None or column is None else (stored, column)
        rotation = rotations if which_rotation is None else jax.tree.map(lambda x: x[which_rotation], rotations)

        def norm(x: Array, name: str, there: bool) -> Array:
            return RMSNorm(c, name=name)(x) if there else x

        # Where there are four norms, transformers calls the second of them what is else the one before the MLP.
        before_mlp = "pre_feedforward_layernorm" if c.post_norm else "post_attention_layernorm"
        out, stored, new = Attention(c, name="self_attn")(
            norm(x, "input_layernorm", c.pre_norm),
            cache,
            layer,
            prompt,
            mask_inputs._replace(window=window),
            rotation,
        )
        x = float16.within(x + _scaled(norm(out, "post_attention_layernorm", c.post_norm), c.residual_scale))
        x = sharding.constrain(c.mesh, x, None, None)
        read, routed = norm(x, before_mlp, c.pre_norm), None
        if c.experts is None:
            out = MLP(c, name="mlp")(read)
        else:
            out, routed = Mixture(c, name="mlp")(read, given, counted)
        x = float16.within(x + _scaled(norm(out, "post_feedforward_layernorm", c.post_norm), c.residual_scale))
        return (sharding.constrain(c.mesh, x, None, None), stored), (new, routed)


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
        )(c)
        last_dtype = c.dtype if c.last_norm_dtype is None else c.last_norm_dtype
        self.norm = RMSNorm(dataclasses.replace(c, dtype=last_dtype))
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", initializer, (c.hidden_size, c.vocab_size), c.param_dtype)

    def __call__(
        self,
        tokens: Array,
        mask_inputs: MaskInputs,
        prompt: KeyValues | None,
        stored: KeyValues | list[KeyValues] | None,
        column: Array | None,
        given: Array | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, KeyValues | list[KeyValues] | None, KeyValues, Routed | None]:
        """Hidden states `[B, G, S, D]`, the updated cache, and keys, values and routes of every layer.

        By the experts `given [L, B, G, S, k]`, if any.
        """
        c = self.config
        windows = None
        if c.windows is not None:
            no_limit = np.iinfo(np.int32).max
            windows = jnp.array([no_limit if window is None else window for window in c.windows], jnp.int32)
        x = self._embed(tokens)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        rotations, which_rotation = _rotations(c, mask_inputs.queries)
        of_layers = (prompt, windows, which_rotation, given)
        of_all = (mask_inputs, rotations, column, counted)
        if isinstance(stored, list):
            x, stored, (new, routed) = self._layers_apart(x, stored, of_layers, of_all)
        else:
            (x, stored), (new, routed) = self.layers((x, stored), jnp.arange(c.num_layers), *of_layers, *of_all)
        return self.norm(x), stored, new, routed

    def _layers_apart(
        self, x: Array, stored: list[KeyValues], of_layers: tuple[Any, ...], of_all: tuple[Any, ...]
    ) -> tuple[Array, list[KeyValues], tuple[KeyValues, Routed | None]]:
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

    def _embed(self, tokens: Array) -> Array:
        c = self.config
        if c.mesh is None:
            return self.embed_tokens(tokens)
        return sharding.look_up(c.mesh, self.embed_tokens.embedding.astype(c.dtype), tokens)

    def unembed(self, hidden: Array) -> Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`."""
        c = self.config
        if c.tie_embeddings:
            head = sharding.gather(c.mesh, self.embed_tokens.embedding, "embed_tokens/embedding").T
        else:
            head = sharding.gather(c.mesh, self.lm_head, "lm_head")
        rows = _rows(c, hidden).astype(c.logits_dtype)
        logits = jnp.matmul(rows, head.astype(c.logits_dtype), preferred_element_type=jnp.float32)
        logits = _soft_capped(logits / c.logits_divisor if c.logits_divisor != 1 else logits, c.logits_soft_cap)
        return sharding.constrain(c.mesh, logits.reshape(*hidden.shape[:-1], c.vocab_size), "tensor")


def _rows(c: DecoderConfig, x: Array) -> Array:
    """`[..., D]` as `[N, D]`: gradients of plain matrix products are faster on CPUs. Rows over devices stay apart."""
    return x.reshape(-1, x.shape[-1]) if c.mesh is None else x


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


@functools.cache
def decoder(config: DecoderConfig) -> Policy:
    """The decoder as a policy; the same config gives the same functions, so that jit does not compile again."""
    if config.mesh is not None:
        head_copies(config.mesh.shape["tensor"], config.num_heads, config.num_kv_heads)
    module = Decoder(config)
    apply: Callable[..., Any] = module.apply  # its own type allows for mutable collections

    def init(key: PRNGKey) -> Params:
        tokens = jnp.zeros((1, 1, 1), jnp.int32)
        return module.init(key, tokens, MaskInputs(tokens, tokens), None, None, None)["params"]

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

    def prefill(params: Params, tokens: Array, lengths: Array) -> PromptCache:
        check_positions(tokens.shape[-1])
        tokens = tokens[:, None, :-1]  # the last column can only hold a last token, which `extend` reads
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        # A pad id may lie outside the vocabulary; its embedding is NaN, and a weight of 0 does not remove that.
        tokens = jnp.where(positions < lengths[:, None, None], tokens, 0)
        _, _, new, _ = apply({"params": params}, tokens, MaskInputs(positions, positions), None, None, None)
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
        mask_inputs = MaskInputs(positions, own, held, segments, descendants=descendants)
        of_layers = None if given is None else jnp.moveaxis(given, 3, 0)
        hidden, stored, _, routed = apply(
            {"params": params}, tokens, mask_inputs, prompt_cache.layers, stored, column, of_layers, counted
        )
        cache = None if cache is None else Cache(stored, written, cache.column + tokens.shape[-1])
        if routed is None:
            return hidden, cache, None
        sums = [None if x is None else jnp.moveaxis(x, 0, 2) for x in (routed.probabilities, routed.choices)]
        return hidden, cache, Routes(jnp.moveaxis(routed.experts, 0, 3), *sums)

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
        by_rows=functools.partial(sharding.by_rows, config.mesh),
        extend_routed=None if config.experts is None else extend_routed,
    )  # fmt: skip
