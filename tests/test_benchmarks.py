"""The benchmark: the arithmetic of its report and of its floor, and our worker on a tiny cell. Needs no peer."""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import (
    cells,
    decode,
    distillation,
    first_steps,
    floor,
    gpu,
    growth,
    loading,
    long,
    ours,
    report,
    run,
    scaling,
    settings,
    startup,
    tpu,
    worker,
)
from grpo_jax import models, sampling
from grpo_jax.models import attention

MODEL = cells.Model(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocabulary=64)
MIXTURE = MODEL._replace(family="mixtral", experts=4, per_token=2)
GEMMA = MODEL._replace(family="gemma3_text", layers=6, window=3, tied=True)
CELL = cells.Cell("W1", MODEL, prompts=2, group=4, prompt_tokens=6, completion_tokens=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cells.write_checkpoint(MODEL, tmp_path_factory.mktemp("benchmark") / "model")


def a_step(system, whole, *, peak=100.0, cell="W1", **fields):
    phases = {"generate": whole / 2, "score": whole / 8, "train": whole * 3 / 8}
    return {"kind": "step", "cell": cell, "system": system, "whole": whole, "peak_mib": peak, **phases, **fields}


@pytest.mark.slow
def test_a_worker_answers_each_request_with_the_seconds_of_a_step(tmp_path, checkpoint):
    arguments = {"cell": cells.to_json(CELL), "checkpoint": str(checkpoint), "programs": str(tmp_path / "programs")}
    started = worker.start(sys.executable, "ours", arguments, tmp_path / "log")
    try:
        assert worker.receive(started) == {"ready": True}
        first, second = worker.ask(started, {}), worker.ask(started, {})
    finally:
        worker.stop(started)
    assert first["whole"] > second["whole"] > 0  # the first compiles the sampler
    assert second["programs"] == 1
    assert sum(second[phase] for phase in report.PHASES) <= second["whole"] * 1.001
    assert second["lengths"] == [9] * 8  # none ended: one more than the longest
    assert second["peak_mib"] >= first["peak_mib"] > 100  # of the run so far


def test_a_peak_is_forgotten():
    block = np.ones(2**25)  # 256 MiB
    reached = worker.peak_memory()
    del block
    worker.forget_peak()
    assert worker.peak_memory() < reached - 200


def test_loading_is_timed_with_what_the_host_held(checkpoint):
    found = loading.read("ours", checkpoint)
    assert 0 < found["seconds"] < 300
    assert found["peak_mib"] >= 0


def test_a_worker_that_fails_says_why(tmp_path):
    started = worker.start(sys.executable, "ours", {"checkpoint": "nowhere"}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="KeyError"):
        worker.receive(started)
    worker.stop(started)


def test_lengths_that_our_sampler_draws_have_the_mean_asked_for():
    policy = models.decoder(models.from_hf_config(cells.hf_config(MODEL)))
    params = jax.jit(policy.init)(jax.random.key(0))
    rollout = sampling.sampler(group_size=512, max_tokens=64, eos_ids=(cells.END,))(
        ours.ends_at_random(policy, 4), params, ours.prompts_of(CELL, 0), jax.random.key(0))  # fmt: skip
    drawn = np.asarray(rollout.lengths)
    assert abs(drawn.mean() - 4) < 4 * math.sqrt(12 / drawn.size)  # a geometric variance is (1 - p) / p^2
    assert abs((drawn == 1).mean() - 1 / 4) < 4 * math.sqrt(3 / 16 / drawn.size)


def test_lengths_of_the_other_systems_are_within_the_cell():
    cell = CELL._replace(mean_length=4)
    assert cells.draw_lengths(cell, 0) != cells.draw_lengths(cell, 1)
    assert set(cells.draw_lengths(cell, 0)) <= set(range(1, cell.completion_tokens + 2))


def test_a_cell_and_its_prompts_survive_the_way_to_a_worker():
    assert cells.from_json(json.loads(json.dumps(cells.to_json(CELL)))) == CELL
    tokens = cells.prompt_tokens(CELL, 3)
    np.testing.assert_array_equal(tokens, cells.prompt_tokens(CELL, 3))
    fast = cells.tokenizer(MODEL)
    assert fast([cells.text(row) for row in tokens])["input_ids"] == tokens.tolist()


def test_medians_ratios_and_targets_are_those_of_the_lines():
    lines = [a_step("ours", whole, peak=50.0 + whole) for whole in (1.0, 2.0, 9.0)]
    lines += [a_step("trl", whole, peak=100.0) for whole in (5.0, 3.0, 4.0)]
    assert report.medians(lines, "W1", "ours") == {
        "whole": 2.0, "generate": 1.0, "score": 0.25, "train": 0.75,
        "steps": 3, "least": 1.0, "most": 9.0, "peak_mib": 59.0,
    }  # fmt: skip
    assert report.medians(lines, "W2", "ours") is None
    assert report.targets(lines) == [
        ("W1", "whole step", "2x faster", "2.00x", True),
        ("W1", "peak memory, warm", "at most 1 of TRL's", "0.59", True),
    ]
    for products, reached in ((1.0, False), (1.3, False), (1.4, True)):  # generation takes half of a step
        found = report.targets([*lines, a_step("floor", products)])
        ratio = f"{2 / products:.2f}"
        assert found[2:] == [("W1", "generation alone", "at most 1.5 of its products", ratio, reached)]
    slower = [line | {"whole": 8.0} if line["system"] == "ours" else line for line in lines]
    assert not report.targets(slower)[0][-1]


def test_growth_is_the_exponent():
    xs = [1.0, 2.0, 4.0, 8.0]
    assert report.growth(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert report.growth(xs, [7.0] * 4) == pytest.approx(0.0)


def test_the_report_holds_a_table_of_each_kind_of_line_and_a_plot(tmp_path):
    flops = {"generate": 1e9, "score": 2e9, "train": 6e9}
    sizes = [
        {"kind": "scaling", "axis": "G", "x": x, "seconds": 0.1 * x, "mib": 5.0 * x, "generate": 0.0, "learn": 0.0}
        for x in (4, 8, 16)
    ]
    lines = [
        {"kind": "machine", "cpu": "abacus", "cores": 2},
        a_step("ours", 2.0),
        a_step("trl", 4.0, micro_batch=16),
        a_step("floor", 1.0, flops=flops),
        {"kind": "cold", "cell": "W1", "peak_mib": 300.0},
        {"kind": "calibration", "cell": "W1", "micro_batch": 16, "whole": 4.0, "peak_mib": 100.0, "kept": True},
        {"kind": "agreement", "cell": "W1", "float32": 1e-6, "bfloat16": 1e-1},
        *sizes,
        {
            "kind": "whole_run", "seeds": 8, "in_turn": 8.0, "vmapped": 4.0, "compile_one": 1.0,
            "compile_vmapped": 2.0, "largest_difference": 0.0,
        },
        {"kind": "startup", "kept": True, "first_step": 1.25, "whole": 9.0},
        {"kind": "left_out", "what": "tunix on W1", "why": "not there"},
    ]  # fmt: skip
    path = tmp_path / "cpu.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    written = report.write(path).read_text()
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    for expected in (
        "abacus",
        "| W1 | grpo_jax | 2.00 (2.00-2.00) | 1.00 | 0.25 | 0.75 | 100 | 300 | 2.00x | 1 |",
        "| W1 | TRL, micro-batches of 16 | 4.00 (4.00-4.00) | 2.00 | 0.50 | 1.50 | 100 |  | 1.00x | 1 |",
        "| W1 | sampler against scorer, bfloat16 | within 0.03 | 1.0e-01 | **no** |",
        "| W1 | generate | 1 | 0.50 | 2.0 | 4.0 |  |",
        "| G | 4, 8, 16 | 0.40, 0.80, 1.60 | 20, 40, 80 | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| 8 | 8.00 | 4.00 | 2.00x | 1.0 | 2.0 | 0.0e+00 |",
        "| kept | 1.2 | 9.0 |",
        "- tunix on W1: not there",
    ):
        assert expected in written, written


@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "experts"])
def test_the_floor_counts_what_its_products_compute(model):
    cell = CELL._replace(model=model)
    read, decode = floor.phases(cell, [8] * 8)["generate"]
    assert (read.rows, decode.rows, decode.times) == (12, 8, 8)
    weights, inputs = floor.random_weights(model), floor.random_inputs(model, decode.rows)
    compiled = floor.run_products.lower(weights, inputs, head_rows=8, times=1, backward=False).compile()
    of_one_layer = 2 * 8 * model.read_weights  # XLA counts the body of a loop once
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(of_one_layer + 2 * 8 * model.hidden * model.vocabulary, rel=0.1)
    assert floor.phase_flops(cell, [8] * 8)["generate"] == pytest.approx(floor.phase_flops(cell, [8] * 8)["score"])


@pytest.mark.parametrize("model", [MODEL, MIXTURE, GEMMA], ids=lambda model: model.family)
def test_layer_weights_and_windows_are_those_of_the_model(model):
    config = models.from_hf_config(cells.hf_config(model))
    assert config.tie_embeddings == model.tied
    assert config.windows == (None if model.window is None else tuple(model.windows))
    shapes = jax.eval_shape(models.decoder(config).init, jax.random.key(0))
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel"]
    assert sum(math.prod(x.shape) for x in kernels) == model.layers * model.layer_weights


def test_the_floor_charges_the_pairs_that_windows_let_see():
    lengths = [2, 8, 1, 3, 3, 8, 8, 8]

    def pairs(first, last):
        found = [
            sum(key <= query and (window is None or query - key < window) for key in range(last))
            for window in GEMMA.windows
            for query in range(first, last)
        ]
        return sum(found) / GEMMA.layers

    P = CELL.prompt_tokens
    expected = CELL.prompts * pairs(0, P), sum(pairs(P, P + n) for n in lengths)
    assert floor.causal_pairs(CELL._replace(model=GEMMA), lengths) == pytest.approx(expected)
    assert floor.causal_pairs(CELL, lengths)[0] == CELL.prompts * P * (P + 1) / 2


def test_the_floor_answers_as_a_system():
    step = floor.make_step(CELL._replace(mean_length=4))({"lengths": [1, 9, 3, 3, 2, 8, 1, 1]})
    assert step["whole"] == pytest.approx(sum(step[phase] for phase in report.PHASES))
    assert step["flops"]["train"] == 3 * step["flops"]["score"]


@pytest.mark.slow
def test_scaling_varies_one_number_at_a_time():
    axes = {point.axis for point in scaling.points()}
    assert axes == {"G", "P", "T", "V", "model"}
    assert all(any(p.cell == scaling.BASE for p in scaling.points() if p.axis == axis) for axis in axes)
    found = scaling.measure(CELL, repeats=1)
    assert found["mib"] > 0 < found["seconds"]


@pytest.mark.slow
def test_the_gpu_measurement_runs_on_what_is_there():
    line = gpu.measure(gpu.GpuCell(CELL, micro_batches=2, adam=False), 1, attention.reference, bandwidth_mib=1, side=64)
    assert line["decode_tokens_per_second"] == pytest.approx(64 / line["sample_seconds"])
    assert line["flops_utilisation"] > 0 < line["bandwidth_share"]
    weights = 2 * MODEL.hidden * MODEL.vocabulary + MODEL.layers * MODEL.layer_weights
    assert line["planned_peak_gib"] * 2**30 > 2 * 4 * weights  # they and their gradient


def test_the_gpu_table_compares_with_trl_on_the_same_cell():
    shares, peaks = ("bandwidth_share", "flops_utilisation"), ("sample_peak_gib", "learn_peak_gib", "planned_peak_gib")
    ours = {"kind": "gpu", "cell": CELL.name, "attention": "reference", "sample_seconds": 1.0, "learn_seconds": 2.0}
    ours |= {"decode_tokens_per_second": 64.0, "learn_tokens_per_second": 32.0}
    ours |= dict.fromkeys(shares, 0.25) | dict.fromkeys(peaks, 1.5)
    trl = {"kind": "gpu_trl", "cell": CELL.name, "micro_batch": 8, "whole": 12.0, "peak_gib": 20.0}
    text = report.markdown([{"kind": "machine"}, ours, ours | {"cell": "other"}, trl])
    assert text.count("times ours") == 1
    assert "| W1 | reference | 64 | 25% | 32 | 25% | 1.5 | 1.5 | 1.5 |" in text
    assert "12.0 s a step, 20.0 GiB; 4.00 times ours with reference." in text


def test_the_start_is_timed_by_the_first_step_that_is_printed(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("""
import os, pathlib, time
kept = pathlib.Path(os.environ["XDG_CACHE_HOME"], "programs")
time.sleep(0.0 if kept.exists() else 1.0)
kept.touch()
print("step 1/3")
time.sleep(0.5)
print("step 1/9")
""")
    monkeypatch.setattr(startup, "SCRIPT", str(script))
    cold, warm = startup.measure(1)
    assert (cold["kept"], warm["kept"]) == (False, True)
    assert cold["first_step"] > 1.0
    for line in (cold, warm):
        assert line["whole"] > line["first_step"] + 0.4
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3"):
        list(startup.measure(1))


def test_the_first_line_names_the_machine():
    found = run.machine()
    assert found["cores"] >= 1
    assert found["jax"] == jax.__version__


def test_the_first_core_tells_its_threads_and_caches(tmp_path):
    files = {"topology/thread_siblings": "0,00000005"}
    for n, (level, kind, size) in enumerate([(1, "Data", "32K"), (3, "Unified", "16384K")]):
        files |= {f"cache/index{n}/level": f"{level}", f"cache/index{n}/type": kind, f"cache/index{n}/size": size}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert run.first_core(tmp_path) == {"threads_a_core": 2, "caches": "L1 data 32K, L3 unified 16384K"}
    assert run.first_core(tmp_path / "cache") == {}


def test_first_steps_count_every_second_and_are_compared_in_mean_and_in_the_steady_half():
    def line(system, whole, **fields):
        return {"kind": "first_steps", "cell": "W3", "system": system, "whole": whole, **fields}

    ours = [line("plain", s, peak_mib=p, programs=n) for s, p, n in [(9.0, 100, 2), (1.0, 300, 2), (1.0, 300, 3)]]
    lines = [*ours, *(line("trl", 4.0, peak_mib=200) for _ in range(3)), line("floor", 0.5)]
    _, _, plain, trl, floor_row = (
        [x.strip() for x in row.split("|")[1:-1]] for row in first_steps.table(lines).splitlines()
    )
    assert plain == ["W3", "plain", "3", "3.67", "1.00", "1.09x", "4.00x", "2.0", "300", "3"]
    assert trl == ["W3", "trl", "3", "4.00", "4.00", "1.00x", "1.00x", "8.0", "200", ""]
    assert floor_row[-2:] == ["", ""]


COMPILED = """
HloModule jit_f
%copied (p.1: f32[2,64,64], n.1: s32[]) -> f32[64,64] {
  %p.1 = f32[2,64,64]{2,1,0} parameter(0)
  %n.1 = s32[] parameter(1)
  %slice.1 = f32[1,64,64]{2,1,0} dynamic-slice(%p.1, %n.1), dynamic_slice_sizes={1,64,64}
  ROOT %bitcast.1 = f32[64,64]{1,0} bitcast(%slice.1)
}
%written (p.2: f32[9,64], new.2: f32[1,64], n.2: s32[]) -> f32[9,64] {
  %p.2 = f32[9,64]{1,0} parameter(0)
  %new.2 = f32[1,64]{1,0} parameter(1)
  %n.2 = s32[] parameter(2)
  ROOT %update.2 = f32[9,64]{1,0} dynamic-update-slice(%p.2, %new.2, %n.2)
}
%of_layer (a.3: (s32[], f32[2,64,64], f32[1,64])) -> (s32[], f32[2,64,64], f32[1,64]) {
  %a.3 = (s32[], f32[2,64,64]{2,1,0}, f32[1,64]{1,0}) parameter(0)
  %n.3 = s32[] get-tuple-element(%a.3), index=0
  %w.3 = f32[64,64]{1,0} fusion(%a.3, %n.3), kind=kLoop, calls=%copied
  %dot.3 = f32[1,64]{1,0} dot(%x.3, %w.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple.3 = (s32[], f32[2,64,64]{2,1,0}, f32[1,64]{1,0}) tuple(%n.3, %w.3, %dot.3)
}
%of_token (a.4: (s32[], f32[9,64])) -> (s32[], f32[9,64]) {
  %a.4 = (s32[], f32[9,64]{1,0}) parameter(0)
  %while.4 = (s32[], f32[1,64]{1,0}) while(%a.4), body=%of_layer, backend_config={"known_trip_count":{"n":"2"}}
  %cache.4 = f32[9,64]{1,0} fusion(%a.4, %x.4, %n.4), kind=kLoop, calls=%written
  ROOT %tuple.4 = (s32[], f32[9,64]{1,0}) tuple(%a.4, %cache.4)
}
ENTRY %main.5 (x.5: f32[9,64]) -> f32[9,64] {
  %x.5 = f32[9,64]{1,0} parameter(0)
  %while.5 = (s32[], f32[9,64]{1,0}) while(%x.5), condition=%ended, body=%of_token
  ROOT %out.5 = f32[9,64]{1,0} get-tuple-element(%while.5), index=1
}
"""  # as XLA writes a program, cut down


def test_operations_of_a_decode_step_are_counted_with_the_turns_of_the_loops_inside():
    assert decode.operations(COMPILED) == {
        "copies of weights, keys and values": (2, 2 * 64 * 64 * 4),
        "matrix products": (2, 2 * 64 * 4),
        "writing into the cache and records": (1, 64 * 4),  # a column, not the cache
    }
    told = decode.of_operations({"loop": decode.operations(COMPILED)})
    assert "| all | 5 | 0.03 |" in told


def test_settings_are_compared_by_their_fastest_step():
    def steps(*whole, pages):
        return [
            {"whole": s, "collect": s / 4, "learn": s / 2, "cpu": 2 * s, "pages": pages, "peak_mib": 7} for s in whole
        ]

    lines = {"as it is": steps(3.0, 2.0, pages=5000), "one core": steps(4.0, 9.0, pages=10)}
    rows = [[x.strip() for x in row.split("|")[1:-1]] for row in settings.table(lines).splitlines()]
    assert rows[2] == ["as it is", "2.00", "0.50", "1.00", "4.00", "1.00", "5,000", "7"]
    assert rows[3] == ["one core", "4.00", "1.00", "2.00", "8.00", "2.00", "10", "7"]


@pytest.mark.slow
def test_long_completions_are_planned_and_their_growth_is_told():
    form = attention.auto
    found = [long.sizes(T, form, CELL._replace(prompts=2, group=2)) for T in (8, 16)]
    assert found[1].logits == 4 * 4 * 16 * (6 + 16) / 2**20
    assert 0 < found[0].sample < found[1].sample
    told = long.table([long.Sizes("auto", 8, 1.0, 3.0, 2.0), long.Sizes("auto", 16, 2.0, 12.0, 8.0)])
    assert "| auto | 16 | 2 (T^1.00) | 12 (T^2.00) | 8 (T^2.00) |" in told


@pytest.mark.slow
def test_a_plain_script_packs_and_counts_its_programs(tmp_path, checkpoint):
    cell = CELL._replace(mean_length=3)
    lines = first_steps.answers(
        worker.start(
            sys.executable, "plain", {"cell": cells.to_json(cell), "checkpoint": str(checkpoint)}, tmp_path / "log"
        ),
        [],
        2,
    )
    assert lines[0]["whole"] > lines[1]["whole"] > 0
    assert lines[0]["programs"] > 1
    assert all(1 <= n <= 9 for n in lines[1]["lengths"])


# ------------------------------------------------------------------------- TPUs that are not there


def a_row(**changes):
    """Of 4 chips, in round numbers: weights of 8 GB in bfloat16, a state of 12 GB on each chip."""
    memory = dict.fromkeys(("frozen", "reference", "prompt_cache", "completion_cache", "logits", "activations"), 0)
    memory |= {"parameters": 4e9, "optimizer": 8e9, "cast": 8e9, "weights": 8e9, "gradients": 4e9}
    memory |= {"sampling": 10e9, "learning": 9e9, "peak": 22e9}
    learn = {"flops": 459e12, "memory": 3 * 8e9 + 2 * 16e9, "sent": {"all-gather": [100, 30e9], "all-reduce": [1, 4.0]}}
    collect = {"flops": 1e12, "memory": growth.MAX_TOKENS * 8e9 + 64e9, "sent": {"all-gather": [10, 6e9]}}
    row = tpu.Row("Qwen2.5-7B", "v5p:2x2x1", "fsdp=4", 8)
    return {"kind": "tpu", **row._asdict(), "memory": memory, "collect": collect, "learn": learn, **changes}


def test_a_step_over_as_many_chips_as_it_was_compiled_for_is_what_was_read():
    found = growth.grown(a_row(), 4)
    np.testing.assert_allclose(found.decode, (512 * 8e9 + 64e9) / 2765e9)
    np.testing.assert_allclose([found.gather, found.compute, found.exchange], [0.01, 1.0, 0.05])
    np.testing.assert_allclose(found.latency, 1e-6 * 1.5 * 4 ** (1 / 3) * (10 + 100 + 2))
    assert found.memory == 22e9


def test_over_more_chips_each_holds_less_of_the_state_and_receives_more_of_the_weights():
    found = growth.grown(a_row(), 16)
    np.testing.assert_allclose(found.exchange, (30e9 + 4) * (15 / 16) / (3 / 4) / 600e9)
    np.testing.assert_allclose(found.compute, 1.0)
    assert found.memory == 12e9 / 4 + 10e9
    shared = growth.grown(a_row(), 16, prompts=8)  # a quarter for each
    np.testing.assert_allclose(shared.compute, 0.25)
    np.testing.assert_allclose(shared.decode, (512 * 8e9 + 16e9) / 2765e9)  # all weights, a quarter of the caches
    assert shared.exchange == found.exchange
    over_tensor = growth.grown(a_row(mesh="fsdp=2,tensor=2", prompts=4), 8, prompts=4)  # half for each
    np.testing.assert_allclose(over_tensor.exchange, (30e9 * (3 / 4) / (1 / 2) + 4 / 2) / 600e9)


def test_fewer_chips_learn_from_as_many_prompts_in_micro_batches():
    held = a_row()["memory"] | {"completion_cache": 2e9}
    found = growth.grown(a_row(memory=held), 4, prompts=24)  # three times as many for each
    np.testing.assert_allclose(found.compute, 3.0)
    np.testing.assert_allclose(found.exchange, 3 * (30e9 + 4) / 600e9)
    np.testing.assert_allclose(found.latency, 1e-6 * 1.5 * 4 ** (1 / 3) * (10 + 3 * (100 + 2)))
    assert found.memory == 12e9 + max(10e9 + 2 * 2e9, 9e9 + 4e9)


def test_over_more_copies_parts_of_gradients_are_summed_and_the_state_stays():
    row = a_row(mesh="data=2,fsdp=2")
    of_four = growth.grown(row, 4)
    np.testing.assert_allclose(of_four.exchange, (30e9 + 4) / 600e9)
    found = growth.grown(row, 16)  # eight copies of two parts
    np.testing.assert_allclose(found.exchange, (30e9 + 4 * (7 / 8) / (1 / 2)) / 600e9)
    assert found.memory == of_four.memory
    one = growth.grown(row, 2)  # no copies: nothing to sum
    np.testing.assert_allclose(one.exchange, 30e9 / 600e9)
    np.testing.assert_allclose(growth.grown(row, 16, prompts=8).compute, 0.25)


def test_the_tables_of_tpus_name_what_bounds_a_program_and_what_does_not_fit(tmp_path):
    text = tpu.markdown([a_row(), {"kind": "refused", **tpu.ROWS[0]._asdict(), "why": "Ran out of memory"}])
    assert (
        "| Qwen2.5-7B | v5p:2x2x1 | fsdp=4 | 459 (1 s) | 56 (0.02 s) | 30 (0.05 s) | compute | 100 all-gather" in text
    )
    assert "| 12.0 | 10.0 | 9.0 | 22.0 | 95.0 |" in text
    assert "data=4,fsdp=16: Ran out of memory" in text
    assert "| Qwen2.5-7B | v5p:2x2x1 | fsdp=4 | 0.937 | 0.919 |" in text
    assert "A token of decoding" not in text  # of rows that were compiled before it was read
    memory = a_row()["memory"] | {"completion_cache": 1e9}
    text = tpu.markdown([a_row(mesh="fsdp=2,tensor=2", memory=memory, decode=9e9)])
    assert "| Qwen2.5-7B | v5p:2x2x1 | fsdp=2,tensor=2 | 9.00 | 8.07 | 1.115 |" in text  # 7.07 of 14.14
    text = growth.markdown([a_row(model="small"), a_row(mesh="fsdp=2,tensor=2")])
    of_copies = tpu.least(a_row(mesh="data=2,fsdp=2"))
    layers, head, embedding = tpu.weights("Qwen2.5-7B")
    np.testing.assert_allclose(of_copies[0], tpu.least(a_row())[0])
    np.testing.assert_allclose(of_copies[1], 3 * layers + 2 * (head + embedding) + (layers + head + embedding))
    assert text.count("| 4096 |") == 2  # not of 8 prompts of 8 over all chips
    assert "does not fit" not in text
    growth.plot([a_row()], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("model", "layers", "all_weights"),  # in billions, as the models' cards have them
    [
        ("Qwen2.5-0.5B", 0.36, 0.49),
        ("Qwen2.5-1.5B", 1.31, 1.54),
        ("Qwen2.5-7B", 6.53, 7.61),
        ("Qwen2.5-32B", 31.0, 32.5),
    ],
)
def test_the_weights_that_a_step_needs_at_least_are_those_of_the_models_cards(model, layers, all_weights):
    found = tpu.weights(model)
    np.testing.assert_allclose([found[0] / 1e9, sum(found) / 1e9], [layers, all_weights], rtol=0.01)


def test_rows_that_were_compiled_are_not_compiled_again(tmp_path, monkeypatch):
    asked = []

    def compiled(command, **settings):
        asked.append(row := tpu.Row(*json.loads(command[-1])))
        line = a_row(**row._asdict())
        return types.SimpleNamespace(returncode=len(asked) == 2, stdout=f"a warning\n{json.dumps(line)}\n")

    monkeypatch.setattr(tpu.subprocess, "run", compiled)
    monkeypatch.setattr(tpu, "versions", lambda: {"kind": "machine", "libtpu": "0"})
    config = tpu.Config(models=("Qwen2.5-0.5B",), output=tmp_path / "tpu.jsonl")
    rows = [row for row in tpu.ROWS if row.model == "Qwen2.5-0.5B"]
    tpu.main(config)
    assert asked == rows
    assert tpu.main(config).read_text().count("| 459 (") == len(rows)
    assert asked == [*rows, rows[1]]  # whose compiler had failed


@pytest.mark.slow
def test_distillation_is_timed_and_planned_beside_grpo(monkeypatch):
    ways = [name for name in distillation.WAYS if name == "reverse KL" or name.startswith("GRPO, ")]
    monkeypatch.setattr(distillation, "WAYS", {name: distillation.WAYS[name] for name in ways})
    grpo, distilled = distillation.steps(CELL, repeats=1)
    assert [grpo["learned from"], distilled["learned from"]] == ways
    assert grpo["a step of GRPO"] == 1
    assert min(distilled["collect s"], distilled["learn s"], distilled["a step of GRPO"]) > 0
    assert distilled["peak MiB"] >= distilled["learning MiB"]
