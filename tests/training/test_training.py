"""Runs on digits: what they write, and that a stopped run continues exactly."""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils.training.loop as training
from models import build_model
from tests.conftest import shorten_runs
from tests.helpers import (
    PLAIN,
    RA,
    ROOT,
    RUN,
    SCRIPTS,
    assert_same_run,
    digits_split,
    files,
    folder,
    image_folder,
    metrics,
    pixels,
    png,
    python,
    settings,
    state,
    train,
)
from utils.figures.plots import save_or_note
from utils.step import first_head_right
from utils.system.checkpoints import load_model
from utils.system.errors import RunError, Stopped, UsageError
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
    "--epochs 12": "milestones 14: behind the last epoch, 12",
    "--milestones 4,20,30": "milestones 20,30: behind",
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
    assert "--epochs: the run has 1, the command 2; the command's wins" in capsys.readouterr().out


@pytest.mark.parametrize(("signum", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("where", ["attack_batch", "verdicts"])
def test_signals_inside_an_epoch_or_an_evaluation(straight, tmp_path, monkeypatch, signum, word, where):
    real, calls = getattr(training, where), []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, where, interrupting)
    with pytest.raises(Stopped, match=f"{word}; continue by: python .* --resume ") as stopped:
        train(tmp_path, *TWO)
    assert stopped.value.args[0] == signum
    monkeypatch.setattr(training, where, real)
    assert_same_run(straight, train(tmp_path, "--resume", folder(tmp_path)))


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


@pytest.mark.parametrize(("amp", "tf32", "precision"), [("none", False, "fp32"), ("bf16", False, "bf16")])
def test_a_run_of_the_first_release_goes_on(tmp_path, amp, tf32, precision):
    """Its settings had other names and were fewer."""
    run = train(tmp_path, *TWO, "--epochs", 1)
    saved = torch.load(run / "last_state.pt", weights_only=True)
    del saved["recipe"]["precision"], saved["recipe"]["cuda_graph"]
    saved["recipe"] |= {"amp": amp, "tf32": tf32, "test_batch_size": 100}
    torch.save(saved, run / "last_state.pt")
    train(tmp_path, "--epochs", 2, "--resume", run)
    assert state(run)["recipe"]["precision"] == precision and [row["epoch"] for row in metrics(run)] == ["1", "2"]


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
    """A second run does not overwrite the first; a resume says which settings win, and has nothing left to train."""
    run = Path(shutil.copytree(straight, tmp_path / straight.name))
    before = files(run)
    with pytest.raises(UsageError, match=r"holds a run already; continue it by --resume, or name .* --model-dir"):
        train(tmp_path, *TWO)
    assert files(run) == before
    train(tmp_path, "--lr", 5, "--resume", run)
    said = capsys.readouterr().out
    assert "--lr: the run has 0.03, the command 5.0; the run's wins" in said
    assert "resumed    in epoch 3, 0 images done; nothing is left to train, raise --epochs" in said
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
    assert named("--method", "pgd", "--beta", 2, recipe=plain) == "TRADES-seed-1-pgd"
    assert named("--method", "mart", "--lr", 1, recipe=plain) == "TRADES-beta-5.0-seed-1-mart-lr-1.0"
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
    (run / "notes.txt").write_text("mine")
    before = files(run)
    with monkeypatch.context() as patch, pytest.raises(UsageError):  # whatever is wrong, nothing is lost
        patch.setattr(training, "load_training_data", lambda *args: (_ for _ in ()).throw(UsageError("no data")))
        train(tmp_path, *TWO, "--overwrite")
    assert files(run) == before
    train(tmp_path, *TWO, "--overwrite", "--epochs", 1)
    said = capsys.readouterr().out
    assert f"--overwrite: the run of 2 epochs in {run} is lost: best_adv_model.pt, " in said
    assert len(metrics(run)) == 1 and (run / "notes.txt").read_text() == "mine"
    assert (run / "train.log").read_text().count("evaluate by") == 1


def test_a_bare_resume_finds_the_run_it_came_from(straight, tmp_path, capsys):
    """Under an older name, or where the command changes a number of it."""
    older = Path(shutil.copytree(straight, tmp_path / "run-of-the-first-release"))
    for flags in ((), ("--lr", 5), ("--zeta", 2, "--batch-size", 12)):
        assert train(tmp_path, *TWO, *flags, "--resume") == older
        said = capsys.readouterr().out
        assert f"continuing {older}" in said and said.count("the run's wins") == 1 + len(flags) / 2  # --model-dir
    for flags in (("--tag", "x"), ("--no-anc",), ("--method", "pgd"), ("--seed", 2), ("--strategy", "hard_adv")):
        with pytest.raises(UsageError, match=rf"does not exist; name a run by --resume PATH: {older}$"):
            train(tmp_path, *TWO, *flags, "--resume")
    other = Path(shutil.copytree(straight, tmp_path / "run-again"))
    with pytest.raises(UsageError, match=rf"does not exist; name .*: {other}, {older}$"):
        train(tmp_path, *TWO, "--resume")
    for damaged in ("", "[]", '{"settings": 3}', '{"settings": {"no_anc": "x"}}'):
        (other / "run.json").write_text(damaged)
        assert runs.run_to_resume(parse_training("", RA, [*RUN, "--milestones=2", "--model-dir", str(tmp_path / "run")])) == older


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
    train(tmp_path, "--resume", run, "--epochs", 2)
    said = capsys.readouterr().out
    assert "\ndata       other" not in said and "\ncode" not in said
    for part in ("train", "test"):
        png(pets / part / "dog" / "1.png", pixels(77, 16, 16, 3))
    before = files(run)
    with pytest.raises(UsageError, match=r"has other training and test images than .*last_state.pt.*--other-data"):
        train(tmp_path, "--resume", run, "--epochs", 3)
    assert files(run) == before
    saved = state(run)
    saved["provenance"]["commit"] = "0" * 40
    torch.save(saved, run / "last_state.pt")
    train(tmp_path, "--resume", run, "--epochs", 3, "--other-data")
    said = capsys.readouterr().out
    assert "data       other training and test images than before, by --other-data" in said
    assert f"code       commit {'0' * 40} before, " in said
    assert state(run)["checksums"] != record["checksums"] and "other_data" not in state(run)["recipe"]
    train(tmp_path, "--resume", run, "--epochs", 4)  # the word was for those images; these are the run's own now
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
        train(tmp_path, "--resume", run, "--epochs", epochs)
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
    assert f"learning rate of SGD (default: {rate};" in " ".join(said.split())
