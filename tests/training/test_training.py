"""Runs on digits: what they write, and that a stopped run continues exactly."""

import errno
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils.training.loop as training
from models import build_model
from tests.conftest import shorten_runs
from tests.helpers import (
    EVALUATE,
    PLAIN,
    RA,
    ROOT,
    RUN,
    SCRIPTS,
    assert_same_run,
    checkpoint,
    digits_split,
    files,
    folder,
    image_folder,
    metrics,
    pixels,
    png,
    python,
    resume,
    settings,
    state,
    train,
)
from utils.evaluation.robustness import white_attack
from utils.figures.plots import save_or_note
from utils.step import first_head_right
from utils.system.checkpoints import load_model
from utils.system.errors import RunError, Stopped, UsageError, stop_signals
from utils.system.options import parse, parse_training
from utils.system.settings import Evaluation, Training, dataset_defaults
from utils.training import runs

TWO = ("--milestones", 2)

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run of two epochs, whose rate falls in the second -> its folder, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        return train(tmp_path_factory.mktemp("straight"), *TWO)


@pytest.mark.parametrize("method", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("flags", [(), ("--no-ra",), ("--no-anc",), ("--no-ra", "--no-anc")])
def test_every_method_with_and_without_each_part(tmp_path, method, flags):
    (row,) = metrics(train(tmp_path, "--method", method, *flags, "--epochs", 1))
    assert row["epoch"] == "1" and float(row["loss"]) > 0
    assert (float(row["contrast"]) > 0) == ("--no-anc" not in flags)


@pytest.mark.parametrize("strategy", [s + a for s in ("random", "soft", "hard", "easy") for a in ("", "_adv")])
def test_every_strategy_with_several_negatives(tmp_path, strategy):
    run = train(tmp_path, "--strategy", strategy, "--sample_class_number", 2, "--sample_number", 2, "--epochs", 1)
    assert f"strategy-{strategy}-" in run.name and len(metrics(run)) == 1


@pytest.mark.parametrize("arch", ["WRN-28-10", "PreActResNet18"])
@pytest.mark.parametrize("recipe", [RA, PLAIN])
def test_other_networks_and_objectives(tmp_path, arch, recipe):
    flags = ("--arch", arch, "--width", 1, "--epochs", 1, "--inner", "kl", "--augmentation", "crop-flip")
    run = train(tmp_path, *flags, recipe=recipe)
    model, info = load_model(run)
    assert info["arch"] == arch and info["reverse_attention"] == (recipe is RA)
    assert not model.training and model(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_what_a_run_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "save_or_note", save_or_note)
    run = train(tmp_path, "--save-freq", 2)
    said = capsys.readouterr().out
    published, special = run.name.split("-digits-")
    assert published == "run-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1"
    assert special == "batch_size-10-num_steps-2-warmup_epochs-0-width-4-limit_train-24-limit_test-12"
    assert {f.name for f in run.iterdir()} == {
        "model-wrn-last.pt", "model-2.pt", "best_adv_model.pt", "last_state.pt", "train.log", "metrics.csv",
        "run.json", "training_curves.png", "training_curves.pdf",
    }  # fmt: skip
    assert (run / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["epsilon"] == 0.1 and record["seed"] == 1 and record["versions"]["torch"]
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = max(rows, key=lambda row: (float(row["pgd40_heads_accuracy"]), float(row["natural_accuracy"])))
    assert load_model(run)[1]["epoch"] == int(best["epoch"])
    assert [row["selected"] for row in rows] == ["01"[row is best] for row in rows]
    assert all(len(value) <= 15 for row in rows for value in row.values())  # 0.0001, not 0.00010000000000000002
    assert "trades, reverse attention" in said and "test_white_attack.py --ckpt_url" in said
    assert said.splitlines()[-4:] == (run / "train.log").read_text().splitlines()[-4:]
    assert said.splitlines()[-1].endswith("best_adv_model.pt")  # eps and step are the data set's own


CANNOT_ACT = {
    "--strategy hard": "",
    "--strategy hard_adv --warmup-epochs 16": "strategy hard_adv: all 16 epochs are warm-up",
    "--strategy soft --epochs 3 --milestones 2": "strategy soft: all 3 epochs are warm-up",
    "--epochs 12": "milestones 14: after the last epoch, 12",
    "--milestones 4,20,30": "milestones 20,30: after",
    "--step-size 0.2": "step-size 0.2: above eps 0.1",
    "--epsilon 0": "step-size 0.02: above eps 0",
    "--epsilon 128/255 --num-steps 2": "epsilon 128/255: never reached, 2 steps go as far as 0.04",
    "--num-steps 5": "",
    "--sample_class_number 10": "sample-class-number 10: there are 9",
    "--limit-train 2000": "limit-train 2000: there are 1437",
    "--limit-test 400 --batch-size 1437": "limit-test 400: there are 360",
}


@pytest.mark.parametrize("flags", CANNOT_ACT)
def test_settings_that_cannot_act_are_named(flags):
    train, test = digits_split("train"), digits_split()
    notes = training.without_effect(settings("--dataset", "digits", *flags.split()), training.Data(train, test, test))
    assert len(notes) == bool(CANNOT_ACT[flags]), notes
    assert all(note.startswith(f"no effect  {CANNOT_ACT[flags]}") for note in notes)
    plain = settings("--dataset", "digits", *flags.split(), recipe=PLAIN)
    notes = training.without_effect(plain, training.Data(train, test, test))
    assert not any("strategy" in note or "class-number" in note for note in notes)


def test_strategies_act_in_most_epochs_of_digits():
    digits = dataset_defaults("digits")
    assert 2 * digits.warmup_epochs < digits.epochs and Training.warmup_epochs == 10


def test_the_evaluation_that_a_run_recommends_takes_its_eps_and_step(tmp_path, capsys):
    """What cannot act stands beside the figures, too."""
    train(tmp_path, "--epsilon", "32/255", "--step-size", 0.1, "--epochs", 1)
    *_, note, _, _, command = capsys.readouterr().out.splitlines()
    assert command.endswith("best_adv_model.pt --epsilon 32/255 --step-size 0.1") and "milestones 11,14" in note
    argv = command.partition("test_white_attack.py ")[2].split()
    assert (parse(Evaluation, "", argv).epsilon, parse(Evaluation, "", argv).step_size) == (32 / 255, 0.1)


def test_the_best_epoch_is_the_most_robust_then_the_most_accurate_then_the_first():
    figures = [(50.0, 20.0), (60.0, 30.0), (None, None), (70.0, 30.0), (70.0, 30.0), (90.0, 10.0)]
    rows = [{"epoch": i, "natural_accuracy": n, "pgd40_heads_accuracy": r} for i, (n, r) in enumerate(figures)]
    assert training.best_row(rows)["epoch"] == 3 and training.best_row(rows[2:3]) is None


def test_a_network_that_answers_one_class_is_named(tmp_path, monkeypatch, capsys):
    train(tmp_path / "1", "--epochs", 1, "--limit-test", 30, "--limit-train", 200)
    assert "at chance" not in capsys.readouterr().out
    monkeypatch.setattr(training, "verdicts", lambda net, split, *rest, **more: split.labels == split.labels[0])
    run = train(tmp_path / "2", "--epochs", 1)
    log = (run / "train.log").read_text().splitlines()
    named = [line for line in log if ", at chance: one class for every image attains " in line]
    assert [line.partition(" ")[0] for line in named] == ["epoch", "last", "best"]


def test_curves_that_cannot_be_drawn_are_one_note(tmp_path, monkeypatch):
    def fail(*args):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(training, "save_or_note", save_or_note)
    monkeypatch.setattr(training, "draw_curves", fail)
    run = train(tmp_path, "--width", 1)
    notes = [line for line in (run / "train.log").read_text().splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "training_curves.png is not drawn (ImportError: numpy" in notes[0]
    assert len(metrics(run)) == 2 and load_model(run) and not (run / "training_curves.png").exists()


def test_same_seed_same_run_and_another_seed_another(straight, tmp_path):
    assert_same_run(straight, train(tmp_path / "same", *TWO))
    assert metrics(train(tmp_path / "other", *TWO, "--seed", 2)) != metrics(straight)


def test_stop_between_epochs_and_resume(straight, tmp_path, capsys):
    train(tmp_path, *TWO, "--epochs", 1)
    resumed = train(tmp_path, *TWO, "--epochs", 2, "--resume")
    assert_same_run(straight, resumed)
    assert [float(row["lr"]) for row in metrics(resumed)] == pytest.approx([0.03, 0.003])
    for said in (capsys.readouterr().out, (resumed / "train.log").read_text()):
        assert f"resumed    in epoch 2, 0 images done, from {resumed / 'last_state.pt'}\n" in said
        assert "--epochs 2, before 1\n" in said


STOPS = {
    "SIGINT": "interrupted",
    "SIGTERM": "terminated",
    "SIGHUP": "stopped by SIGHUP",
    "SIGUSR1": "stopped by SIGUSR1",
}


@pytest.fixture
def as_in_a_terminal():
    """Tests may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("where", ["attack_batch", "verdicts"])
def test_signals_inside_an_epoch_or_an_evaluation(straight, tmp_path, monkeypatch, name, where):
    """A closed terminal sends SIGHUP twice, and can no longer be written to."""
    real, calls, signum, word = getattr(training, where), [], getattr(signal, name), STOPS[name]

    def write(text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signum)
            if name == "SIGHUP":
                os.kill(os.getpid(), signum)
                monkeypatch.setattr(sys.stdout, "write", write)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, where, interrupting)
    with pytest.raises(Stopped, match=f"{word}; continue by: python .* --resume ") as stopped:
        train(tmp_path, *TWO, "--log-interval", 1)
    assert stopped.value.args[0] == signum
    monkeypatch.undo()
    shorten_runs(monkeypatch)
    assert_same_run(straight, train(tmp_path, "--resume", folder(tmp_path)))


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("name", STOPS)
def test_signals_stop_an_evaluation_which_says_how_to_go_on(tmp_path, monkeypatch, name):
    def interrupting(*args):
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr("utils.evaluation.robustness.attack_block", interrupting)
    file = checkpoint(tmp_path / "weights.pt")
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        white_attack(parse(Evaluation, "", ["--ckpt_url", str(file), *EVALUATE]))
    assert stopped.value.args[0] == getattr(signal, name)


def test_an_ignored_signal_stays_ignored_but_for_ctrl_c():
    """nohup ignores SIGHUP; a shell ignores Ctrl-C for whatever it starts in the background."""
    signals = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    heard = []
    try:
        with stop_signals(lambda signum, frame: heard.append(signum)):
            for signum in signals:
                os.kill(os.getpid(), signum)
        assert heard == [signal.SIGINT]
        assert all(signal.getsignal(signum) == signal.SIG_IGN for signum in signals)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_signals_that_a_system_lacks_are_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")
    with stop_signals(lambda *args: None):
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)


def test_training_and_evaluation_work_in_a_thread(straight, tmp_path):
    """As a notebook's executor runs them; only the main thread may handle signals."""
    run = in_a_thread(train, tmp_path, *TWO)
    assert_same_run(straight, run)
    in_a_thread(white_attack, parse(Evaluation, "", ["--ckpt_url", str(run), *EVALUATE]))
    assert (run / "white_attack.json").exists()


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_curves_are_drawn_now_and_then_at_the_end_and_at_a_stop(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "draw_curves", lambda rows, best: drawn.append(len(rows)))
    monkeypatch.setattr(training, "save_or_note", lambda draw, file: draw())
    run = train(tmp_path, "--epochs", 3, "--eval-interval", 9, "--limit-train", 10)
    assert drawn == [3]
    monkeypatch.setattr(training, "DRAW_EVERY", 0)
    resume(run, "--epochs", 5)
    assert drawn == [3, 4, 5]
    real = training.attack_batch

    def interrupting(*args):
        if args[-1] == 7:  # the epoch
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(training, "DRAW_EVERY", 30)
    monkeypatch.setattr(training, "attack_batch", interrupting)
    with pytest.raises(Stopped):
        resume(run, "--epochs", 8)
    assert drawn == [3, 4, 5, 6]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_names_its_own_batch(tmp_path, monkeypatch, wrong):
    """Figures are read a step late; a loss may be finite and its gradient not, as the root of 0 is."""
    real, calls = training.training_loss, []

    def failing(model, *args):
        terms = real(model, *args)
        calls.append(1)
        if len(calls) == 2:
            zero = 0 * model.classifier.bias.sum()
            terms = terms._replace(loss=terms.loss + (zero + math.nan if wrong == "loss" else zero.sqrt()))
        return terms

    monkeypatch.setattr(training, "training_loss", failing)
    what = {"loss": "the loss is nan", "gradient": "the norm of its gradients is nan"}[wrong]
    with pytest.raises(RunError, match=rf"{what} in epoch 1, batch 2; the last good checkpoint is .*last_state.pt"):
        train(tmp_path, *TWO)
    saved = state(folder(tmp_path))
    assert all(value.isfinite().all() for value in saved["model"].values()) and saved["progress"]["done"] == 0


@pytest.mark.parametrize(("flags", "kl"), [((), True), (("--method", "mart"), True), (("--method", "pgd"), False)])
def test_metrics_hold_the_terms_of_the_loss(tmp_path, flags, kl):
    (row,) = metrics(train(tmp_path, *flags, "--epochs", 1, "--zeta", 3, "--beta", 4, "--eval-interval", 9))
    values = {key: float(row[key]) for key in ("loss", "contrast", "cross_entropy", "kl", "auxiliary")}
    assert (values["kl"] > 0) == kl and values["cross_entropy"] > 0 and values["auxiliary"] > 0
    if not flags:  # the others' first term is not a cross-entropy alone, or has no KL
        total = values["cross_entropy"] + 4 * values["kl"] + values["auxiliary"] + 3 * values["contrast"]
        assert values["loss"] == pytest.approx(total, rel=1e-5)
    if flags[1:] == ("pgd",):
        total = values["cross_entropy"] + values["auxiliary"] + 3 * values["contrast"]
        assert values["loss"] == pytest.approx(total, rel=1e-5)


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path, monkeypatch):
    written, real = [], importlib.util.find_spec

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *failure):
            pass

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or real(name))
    run = train(tmp_path / "1", "--epochs", 1, "--tensorboard")
    assert written[0] == run / "tensorboard" and ("lr", 0.03, 1) in written
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    with pytest.raises(UsageError, match="--tensorboard needs the package tensorboard"):
        train(tmp_path / "2", "--tensorboard")
    assert not list((tmp_path / "2").glob("*"))


def test_what_is_there_stays(straight, tmp_path, capsys):
    """A second run does not overwrite the first, and a resume has nothing left to train."""
    run = Path(shutil.copytree(straight, tmp_path / straight.name))
    before = files(run)
    with pytest.raises(UsageError, match=r"holds a run already; continue it by --resume, or name .* --model-dir"):
        train(tmp_path, *TWO)
    assert files(run) == before
    resume(run)
    said = capsys.readouterr().out
    assert "resumed    in epoch 3, 0 images done" in said and "; nothing is left to train, raise --epochs" in said
    assert {file: content for file, content in files(run).items() if file.suffix == ".pt"} == {
        file: content for file, content in before.items() if file.suffix == ".pt"
    }


def test_restart_from_weights_with_a_fresh_optimiser(tmp_path, capsys):
    first = train(tmp_path / "1", "--epochs", 1)
    again = train(tmp_path / "2", "--restart_epoch", 1, "--ckpt_url", first / "model-wrn-last.pt")
    assert [row["epoch"] for row in metrics(again)] == ["2"]
    weights = load_model(first / "model-wrn-last.pt")[0].state_dict()
    published = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in weights.items()}
    torch.save({"model_ema": weights, "net": published, "epoch": 1}, tmp_path / "published.pt")
    capsys.readouterr()
    assert_same_run(again, train(tmp_path / "3", "--restart_epoch", 1, "--ckpt_url", tmp_path / "published.pt"))
    assert "note: published.pt: weights: net.module" in capsys.readouterr().out


def test_restart_takes_the_weights_of_the_epoch_from_a_run_folder(tmp_path):
    """The file of that epoch's number, else the last or the best one, if it is of that epoch."""
    first = train(tmp_path / "1", "--epochs", 3, "--save-freq", 2)
    numbered = first / "model-2.pt"
    assert numbered.is_file()
    for epoch, file in ((2, numbered), (3, first / "model-wrn-last.pt")):
        flags = ("--epochs", epoch + 1, "--restart_epoch", epoch)
        by_folder = train(tmp_path / f"folder {epoch}", *flags, "--ckpt_url", first)
        by_file = train(tmp_path / f"file {epoch}", *flags, "--ckpt_url", file)
        assert_same_run(by_folder, by_file)
        assert f"from the weights in {file}" in (by_folder / "train.log").read_text()
    numbered.unlink()
    with pytest.raises(UsageError, match=r"no weights of epoch 7, but model-wrn-last\.pt of epoch 3"):
        train(tmp_path / "7", "--epochs", 8, "--restart_epoch", 7, "--ckpt_url", first)
    assert not (tmp_path / "7").exists()


def test_the_line_evaluate_by_works_from_the_current_folder(tmp_path, monkeypatch):
    lines = {}
    for here in (ROOT, tmp_path):
        monkeypatch.chdir(here)
        run = train(tmp_path / here.name, "--epochs", 1)
        log = (run / "train.log").read_text().splitlines()
        (lines[here],) = [line.partition("evaluate by: ")[2] for line in log if line.startswith("evaluate by")]
        script = shlex.split(lines[here])[1]
        assert (here / script).resolve() == ROOT / "test_white_attack.py"
    assert lines[ROOT].startswith("python test_white_attack.py ")


def test_a_loss_that_is_not_finite_names_the_place_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = training.training_loss

    def failing(model, x, *args):
        terms = real(model, x, *args)
        return terms._replace(loss=terms.loss * float("nan")) if len(x) == 4 and failing.armed else terms

    failing.armed = False
    monkeypatch.setattr(training, "training_loss", failing)
    run = train(tmp_path, "--epochs", 1)
    before = (run / "last_state.pt").read_bytes()
    failing.armed = True
    with pytest.raises(RunError, match=r"nan in epoch 2, batch 3; the last good checkpoint is .*last_state.pt"):
        train(tmp_path, "--epochs", 2, "--resume")
    assert (run / "last_state.pt").read_bytes() == before


@pytest.mark.parametrize("rate", ["1e20", "1e38"])
def test_weights_ruined_by_the_last_step_of_an_epoch_do_not_replace_the_last_good_state(tmp_path, rate):
    with pytest.raises(RunError, match=r"(weight|bias) (reaches \S+e\+|is not finite)"):
        train(tmp_path, "--lr", rate, "--limit-train", 10, "--epochs", 1)
    model, info = load_model(folder(tmp_path) / "last_state.pt")
    assert info["epoch"] == 0 and model(torch.rand(2, 3, 16, 16)).isfinite().all()


def test_settings_that_change_the_result_have_folders_of_their_own():
    flags = [[], *(f.split() for f in ("--batch-size 64", "--milestones 5,6", "--wd 0.1", "--val-size 9", "--no-ra"))]
    names = {runs.run_folder(parse_training("", RA, flag)) for flag in flags}
    assert len(names) == len(flags)
    assert Path("model/ANCRA-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1") in names
    same = [["--model-dir", "./model/ANCRA/"], ["--model-dir", "model/ANCRA\\"], ["--epochs", "5"], ["--no-cuda"]]
    assert {runs.run_folder(parse_training("", RA, flag)) for flag in same} <= names


def named(*flags, recipe=RA):
    return runs.run_folder(parse_training("", recipe, list(map(str, flags)))).name


def test_a_folder_s_name_says_what_acts_and_nothing_else(tmp_path, monkeypatch):
    plain = PLAIN | {"model_dir": "./model/TRADES"}
    assert named(recipe=plain) == named("--zeta", 2, "--strategy", "soft", recipe=plain) == "TRADES-beta-6.0-seed-1"
    assert named("--method", "pgd", "--beta", 2, recipe=plain) == "PGD-seed-1"
    assert named("--method", "mart", "--lr", 1, recipe=plain) == "MART-beta-5.0-seed-1-lr-1.0"
    assert named("--no-ra", "--cr_beta", 1) == named("--no-ra")
    assert named("--method", "pgd") == "ANCRA-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1-pgd"
    assert named("--tag", "wider gate") == named() + "-tag-wider gate"
    monkeypatch.chdir(tmp_path)
    one, other = (named("--dataset", "folder", "--data-dir", tmp_path / part / "cats") for part in "ab")
    assert one != other and "-folder-cats-" in one
    assert named("--dataset", "folder", "--data-dir", "a/cats/") == one and named("--data-dir", "a") == named()


def test_a_run_that_failed_before_its_first_step_has_no_claim(straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(training, "attack_batch", lambda *args: (_ for _ in ()).throw(RunError("no memory")))
        train(tmp_path, *TWO)
    assert state(folder(tmp_path))["progress"]["rows"] == []
    assert_same_run(straight, train(tmp_path, *TWO))


def test_overwriting_says_what_is_lost_and_keeps_what_is_not_the_run_s(straight, tmp_path, monkeypatch, capsys):
    run = Path(shutil.copytree(straight, tmp_path / straight.name))
    lost = {
        "tensorboard/events.out.tfevents.1.host.2.0", "white_attack.blocks/pgd-40-0.npz", "white_attack.json",
        "test.log", "adversarial_examples.png", "robust_vs_eps.pdf",
    }  # fmt: skip
    kept = {"notes.txt", "tensorboard/notes.txt", "figures/robust_vs_eps.pdf"}
    for name in lost | kept:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    before = files(run)
    with monkeypatch.context() as patch, pytest.raises(UsageError):  # whatever is wrong, nothing is lost
        patch.setattr(training, "load_training_data", lambda *args: (_ for _ in ()).throw(UsageError("no data")))
        train(tmp_path, *TWO, "--overwrite")
    assert files(run) == before
    train(tmp_path, *TWO, "--overwrite", "--epochs", 1)
    said = capsys.readouterr().out
    assert f"--overwrite: the run of 2 epochs in {run} is lost: " in said
    assert all(name.partition("/")[0] in said for name in lost)
    assert len(metrics(run)) == 1 and all((run / name).read_text() == "mine" for name in kept)
    assert not any((run / name).exists() for name in (*lost, "white_attack.blocks"))
    assert (run / "train.log").read_text().count("evaluate by") == 1


def test_a_bare_resume_means_the_run_of_exactly_this_command(straight, tmp_path):
    """Where there is none the runs that there are are named, each with what it has otherwise, and none is touched."""
    run = Path(shutil.copytree(straight, tmp_path / straight.name))
    restarted = Path(shutil.copytree(straight, tmp_path / f"{straight.name}-restart_epoch-1"))
    record = json.loads((restarted / "run.json").read_text())
    record["settings"]["restart_epoch"] = 1
    (restarted / "run.json").write_text(json.dumps(record))
    before = files(tmp_path)
    for flags, differing in {
        ("--lr", 0.01): "--lr 0.03, here 0.01",
        ("--batch-size", 12): "--batch-size 10, here 12",
        ("--lr-schedule", "cosine"): "--lr-schedule milestones, here cosine",
        ("--no-anc",): "--no-anc False, here True",
    }.items():
        with pytest.raises(UsageError, match="does not exist; name a run by --resume PATH: ") as refusal:
            train(tmp_path, *TWO, *flags, "--resume")
        said = str(refusal.value)
        assert f"{run} ({differing})" in said and f"{restarted} ({differing}; --restart-epoch 1, here 0)" in said
    for damaged in ("", "[]", '{"settings": 3}', '{"settings": {"unknown": 1}}'):
        (restarted / "run.json").write_text(damaged)
        with pytest.raises(UsageError, match="unknown settings"):
            train(tmp_path, *TWO, "--lr", 0.01, "--resume")
    (restarted / "run.json").write_bytes(before[restarted / "run.json"])
    assert files(tmp_path) == before
    shutil.rmtree(run)  # what is left is another run, restarted from weights
    with pytest.raises(UsageError, match="does not exist"):
        train(tmp_path, *TWO, "--resume")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", 0.01), "--lr 0.01, the run has 0.03"),
        (("--lr", 0.03, "--zeta", 2, "--epochs", 9), "--zeta 2.0, the run has 3.0"),
        (("--no-anc",), "--no-anc True, the run has False"),
        (("--milestones", "11,14"), "--milestones 11,14, the run has 2"),
        (("--gate", "soft", "--batch-size", 12), "--batch-size 12, the run has 10, --gate soft, the run has label"),
        (("--extra-data", "x.npz"), "--extra-data x.npz, the run has None"),
    ],
)
def test_a_given_setting_that_the_named_run_has_otherwise_is_an_error(straight, tmp_path, flags, said):
    """Also a default that is given; and the runs that there are are named."""
    run = Path(shutil.copytree(straight, tmp_path / straight.name))
    before = files(tmp_path)
    with pytest.raises(UsageError) as refusal:
        resume(run, "--model-dir", tmp_path / "run", *flags)
    assert f"--resume: {said}; name the run" in str(refusal.value) and f"{run} (--" in str(refusal.value)
    assert files(tmp_path) == before


def test_a_bare_resume_does_not_trust_a_folder_s_name(straight, tmp_path):
    """Here one that was renamed: its settings count, also those that the command does not give."""
    command = [*RUN, "--milestones=2", "--model-dir", str(tmp_path / "run")]
    shutil.copytree(straight, runs.run_folder(parse_training("", RA, [*command, "--lr=0.01"])))
    with pytest.raises(UsageError, match=r"--lr 0\.01, the run has 0\.03"):
        train(tmp_path, *TWO, "--lr", 0.01, "--resume")
    shutil.rmtree(folder(tmp_path))
    run = runs.run_folder(parse_training("", RA, command))
    shutil.copytree(straight, run)
    changed = state(run)
    changed["recipe"]["momentum"] = 0.8
    torch.save(changed, run / "last_state.pt")
    with pytest.raises(UsageError, match=r"--momentum 0\.9, the run has 0\.8"):
        train(tmp_path, *TWO, "--resume")


def test_what_acts_nowhere_in_a_run_may_be_given_to_its_resume(tmp_path):
    run = train(tmp_path, "--epochs", 1, recipe=PLAIN)
    assert "--zeta" not in (resume(run, "--zeta", 9, "--strategy", "soft", "--seed", 1) / "train.log").read_text()
    assert state(run)["recipe"]["zeta"] == 3


def test_a_resume_with_other_data_is_refused_and_records_itself_otherwise(tmp_path, monkeypatch):
    run = train(tmp_path, "--epochs", 1)
    train(tmp_path, "--epochs", 2, "--no-cuda", "--resume", run)
    train(tmp_path, "--epochs", 3, "--device", "cpu", "--resume", run)
    record = json.loads((run / "run.json").read_text())
    assert [r["settings"]["epochs"] for r in (*record["earlier"], record)] == [1, 2, 3]
    real = training.load_training_data
    monkeypatch.setattr(training, "load_training_data", lambda s: real(s)._replace(train=real(s).train.take(torch.arange(20))))
    with pytest.raises(UsageError, match="was trained on 24 images of 10 classes"):
        train(tmp_path, "--epochs", 4, "--resume", run)


def of_pets(root, *flags):
    train(root, "--dataset", "folder", "--data-dir", root / "pets", "--image-size", 16, "--epochs", 1, *flags)


def test_a_resume_with_other_images_needs_a_word_and_one_with_other_code_says_so(tmp_path, capsys):
    counts = {"cat": 3, "dog": 3}
    pets = image_folder(tmp_path / "pets", dict.fromkeys(("train", "val", "test"), counts))
    of_pets(tmp_path)
    run = folder(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert record["checksums"] == state(run)["checksums"] == torch.load(run / "best_adv_model.pt")["checksums"]
    assert record["checksums"].keys() == {"training", "selection", "test"}
    said = capsys.readouterr().out
    assert "cat: 3, dog: 3" in said and "on the val part (6 images)" in said and "best epoch on the test set" in said
    resume(run, "--epochs", 2)
    said = capsys.readouterr().out
    assert "\ndata       other" not in said and "\ncode" not in said
    for part in ("train", "test"):
        png(pets / part / "dog" / "1.png", pixels(77, 16, 16, 3))
    before = files(run)
    with pytest.raises(UsageError, match=r"has other training and test images than .*last_state.pt.*--other-data"):
        resume(run, "--epochs", 3)
    assert files(run) == before
    saved = state(run)
    saved["provenance"]["commit"] = "0" * 40
    torch.save(saved, run / "last_state.pt")
    resume(run, "--epochs", 3, "--other-data")
    said = capsys.readouterr().out
    assert "data       other training and test images than before, by --other-data" in said
    assert f"code       commit {'0' * 40} before, " in said
    assert state(run)["checksums"] != record["checksums"] and "other_data" not in state(run)["recipe"]
    resume(run, "--epochs", 4)  # the word was for those images; these are the run's own now
    assert "other training" not in capsys.readouterr().out


def test_a_run_from_before_there_were_checksums_goes_on_as_it_was(tmp_path, capsys):
    """Its test images selected, whatever else there was."""
    counts = {"cat": 3, "dog": 3}
    image_folder(tmp_path / "pets", dict.fromkeys(("train", "val", "test"), counts))
    of_pets(tmp_path)
    run = folder(tmp_path)
    saved = state(run)
    del saved["checksums"]
    torch.save(saved, run / "last_state.pt")
    png(tmp_path / "pets" / "train" / "dog" / "1.png", pixels(77, 16, 16, 3))
    for epochs in (2, 3):
        capsys.readouterr()
        resume(run, "--epochs", epochs)
        assert "on the test set (6 images)" in capsys.readouterr().out and not state(run)["checksums"]


def test_without_a_test_folder_nothing_reports_and_the_log_says_so(tmp_path, capsys):
    image_folder(tmp_path / "pets", {"train": {"cat": 4, "dog": 4}})
    (tmp_path / "pets" / "train" / "cat" / "x.heic").touch()
    of_pets(tmp_path, "--val-size", 3)
    said = capsys.readouterr().out
    assert "on 3 held-out training images (3 images)" in said and "no test folder" in said
    assert f"skipped 1 non-image files in {tmp_path}" in said and "best epoch on" not in said


def test_a_stop_in_the_final_report_leaves_the_last_state_as_it_is(tmp_path, monkeypatch):
    """The report evaluates the best epoch, here another than the last, whose network the last state holds."""
    real, verdicts, evaluations = training.evaluate, training.verdicts, []

    def falling(*args):
        evaluations.append(1)
        real(*args)
        return 50.0, 50.0 - len(evaluations)

    monkeypatch.setattr(training, "evaluate", falling)
    flags = ("--val-size", 20, *TWO)
    straight = train(tmp_path / "1", *flags)
    assert load_model(straight)[1]["epoch"] == 1 and len(evaluations) == 3
    evaluations.clear()

    def interrupting(*args, **kwargs):
        if len(evaluations) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return verdicts(*args, **kwargs)

    monkeypatch.setattr(training, "verdicts", interrupting)
    with pytest.raises(Stopped):
        train(tmp_path / "2", *flags)
    assert_same_run(straight, folder(tmp_path / "2"))


def test_held_out_images_select_and_the_test_set_is_reported(tmp_path, capsys):
    train(tmp_path, "--val-size", 20, "--epochs", 1)
    said = capsys.readouterr().out
    assert "on 20 held-out training images" in said and "best epoch on the test set" in said


def test_evaluation_every_few_epochs_and_after_the_last(tmp_path):
    rows = metrics(train(tmp_path, "--epochs", 3, "--eval-interval", 2))
    assert [bool(row["natural_accuracy"]) for row in rows] == [False, True, True]


def test_learning_rate_falls_at_absolute_milestones():
    rates = {epoch: training.rate(settings("--epochs", 80), epoch - 1) for epoch in (1, 74, 75, 90, 100)}
    assert rates == pytest.approx({1: 0.01, 74: 0.01, 75: 1e-3, 90: 1e-4, 100: 1e-5})


def test_defaults_are_the_published_recipe():
    expected = {
        "batch_size": 128, "test_batch_size": None, "epochs": 120, "lr": 0.01, "weight_decay": 2e-4, "momentum": 0.9,
        "epsilon": 8 / 255, "num_steps": 10, "step_size": 0.007, "strategy": "random_adv", "beta": 6, "alpha": 1,
        "zeta": 3, "cr_beta": 2, "seed": 1, "width": None, "augmentation": "crop-flip", "val_size": 0,
    }  # fmt: skip
    assert {key: getattr(settings(), key) for key in expected} == expected
    assert settings("--dataset", "cifar100").width is None
    assert settings("--method", "mart").beta == 5 and settings("--arch", "WRN-28-10").zeta == 6
    given = settings("--method", "mart", "--beta", 6, "--arch", "WRN-28-10", "--zeta", 3)
    assert given.beta == 6 and given.zeta == 3
    assert parse(Evaluation, "", ["--ckpt_url", "x"]).num_steps == 40


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        settings().lr = 1.0


def test_accuracies_of_training_forwards_do_not_see_the_label():
    torch.manual_seed(0)
    model = build_model("ResNet18", 10, width=8, image_size=16).train()
    x, labels = torch.rand(64, 3, 16, 16), torch.randint(0, 10, (64,))
    heads, others = model(x, labels, heads=True), model(x, labels.roll(1), heads=True)
    assert first_head_right(heads, labels) == first_head_right(others, labels)
    assert not torch.equal(heads.final, others.final)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("train_")])
def test_scripts_take_their_recipe(script):
    said = python(ROOT / script, "--help").stdout
    arch = "PreActResNet18" if "PreAct" in script else "WRN-34-10" if "Wide" in script else "ResNet18"
    assert f"network (default: {arch})" in " ".join(said.split())
    rate = "0.1" if "PreAct" in script else "0.01"
    assert f"learning rate of SGD (default: {rate})" in " ".join(said.split())
