"""Runs on digits: what they compute and write, and how they fail."""

import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import pytest
import torch

import utils.training.loop as training
from models import build_model
from tests.helpers import (
    EVALUATE,
    PLAIN,
    RA,
    ROOT,
    assert_equal,
    assert_same_run,
    checkpoint,
    files,
    folder,
    metrics,
    resume,
    settings,
    some_batch,
    state,
    train,
)
from utils.evaluation.robustness import white_attack
from utils.figures.plots import save_or_note
from utils.step import first_head_right
from utils.system.checkpoints import load_model
from utils.system.errors import RunError, Stopped, UsageError, stop_signals
from utils.system.options import parse
from utils.system.settings import Evaluation
from utils.training import job, records

ONE_EPOCH = ("--epochs", 1)
TWO = ("--milestones", 2)  # the flags of `straight_run`

pytestmark = pytest.mark.usefixtures("short_runs")


# What a run computes


@pytest.mark.parametrize("method", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("flags", [(), ("--no-ra",), ("--no-anc",), ("--no-ra", "--no-anc")])
def test_metrics_of_every_method_with_and_without_each_part(tmp_path, method, flags):
    weights = ("--zeta", 3, "--beta", 4, "--eval-interval", 9)
    (row,) = metrics(train(tmp_path, "--method", method, *flags, *weights, *ONE_EPOCH))
    no_natural_forward = method == "pgd" and "--no-anc" in flags
    assert (row["train_natural_accuracy_first_head"] == "") == no_natural_forward
    loss, cross_entropy, auxiliary, kl, contrast = (
        float(row[name]) for name in ("loss", "cross_entropy", "auxiliary", "kl", "contrast")
    )
    assert cross_entropy > 0
    assert (auxiliary > 0) == ("--no-ra" not in flags)
    assert (kl > 0) == (method != "pgd")
    assert (contrast > 0) == ("--no-anc" not in flags)
    if method != "mart":  # whose first term is no cross-entropy alone
        total = cross_entropy + auxiliary + 4 * kl + 3 * contrast
        assert loss == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("arch", ["WRN-28-10", "PreActResNet18"])
@pytest.mark.parametrize("recipe", [RA, PLAIN])
def test_other_networks_and_objectives(tmp_path, arch, recipe):
    flags = ("--arch", arch, "--width", 1, "--inner", "kl", "--augmentation", "crop-flip")
    run = train(tmp_path, *flags, *ONE_EPOCH, recipe=recipe)
    model, info = load_model(run)
    assert info["arch"] == arch
    assert info["reverse_attention"] == (recipe is RA)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_defaults_are_the_published_recipe():
    published = {
        "batch_size": 128,
        "epochs": 120,
        "milestones": (75, 90, 100),
        "lr": 0.01,
        "weight_decay": 2e-4,
        "momentum": 0.9,
        "epsilon": 8 / 255,
        "num_steps": 10,
        "step_size": 0.007,
        "strategy": "random_adv",
        "beta": 6,
        "alpha": 1,
        "zeta": 3,
        "cr_beta": 2,
        "augmentation": "crop-flip",
    }
    assert {name: getattr(settings(), name) for name in published} == published
    assert settings().optimizer == "sgd"
    assert settings("--optimizer", "adamw").lr == 0.001
    assert settings("--method", "mart").beta == 5
    assert settings("--arch", "WRN-28-10").zeta == 6
    assert settings("--arch", "WRN-28-10", "--zeta", 3).zeta == 3


def test_same_seed_same_run_and_another_seed_another(straight_run, tmp_path):
    assert_same_run(straight_run, train(tmp_path / "same", *TWO))
    assert metrics(train(tmp_path / "other", *TWO, "--seed", 2)) != metrics(straight_run)


def test_accuracies_of_training_forwards_do_not_see_the_label():
    model = build_model("ResNet18", 10, width=8, image_size=16).train()
    x, labels = some_batch(64, classes=10)
    heads = model(x, labels, heads=True)
    others = model(x, labels.roll(1), heads=True)
    assert first_head_right(heads, labels) == first_head_right(others, labels)
    assert not torch.equal(heads.final, others.final)


def test_the_best_epoch_is_the_most_robust_then_the_most_accurate_then_the_first():
    figures = [(50.0, 20.0), (60.0, 30.0), (None, None), (70.0, 30.0), (70.0, 30.0), (90.0, 10.0)]
    rows = [dict(zip(records.NOT_EVALUATED, both, strict=True)) for both in figures]
    assert records.best_row(rows) is rows[3]
    assert records.best_row(rows[2:3]) is None


# What a run writes


def test_what_a_run_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "save_or_note", save_or_note)
    run = train(tmp_path, "--save-freq", 2)
    assert capsys.readouterr().out.endswith((run / "train.log").read_text())
    assert sorted(file.name for file in run.iterdir()) == [
        "best_adv_model.pt",
        "last_state.pt",
        "metrics.csv",
        "model-2.pt",
        "model-wrn-last.pt",
        "run.json",
        "train.log",
        "training_curves.pdf",
        "training_curves.png",
    ]
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["epsilon"] == 0.1
    assert record["versions"]["torch"]
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    (selected,) = [row["epoch"] for row in rows if row["selected"] == "1"]
    assert load_model(run)[1]["epoch"] == int(selected)


def test_the_evaluation_that_a_run_recommends_starts_anywhere_with_its_eps(here):
    run = train(here, "--epsilon", "32/255", "--step-size", 0.1, *ONE_EPOCH)
    _, command = (run / "train.log").read_text().split("evaluate by: ")
    _, script, *flags = shlex.split(command)
    assert (here / script).resolve() == ROOT / "test_white_attack.py"
    evaluation = parse(Evaluation, "", flags)
    assert evaluation.epsilon == 32 / 255
    assert evaluation.step_size == 0.1


def test_a_network_that_answers_one_class_is_named(tmp_path, monkeypatch):
    def one_class(net, split, *args, **kwargs):
        return split.labels == split.labels[0]

    monkeypatch.setattr(training, "verdicts", one_class)
    log = (train(tmp_path, *ONE_EPOCH) / "train.log").read_text()
    assert log.count(", at chance: ") == 2  # of the epoch, and as the best


def test_curves_that_cannot_be_drawn_are_one_note(tmp_path, monkeypatch):
    failing = MagicMock(side_effect=ImportError("numpy.core.multiarray failed to import"))
    monkeypatch.setattr(records, "save_or_note", save_or_note)
    monkeypatch.setattr(records, "draw_curves", failing)
    run = train(tmp_path, "--width", 1, "--save-freq", 1)
    assert (run / "train.log").read_text().count("training_curves.png is not drawn") == 1
    assert len(metrics(run)) == 2


def test_curves_are_drawn_with_each_kept_checkpoint_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(records, "draw_curves", lambda rows, best: drawn.append(len(rows)))
    monkeypatch.setattr(records, "save_or_note", lambda draw, file: draw())
    run = train(tmp_path, "--epochs", 2, "--eval-interval", 9)
    assert drawn == [2]
    resume(run, "--epochs", 3, "--save-freq", 3)
    assert drawn == [2, 3, 3]


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path, monkeypatch):
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    run = train(tmp_path / "1", *ONE_EPOCH, "--tensorboard")
    module.SummaryWriter.assert_called_with(run / "tensorboard")
    writer = module.SummaryWriter().__enter__()
    writer.add_scalar.assert_any_call("lr", 0.03, 1)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tensorboard"):
        train(tmp_path / "2", "--tensorboard")
    assert not (tmp_path / "2").exists()


def test_evaluation_every_few_epochs_and_after_the_last(tmp_path):
    rows = metrics(train(tmp_path, "--epochs", 3, "--eval-interval", 2))
    assert [bool(row["natural_accuracy"]) for row in rows] == [False, True, True]


def test_held_out_images_select_and_the_test_set_is_reported(tmp_path, capsys):
    train(tmp_path, "--val-size", 20, *ONE_EPOCH)
    log = capsys.readouterr().out
    assert "on 20 held-out training images" in log
    assert "best epoch on the test set" in log


# Signals


@pytest.fixture
def as_in_a_terminal():
    """Tests may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("where", ["attack_batch", "verdicts"])
def test_signals_inside_an_epoch_or_an_evaluation(straight_run, tmp_path, monkeypatch, name, where):
    """A closed terminal sends SIGHUP twice, and can no longer be written to."""
    real = getattr(training, where)
    calls = []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.Signals[name])
            if name == "SIGHUP":
                signal.raise_signal(signal.SIGHUP)
                closed = MagicMock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
                patch.setattr(sys.stdout, "write", closed)
        return real(*args, **kwargs)

    line = f"stopped by {name}; continue by: python .* --resume "
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=line) as stopped:
        patch.setattr(training, where, interrupting)
        train(tmp_path, *TWO, "--log-interval", 1)
    assert stopped.value.args[0] == signal.Signals[name]
    assert_same_run(straight_run, resume(folder(tmp_path)))


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_signals_stop_an_evaluation_which_says_how_to_go_on(tmp_path, monkeypatch, name):
    def interrupting(*args):
        signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr("utils.evaluation.robustness.attack_block", interrupting)
    file = checkpoint(tmp_path / "weights.pt")
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        white_attack(parse(Evaluation, "", ["--ckpt_url", str(file), *EVALUATE]))
    assert stopped.value.args[0] == signal.Signals[name]


def test_an_ignored_signal_stays_ignored_but_for_ctrl_c():
    """A command under nohup ignores SIGHUP; one in a shell's background ignores Ctrl-C."""
    signals = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    heard = []
    try:
        with stop_signals(lambda signum, frame: heard.append(signum)):
            for signum in signals:
                signal.raise_signal(signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert heard == [signal.SIGINT]


def test_training_and_evaluation_work_in_a_thread(straight_run, tmp_path):
    """As a notebook's executor runs them; only the main thread may handle signals."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, tmp_path, *TWO).result()
        evaluation = parse(Evaluation, "", ["--ckpt_url", str(run), *EVALUATE])
        pool.submit(white_attack, evaluation).result()
    assert_same_run(straight_run, run)
    assert (run / "white_attack.json").exists()


def test_a_stop_in_the_final_report_leaves_the_last_state_as_it_is(tmp_path, monkeypatch):
    """The report evaluates the best epoch, here the first one; the last state holds the last."""
    real = training.evaluate
    evaluations = []

    def falling(job, *args):
        evaluations.append(1)
        if len(evaluations) == 6:  # the second run's report
            job.stop_signal = signal.SIGINT
        accuracies = real(job, *args)
        return accuracies | {"pgd40_heads_accuracy": 50.0 - len(evaluations)}

    monkeypatch.setattr(training, "evaluate", falling)
    flags = ("--val-size", 20, *TWO)
    straight = train(tmp_path / "1", *flags)
    assert load_model(straight)[1]["epoch"] == 1
    with pytest.raises(Stopped):
        train(tmp_path / "2", *flags)
    stopped = state(folder(tmp_path / "2"))
    for key in ("model", "optimizer"):
        assert_equal(stopped[key], state(straight)[key])


# Failures


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_names_its_own_batch(tmp_path, monkeypatch, wrong):
    """Figures are read a step late. A finite loss may have a gradient of NaN: the root of 0."""
    run = train(tmp_path, *ONE_EPOCH)
    before = (run / "last_state.pt").read_bytes()
    real = job.training_loss
    calls = []

    def failing(model, *args):
        stats = real(model, *args)
        calls.append(1)
        if len(calls) == 2:
            zero = 0 * model.classifier.bias.sum()
            added = zero + math.nan if wrong == "loss" else zero.sqrt()
            stats = stats._replace(loss=stats.loss + added)
        return stats

    monkeypatch.setattr(job, "training_loss", failing)
    with pytest.raises(RunError, match="nan.* in batch 2 in epoch 2"):
        train(tmp_path, "--resume", "--epochs", 2)
    assert (run / "last_state.pt").read_bytes() == before


def test_weights_ruined_by_the_last_step_do_not_replace_the_last_good_state(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        train(tmp_path, "--lr", "1e38", "--limit-train", 10, *ONE_EPOCH)
    model, info = load_model(folder(tmp_path) / "last_state.pt")
    assert info["epoch"] == 0
    assert model(torch.rand(2, 3, 16, 16)).isfinite().all()


def test_overwriting_says_what_is_lost_and_keeps_other_files(run, tmp_path, monkeypatch, capsys):
    of_the_run = ("tensorboard/events", "white_attack.blocks/pgd.npz", "robust_vs_eps.pdf")
    for name in ("notes.txt", *of_the_run):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("text")
    before = files(run)
    with monkeypatch.context() as patch, pytest.raises(UsageError):
        patch.setattr(training, "load_training_data", MagicMock(side_effect=UsageError("no data")))
        train(tmp_path, *TWO, "--overwrite")
    assert files(run) == before

    train(tmp_path, *TWO, "--overwrite", *ONE_EPOCH)
    message = capsys.readouterr().out
    assert len(metrics(run)) == 1
    assert (run / "notes.txt").exists()
    for name in of_the_run:
        assert name.partition("/")[0] in message
        assert not (run / name).exists()
