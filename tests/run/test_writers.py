import re
import struct
import sys
import types

import jax.numpy as jnp
import pytest
import tensorboardX
from tensorboardX.proto.event_pb2 import Event

from grpo_jax.run import writers


def test_tensorboard_gets_every_finite_number(tmp_path, monkeypatch):
    opened = []
    make = tensorboardX.SummaryWriter
    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda *a, **k: opened.append(make(*a, **k)) or opened[0])
    writer = writers.tensorboard(tmp_path / "board", purge_step=3)
    writer.metrics(3, {"loss": jnp.float32(0.5), "kl": jnp.nan, "note": "text", "done": True})
    writer.metrics(4, {"loss": 0.25})
    opened[0].close()  # as at the end of the process
    (file,) = (tmp_path / "board").iterdir()
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value] == [
        (3, "done", 1.0),
        (3, "loss", 0.5),
        (4, "loss", 0.25),
    ]


def test_completions_go_to_tensorboard_as_text_and_to_wandb_as_a_table(tmp_path, monkeypatch):
    lines = [{"prompt": "1+1=", "completion": "2", "reward": 1.0}, {"prompt": "1+1=", "completion": "3"}]
    opened = []
    make = tensorboardX.SummaryWriter
    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda *a, **k: opened.append(make(*a, **k)) or opened[0])
    writers.tensorboard(tmp_path).completions(4, lines)
    opened[0].close()
    (file,) = tmp_path.iterdir()
    assert b"**completion** 2" in file.read_bytes()

    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    table = lambda columns, data: (columns, data)  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **init: run, Table=table))
    writers.wandb(project="grpo").completions(4, lines)
    columns = ["prompt", "completion", "reward"]
    assert logged == [(4, {"completions": (columns, [["1+1=", "2", 1.0], ["1+1=", "3", None]])})]


def test_wandb_gets_plain_numbers_with_their_step(monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    client = types.SimpleNamespace(init=lambda **init: logged.append(init) or run)
    monkeypatch.setitem(sys.modules, "wandb", client)
    writer = writers.wandb(project="grpo", mode="offline")
    writer.metrics(7, {"loss": jnp.float32(0.5)})
    assert logged == [{"project": "grpo", "mode": "offline"}, (7, {"loss": 0.5})]
    assert type(logged[1][1]["loss"]) is float


@pytest.mark.parametrize(
    ("module", "adapter", "extra"),
    [("tensorboardX", lambda: writers.tensorboard("nowhere"), "tensorboard"), ("wandb", writers.wandb, "wandb")],
    ids=["tensorboard", "wandb"],
)
def test_an_adapter_that_is_not_installed_says_which_extra_to_install(monkeypatch, module, adapter, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'grpo-jax[{extra}]'")):
        adapter()
