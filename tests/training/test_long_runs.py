"""Thousands of steps: memory stays flat, files are closed, the log stays short."""

import gc
import os
import resource
from pathlib import Path

import pytest

import utils.training.loop as training
from tests.helpers import train

FLAGS = (
    "--dataset=digits", "--width=1", "--limit-train=500", "--limit-test=20", "--batch-size=2", "--num-steps=1",
    "--epochs=8", "--lr=0.001", "--warmup-epochs=0", "--strategy=soft_adv", "--augmentation=crop", "--device=cpu",
)  # fmt: skip


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_two_thousand_steps_hold_no_more_memory_and_files(tmp_path, monkeypatch):
    memory, files, real = [], [], training.attack_batch

    def counting(*args):
        if len(memory) % 50 == 0:
            gc.collect()
        memory.append(resident())
        files.append(len(os.listdir("/proc/self/fd")))
        return real(*args)

    monkeypatch.setattr(training, "attack_batch", counting)
    run = train(tmp_path, *FLAGS)
    assert len(memory) == 2000
    first, last = max(memory[400:500]), max(memory[1900:])
    print(f"{first / 1e6:.1f} MB at step 500, {last / 1e6:.1f} MB at step 2000; {max(files)} files")
    assert last <= 1.02 * first
    assert max(files[1000:]) <= max(
        files[:1000]
    )  # matplotlib keeps two fonts open once it has drawn
    assert len(os.listdir("/proc/self/fd")) <= max(files) - 1  # the lock is released
    assert (run / "train.log").stat().st_size < 10_000
