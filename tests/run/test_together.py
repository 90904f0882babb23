"""The settings of scripts for several devices and processes."""

import jax
import pytest

from grpo_jax.run.together import ProcessSettings


def test_devices_that_nobody_uses_are_told(monkeypatch, capsys):
    rows = {"prompts": 8, "group_size": 4}
    assert ProcessSettings().make_mesh(**rows) is None
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert ProcessSettings().make_mesh(**rows) is None
    assert "leaves 7 idle: --mesh fsdp=8" in capsys.readouterr().out


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    with pytest.raises(ValueError, match="say how the 16 devices of the 2 processes share the work: --mesh fsdp=16"):
        ProcessSettings().make_mesh(prompts=8, group_size=4)
