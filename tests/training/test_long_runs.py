"""Thousands of steps: memory stays flat, files are closed, the log stays short."""

import gc
import os
import resource
from pathlib import Path

import pytest

import utils.training.loop as training
from tests.helpers import train

FLAGS = (
    "--dataset=digits",
    "--width=1",
    "--limit-train=500",
    "--limit-test=20",
    "--batch-size=2",
    "--num-steps=1",
    "--epochs=8",
    "--lr=0.001",
    "--warmup-epochs=0",
    "--strategy=soft_adv",
    "--augmentation=crop",
    "--device=cpu",
)


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_two_thousand_steps_hold_no_more_memory_and_files(tmp_path, monkeypatch):
    memory = []
    files = []
    real = training.attack_batch

    def counting(*args):
        if len(memory) % 50 == 0:
            gc.collect()
        memory.append(resident())
        files.append(len(os.listdir("/proc/self/fd")))
        return real(*args)

    monkeypatch.setattr(training, "attack_batch", counting)
    # Draw from the first epoch on: matplotlib takes its memory with the first picture.
    run = train(tmp_path, *FLAGS, "--save-freq=1")
    assert len(memory) == 2000
    assert max(memory[1900:]) <= 1.02 * max(memory[400:500])
    # matplotlib keeps two fonts open once it has drawn
    assert max(files[1000:]) <= max(files[:1000])
    assert len(os.listdir("/proc/self/fd")) <= max(files) - 1  # the lock is released
    assert (run / "train.log").stat().st_size < 10_000
