"""The pictures of the objectives' pages, drawn from the losses themselves when the site is built."""

import functools
import io
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from grpo_jax import losses
from grpo_jax.protocols import Loss, Penalty
from grpo_jax.types import Array, Experience, Rollout, Scores

BLUE, VERMILION, GREEN, PURPLE, BLACK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#222222", "#b0b0b0"
COMPARED = losses.grpo()  # in grey, with each of the others
MAX_TOKENS = 200  # the limit of sampling in these pictures
WIDE, NARROW = jnp.linspace(jnp.log(0.1), jnp.log(10), 401), jnp.linspace(-0.004, 0.004, 401)

OBJECTIVES: dict[str, tuple[Loss, Array]] = {
    "grpo": (COMPARED, WIDE),
    "grpo_delta": (losses.grpo(delta=4.0), WIDE),
    "bnpo": (losses.bnpo(), WIDE),
    "dr_grpo": (losses.dr_grpo(MAX_TOKENS), WIDE),
    "dapo": (losses.dapo(), WIDE),
    "gspo": (losses.gspo(), NARROW),
    "gspo_token": (losses.gspo_token(), NARROW),
    "luspo": (losses.luspo(), NARROW),
    "gmpo": (losses.gmpo(), WIDE),
    "cispo": (losses.cispo(), WIDE),
    "sapo": (losses.sapo(), WIDE),
    "vespo": (losses.vespo(), WIDE),
    "reinforce": (losses.reinforce(), WIDE),
    "dppo": (losses.dppo(), WIDE),
    "drpo": (losses.drpo(), WIDE),
    "dro": (losses.dro(beta=0.5), WIDE),
    "pspo": (losses.pspo(), WIDE),
    "m2po": (losses.m2po(), WIDE),
    "kl_cov": (losses.kl_cov(), WIDE),
}


def draw_all() -> Iterator[tuple[str, str]]:
    """Yields the name and the SVG of each picture."""
    for name, (loss, log_ratios) in OBJECTIVES.items():
        yield name, objective(name, loss, log_ratios)
    yield "aggregates", aggregates()
    yield "penalties", penalties()


# ------------------------------------------------------------------------- the numbers


def push(loss: Loss, log_ratio: Array, advantages: Array, mask: Array, log_ref: Array | float = 0.0) -> Array:
    """`-d loss / d log_prob` of each token `[B, G, T]`; `log_ref` is log p - log ref."""
    old = jnp.full(mask.shape, -3.0)  # any value: only differences count
    rollout = Rollout(None, None, mask.sum(-1), mask, old, None)  # type: ignore[arg-type]
    log_probs = old + log_ratio
    experience = Experience(
        rollout,
        old_log_probs=old,
        advantages=advantages,
        ref_log_probs=log_probs - log_ref,
        high_covariance=jnp.zeros(mask.shape, bool),
    )
    return -jax.grad(lambda x: losses.value(loss(Scores(x), experience)[0]))(log_probs)


@functools.partial(jax.jit, static_argnums=0)
def by_ratio(loss: Loss, log_ratios: Array, advantage: float) -> Array:
    """The weight of the token of a completion of one token, relative to ratio 1."""
    mask, advantages = jnp.ones((1, 1, 1), bool), jnp.full((1, 1), advantage)

    def at(log_ratio: Array) -> Array:
        return push(loss, jnp.full((1, 1, 1), log_ratio), advantages, mask)[0, 0, 0]

    return jax.vmap(at)(log_ratios) / at(jnp.zeros(()))


@functools.partial(jax.jit, static_argnums=0)
def by_length(loss: Loss) -> Array:
    """`[n, 2]`: the weight of a token of a completion of `n` tokens, and of one of its neighbour of 50 tokens."""

    def at(n: Array) -> Array:
        mask = jnp.arange(MAX_TOKENS) < jnp.full((2, 4), 50).at[0, 0].set(n)[..., None]
        return push(loss, jnp.zeros(mask.shape), jnp.ones((2, 4)), mask)[0, :2, 0]

    return jax.vmap(at)(jnp.arange(1, MAX_TOKENS + 1)) / at(jnp.array(50))


# ------------------------------------------------------------------------ the pictures


def objective(name: str, loss: Loss, log_ratios: Array) -> str:
    """Three panels: the weight by the ratio for either sign of the advantage, and by the length."""
    figure, (positive, negative, length) = _figure(3, height=2.6)
    ratios = jnp.exp(log_ratios)
    for axes, advantage in ((positive, 1.0), (negative, -1.0)):
        axes.plot(ratios, ratios, ":", color=GREY, linewidth=1.2)
        if name != "grpo":
            axes.plot(ratios, by_ratio(COMPARED, log_ratios, advantage), color=GREY, linewidth=4, solid_capstyle="butt")
        axes.plot(ratios, by_ratio(loss, log_ratios, advantage), color=BLUE)
        axes.plot(1, 1, "o", color=BLACK, markersize=4)
        (_narrow_axes if log_ratios is NARROW else _wide_axes)(axes)
        axes.set_xlabel("ratio to the policy that sampled")
        axes.set_title(f"{'positive' if advantage > 0 else 'negative'} advantage")
    positive.set_ylabel("weight of the gradient")
    if name != "grpo":
        _plot_lengths(length, by_length(COMPARED)[:, 0], GREY, linewidth=4)
    _plot_lengths(length, by_length(loss)[:, 0], BLUE)
    _length_axes(length, (0.25, 0.5, 1, 2, 5, 10, 50))
    length.set_title("one token of a completion")
    return _svg(figure)


def aggregates() -> str:
    """How tokens count, in three panels: a token, its completion, a token of its neighbour."""
    kinds = {
        "completion_mean": (losses.completion_mean, BLUE, "-"),
        "token_mean": (losses.token_mean, VERMILION, "-"),
        "prompt_mean": (losses.prompt_mean, GREEN, "-"),
        "constant_length": (losses.constant_length(MAX_TOKENS), PURPLE, "-"),
        "completion_sum": (losses.completion_sum, BLACK, "--"),
    }
    figure, (token, completion, neighbour) = _figure(3, height=3.3)
    n = jnp.arange(1, MAX_TOKENS + 1)
    for name, (aggregate, color, style) in kinds.items():
        weights = by_length(losses.policy_loss(losses.policy_gradient(), aggregate))
        _plot_lengths(token, weights[:, 0], color, linestyle=style, label=name)
        _plot_lengths(completion, weights[:, 0] * n / 50, color, linestyle=style)
        _plot_lengths(neighbour, weights[:, 1], color, linestyle=style)
    _length_axes(token, (0.25, 0.5, 1, 2, 5, 10, 50))
    _length_axes(completion, (0.02, 0.1, 0.5, 1, 2, 4))
    _length_axes(neighbour, (0.5, 0.75, 1, 1.25))
    token.set_title("one of its tokens")
    completion.set_title("the whole completion")
    neighbour.set_title("a token of its neighbour")
    token.set_ylabel("weight, relative to n = 50")
    token.legend(frameon=False, fontsize=7.5, handlelength=1.6)
    return _svg(figure)


def penalties() -> str:
    """The estimates of the divergence and what they do to a token's log-prob."""
    kinds: dict[str, tuple[Callable, Callable, str]] = {
        "k1": (losses.k1, losses.kl_k1, BLUE),
        "k2": (losses.k2, losses.kl_k2, VERMILION),
        "k3": (losses.k3, losses.kl_k3, GREEN),
    }
    d = jnp.linspace(-2, 2, 201)
    mask, advantages = jnp.ones((1, d.size, 1), bool), jnp.zeros((1, d.size))

    def pull(penalty: Penalty) -> Array:
        loss = losses.penalty_loss(penalty, losses.token_mean)
        return d.size * push(loss, jnp.zeros(mask.shape), advantages, mask, d[None, :, None])[0, :, 0]

    figure, panels = _figure(3, height=2.9)
    for name, (penalty, estimate, color) in kinds.items():
        curves = (estimate(d, jnp.zeros_like(d)), pull(penalty(1.0)), pull(penalty(1.0, correction=losses.token_ratio)))
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(d, curve, color=color, label=name)
    for axes, title in zip(panels, ("cost", "push of the estimate", "push of ratio times estimate"), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set_xlabel("log p - log ref of the token")
        axes.set_title(title)
        axes.set_ylim(-4, 7)
    panels[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def _figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = [figure.add_subplot(1, columns, 1 + column) for column in range(columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        axes.title.set_size(9)
    return figure, panels


def _wide_axes(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.5, 1, 2, 10], ["0.1", "0.5", "1", "2", "10"])
    axes.minorticks_off()
    # 0 can be seen, and 10 is not far away
    axes.set_yscale("function", functions=(lambda y: np.sign(y) * np.sqrt(np.abs(y)), lambda y: np.sign(y) * y**2))
    axes.set_yticks([0, 0.5, 1, 2, 5, 10], ["0", "0.5", "1", "2", "5", "10"])
    axes.set_xlim(0.1, 10)
    axes.set_ylim(-0.01, 11)


def _narrow_axes(axes: Axes) -> None:
    axes.set_xticks([0.996, 0.998, 1, 1.002, 1.004], ["0.996", "0.998", "1", "1.002", "1.004"])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlim(0.996, 1.004)
    axes.set_ylim(-0.03, 1.25)


def _plot_lengths(axes: Axes, weights: Array, color: str, **style: object) -> None:
    axes.plot(jnp.arange(1, MAX_TOKENS + 1), weights, color=color, **style)


def _length_axes(axes: Axes, ticks: tuple[float, ...]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 5, 20, 50, 200], ["1", "5", "20", "50", "200"])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("length n of the completion")
    axes.plot(50, 1, "o", color=BLACK, markersize=4)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(text, format="svg")
    return text.getvalue()
