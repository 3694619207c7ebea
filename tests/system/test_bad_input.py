"""Wrong use and bad input: a clear message, exit status 2, nothing written or overwritten."""

import argparse
import enum
import math
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    ANCRA,
    ATTACK,
    BASELINE,
    DIGITS,
    EVALUATE,
    PLAIN,
    RA,
    ROOT,
    SCRIPTS,
    RunsCode,
    checkpoint,
    digits_content,
    execute,
    folder,
    folder_flags,
    image_folder,
    metrics,
    python,
)
from tests.helpers import state as state_of
from utils.system.checkpoints import load_model
from utils.system.options import parse, parse_training
from utils.system.settings import Distances, Evaluation, Histograms, Training, Umap
from utils.training.runs import run_folder

pytestmark = pytest.mark.usefixtures("short_runs")


# Command lines


def test_help_that_a_pipe_cuts_short_prints_no_traceback():
    argv = [sys.executable, ROOT / ANCRA, "--help"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe) as cut:
        cut.stdout.close()
        assert cut.stderr.read() == b""
    assert cut.returncode == 1


WRONG_VALUES = [
    "--lr=0",
    "--lr=nan",
    "--lr=fast",
    "--lr=",
    "--epsilon=2",
    "--ema=1",
    "--batch_size=1",
    "--num-steps=0.5",
    "--image-size=0",
    "--milestones=0",
    "--method=TRADES",
    "--strategy=hard-adv",
    "--compile=maybe",
    "--data-dir=",
    "--tag=a/b",
    "--device",
]


def refusal(capsys, cls, *argv):
    """What a wrong command line is told, as one line without tyro's frame."""
    with pytest.raises(SystemExit) as stop:
        parse_training("", RA, [*argv]) if cls is Training else parse(cls, "", [*argv])
    assert stop.value.code == 2
    return " ".join(word for word in capsys.readouterr().err.split() if word != "│")


@pytest.mark.parametrize("argument", WRONG_VALUES)
def test_a_wrong_value_is_refused(capsys, argument):
    flag, _, value = argument.partition("=")
    message = refusal(capsys, Training, argument)
    assert value in message
    assert flag.replace("_", "-") in message


@pytest.mark.parametrize(
    "cls, flags, mentioned",
    [
        (Training, "--epoch 3", "--epochs"),
        (Training, "stray", "stray"),
        (Training, "--compile x y", "x,y"),
        (Evaluation, "--ckpt_url=x --attacks=autoatack", "autoatack"),
        (Evaluation, "--ckpt_url=x --mean=cifar", "cifar"),
        (Training, "--restart_epoch 1", "--ckpt_url"),
        (Training, "--ckpt_url weights.pt", "--restart_epoch"),
        (Training, "--overwrite --resume", "--overwrite"),
        (Training, "--method mart --label-smoothing 0.1", "--label-smoothing"),
        (Training, "--extra-data images.npz --extra-fraction 0.999", "--extra-fraction"),
        (Training, "--awp 0.005 --epochs 5", "--awp-warmup"),
        (Training, "--seed=1,x", "'x'"),
        (Training, "--seed=", "--seed"),
        (Training, "--seed=2,2", "twice"),
        (Training, "--seed=1,2 --jobs=0", "--jobs"),
        (Training, "--seed=1 --jobs=2", "--jobs is of several seeds"),
        (Training, "--seed=1,2 --resume", "leave --resume out"),
        (Evaluation, "", "--ckpt_url"),
        (Evaluation, "--ckpt_url", "--ckpt_url PATH"),
        (Evaluation, "--ckpt_url x --model m:f", "--model"),
        (Evaluation, "--ckpt_url x y --log_path z", "--log_path"),
        (Evaluation, "--ckpt_url x --mean cifar10", "--std"),
        (Evaluation, "--ckpt_url x --attacks transfer", "--surrogate"),
        (Distances, "--model_dir x", "--target-label"),
        (Distances, "--model_dir x --target_label 0 --precision bf16", "bf16"),
        (Umap, "--model_dir x y --labels one", "--labels"),
        (Umap, "--model_dir", "needs a path"),
    ],
)
def test_flags_that_are_wrong_together_or_missing_are_named(capsys, cls, flags, mentioned):
    assert mentioned in refusal(capsys, cls, *flags.split())


PUBLISHED = [
    "--batch-size 64",
    "--test-batch-size 50",
    "--epochs 7",
    "--weight-decay 0.25",
    "--lr 0.5",
    "--momentum 0.8",
    "--epsilon 0.5",
    "--num-steps 3",
    "--step-size 0.25",
    "--beta 5.0",
    "--alpha 0.5",
    "--seed 9",
    "--log-interval 11",
    "--model-dir here",
    "--save-freq 4",
    "--cr-beta 1.5",
    "--zeta 2.0",
    "--sample-class-number 2",
    "--sample-number 3",
    "--strategy soft",
]


@pytest.mark.parametrize("words", PUBLISHED)
def test_published_flags_parse_in_both_spellings(words):
    flag, text = words.split()
    name = flag[2:].replace("-", "_")
    for argv in ([flag, text], [f"--{name}", text], [f"--{name}={text}"]):
        command = parse_training("", {}, argv)
        (value,) = command.given.values()
        assert str(value) == text
        assert getattr(command.settings, name) == value


def test_other_spellings_and_forms_of_flags_parse():
    argv = "--epsilon 4/255 -s 4 --wd=0.25 --amp bf16 --no_cuda --compile --cuda_graph False"
    command = parse_training("", {}, [*argv.split(), "--milestones", "75, 90", "--resume"])
    assert command.given == {
        "epsilon": 4 / 255,
        "save_freq": 4,
        "weight_decay": 0.25,
        "precision": "bf16",
        "no_cuda": True,
        "compile": True,
        "cuda_graph": False,
        "milestones": (75, 90),
        "resume": True,
    }
    assert parse_training("", {}, ["-s4", "--resume", "run"]).given == {
        "save_freq": 4,
        "resume": "run",
    }

    argv = "--model_dir a b --random False --limit-test 5 --mean cifar10 --std 1,1,1"
    settings = parse(Evaluation, "", [*argv.split(), "--attacks", "pgd, natural"])
    assert settings.ckpt_url == ("a", "b")
    assert settings.random is False
    assert settings.n_examples == 5
    assert settings.mean == (0.4914, 0.4822, 0.4465)
    assert settings.std == (1, 1, 1)
    assert settings.attacks == ("pgd", "natural")

    assert parse(Distances, "", ["--ckpt_url", "x", "--target_label", "0"]).model_dir == "x"
    assert parse(Umap, "", ["--ckpt-url", "x", "y"]).model_dir == ("x", "y")
    assert parse(Histograms, "", ["--distances", "x", "y", "--show"]).distances == ("x", "y")


@pytest.mark.parametrize("script", sorted(ROOT.glob("train_*_baseline.py")), ids=lambda s: s.stem)
def test_baselines_accept_switches_that_their_recipe_has_on(capsys, script):
    recipe = runpy.run_path(script)["RECIPE"]
    settings = parse_training("", recipe, []).settings
    assert settings.no_ra and settings.no_anc
    for argv in (["--no-ra", "--no-anc"], ["--no_ra", "--no_anc"]):
        assert parse_training("", recipe, argv).settings == settings

    with pytest.raises(SystemExit):
        parse_training("", recipe, ["--help"])
    answer = capsys.readouterr().out
    assert "--no-ra " in answer
    assert "--no-no" not in answer


def test_defaults_come_from_the_script_then_the_data_set_then_the_command():
    recipe = {"lr": 0.5, "weight_decay": 0.25}
    settings = parse_training(
        "", recipe, ["--dataset=digits", "--method=mart", "--epochs=3"]
    ).settings
    assert (settings.lr, settings.weight_decay, settings.epochs) == (0.03, 0.25, 3)
    assert (settings.width, settings.beta, settings.epsilon) == (12, 5.0, 0.1)
    assert parse_training("", {}, ["--dataset=digits", "--arch=WRN-34-10"]).settings.width == 1


def test_published_flags_of_anc_are_accepted_by_baselines():
    argv = ["--strategy", "soft_adv", "--zeta", "1", "--cr_beta", "1"]
    assert parse_training("", PLAIN, argv).settings.strategy == "soft_adv"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_answer_without_the_slow_imports(tmp_path, script):
    for name in ("torch", "torchvision", "numpy", "sklearn", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    answer = python(script, "--help", PYTHONPATH=str(tmp_path))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"python {script}" in answer.stdout and "(default: " in answer.stdout
    answer = python(script, "--bogus", PYTHONPATH=str(tmp_path))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "--bogus" in answer.stderr or "required" in answer.stderr


def test_paths_begin_at_home_and_messages_are_utf8(monkeypatch, tmp_path):
    """Shells leave `~` alone behind `=`; consoles of other systems have encodings of their own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    argv = ["--data-dir=~/data", "--model-dir", "~/runs/x", "--resume=~/r"]
    settings = parse_training("", {}, argv).settings
    paths = [settings.data_dir, settings.model_dir, settings.resume]
    assert paths == [str(tmp_path / name) for name in ("data", "runs/x", "r")]
    checkpoint(tmp_path / "x.pt")
    assert load_model("~/x.pt")[1]["arch"] == "ResNet18"
    answer = python(ANCRA, "--strategy", "☃", PYTHONIOENCODING="cp1252")
    assert "'☃'" in answer.stderr
    assert answer.returncode == 2


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="their file names are Unicode")
def test_a_path_that_cannot_be_shown_is_a_path(tmp_path):
    parent = tmp_path / os.fsdecode(b"r\xfcn")
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    run = folder(parent)
    assert execute(ATTACK, "--ckpt_url", run, *EVALUATE) == 0
    assert execute(ANCRA, "--resume", run, "--epochs", 2) == 0
    assert execute(ANCRA, "--resume", parent / "no such run") == 2


@pytest.mark.parametrize("script", [ANCRA, ATTACK])
def test_a_device_that_is_not_there_is_named(refused, monkeypatch, tmp_path, script):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = {
        ANCRA: (*DIGITS, "--model-dir", tmp_path / "run"),
        ATTACK: ("--ckpt_url", tmp_path / "x.pt"),
    }[script]
    for device in ("cuda", "cuda:7", "foo", "meta"):
        refused(script, *argv, "--device", device, mentions=(f"--device {device}", "cpu"))


# Data sets


@pytest.mark.parametrize(
    "dataset, archive",
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("tiny-imagenet", "tiny-imagenet-200.zip"),
    ],
)
def test_a_missing_archive_is_named(refused, no_network, tmp_path, dataset, archive):
    store = tmp_path / "data"
    flags = ("--dataset", dataset, "--data-dir", store, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(archive, "http", store))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_file_that_is_no_image_is_named(refused, tmp_path, content):
    root = image_folder(tmp_path / "pictures")
    file = root / "train" / "dog" / "broken.png"
    file.write_bytes(content)
    refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=(file,))


def test_holding_out_more_than_there_is_is_refused(refused, tmp_path):
    flags = (*DIGITS, "--model-dir", tmp_path / "run", "--val-size", 1436)
    refused(ANCRA, *flags, mentions=("--val-size 1436", "1437"))


# Checkpoints


def evaluation(file, *flags):
    """Return the command that evaluates the network in a file."""
    return (ATTACK, "--ckpt_url", file, *EVALUATE, *flags)


def restart(file):
    """Return the command that starts a run from the weights in a file."""
    run = ("--epochs", 2, "--model-dir", file.parent / "run")
    return (ANCRA, *DIGITS, *run, "--restart_epoch", 1, "--ckpt_url", file)


class Kind(enum.Enum):
    """An enumeration of the user's own code."""

    PLAIN = 1


def write_truncated(path):
    """Write a checkpoint without its end."""
    checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_zip(path):
    """Write a zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/weights.pt", b"something")


def write_torchscript(path):
    """Write a TorchScript module."""
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


def write_pickle(path):
    """Write what `pickle.load` runs."""
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "executed")))


def write_code(path, new_format):
    """Write what `torch.load` runs without `weights_only`."""
    content = {"args": argparse.Namespace(out=RunsCode(path.parent / "executed"))}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)


# How files that are no checkpoints are written, and a word of what an evaluation says of them
NO_CHECKPOINTS = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "no weights"),
    "empty": (lambda path: path.touch(), "begins with b''"),
    "git-lfs pointer": (lambda path: path.write_text("version https://git-lfs"), "git-lfs"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>404"), "DOCTYPE html"),
    "truncated": (write_truncated, "truncated"),
    "zip": (write_zip, "an archive"),
    "TorchScript": (write_torchscript, "TorchScript"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "state_dict"),
    "another object": (lambda path: torch.save(Kind.PLAIN, path), "nothing"),
    "another network": (lambda path: torch.save({"0.weight": torch.zeros(3, 3)}, path), "0.weight"),
    "pickle that runs code": (write_pickle, "run code"),
    "torch.save that runs code": (partial(write_code, new_format=True), "run code"),
    "old torch.save that runs code": (partial(write_code, new_format=False), "run code"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_never_run(refused, tmp_path, kind):
    file = tmp_path / "last_state.pt"
    write, word = NO_CHECKPOINTS[kind]
    write(file)
    refused(*evaluation(file), mentions=(file, word))
    refused(*restart(file), mentions=(file,))
    refused(ANCRA, "--resume", file, mentions=(file,))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_other_classes_or_another_network_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt", num_classes=7)
    refused(*evaluation(file), mentions=(file, "7 classes"))
    refused(*restart(file), mentions=(file, "[7, 32]"))
    checkpoint(file, arch="PreActResNet18")
    refused(*restart(file), mentions=(file,))


def test_training_does_not_start_from_a_network_of_normalised_images(refused, tmp_path):
    statistics = {"normalize.mean": torch.full((3,), 0.5), "normalize.std": torch.ones(3)}
    file = checkpoint(tmp_path / "weights.pt", **statistics)
    refused(*restart(file), mentions=(file, "normalised"))


@pytest.mark.parametrize(
    "flags, mentions",
    [
        ("--mean cifar10 --std cifar10", ["0.4914"]),
        ("--arch WRN-34-10", ["ResNet18", "WRN-34-10"]),
        ("--image-size 32", ["16", "32"]),
        ("--no-ra", ["reverse"]),  # no tensor tells: another network would be evaluated
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_named(refused, tmp_path, flags, mentions):
    file = checkpoint(tmp_path / "weights.pt")
    refused(*evaluation(file, *flags.split()), mentions=(file, *mentions))


def test_a_data_set_that_does_not_fit_the_checkpoint_is_named(refused, no_network, tmp_path):
    file = checkpoint(tmp_path / "weights.pt")
    flags = ("--dataset", "cifar10", "--data-dir", tmp_path / "data", "--device", "cpu")
    refused(ATTACK, "--ckpt_url", file, *flags, mentions=("16", "32"))
    checkpoint(file, dataset="svhn")
    refused(ATTACK, "--ckpt_url", file, "--device", "cpu", mentions=("svhn", "--dataset"))


def test_a_moved_folder_of_images_is_named(refused, monkeypatch, tmp_path):
    """No other one is taken, not even ./data, where other images of the same classes may be."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "data")
    pets = image_folder(tmp_path / "pets")
    recipe = {"data_dir": str(pets)}
    network = {"classes": ["cat", "dog"], "num_classes": 2, "dataset": "folder"}
    file = checkpoint(tmp_path / "weights.pt", recipe=recipe, **network)
    pets.rename(tmp_path / "moved")
    refused(ATTACK, "--ckpt_url", file, "--device", "cpu", mentions=(pets, "--data-dir"))


def test_weights_that_are_not_finite_are_named(refused, tmp_path):
    content = digits_content()
    content["model"]["layer2.0.conv1.weight"].fill_(math.nan)
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    for argv in (evaluation(file), restart(file)):
        refused(*argv, mentions=(file, "finite"))


def test_a_log_that_cannot_be_written_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt")
    (tmp_path / "log").mkdir()
    refused(*evaluation(file, "--log_path", tmp_path / "log"), mentions=("--log_path",))


# Run folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on five digits."""
    parent = tmp_path_factory.mktemp("finished")
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    return folder(parent)


@pytest.fixture
def finished(made, tmp_path):
    """The folder of a copy of the finished run; `tmp_path / "run"` is its --model-dir."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def test_an_output_folder_that_cannot_be_written_is_named(refused, tmp_path):
    """A file stands where the folder, or one above it, should be."""
    run = run_folder(parse_training("", RA, [*DIGITS, "--model-dir", str(tmp_path / "out")]))
    run.write_text("a file")
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "out", mentions=(run, "--model-dir"))
    (tmp_path / "file").write_text("a file")
    flags = (*DIGITS, "--model-dir", tmp_path / "file" / "deeper")
    refused(ANCRA, *flags, mentions=(tmp_path / "file", "--model-dir"))


def test_a_new_run_never_overwrites_another(refused, finished, tmp_path):
    """Nor what is left of one: its checkpoints, or all but these, removed to save space."""
    command = (ANCRA, *DIGITS, "--model-dir", tmp_path / "run")
    refused(*command, mentions=(finished, "--resume", "--model-dir"))
    whole = finished.rename(tmp_path / "whole")
    for endings in ([".pt"], [".csv", ".json", ".log"]):
        finished.mkdir()
        for file in whole.iterdir():
            if file.suffix in endings:
                shutil.copy(file, finished)
        refused(*command, mentions=(finished, "--model-dir"))
        shutil.rmtree(finished)


def test_a_run_that_never_saved_a_state_may_be_started_again(finished, tmp_path):
    """A run killed in its first epoch has nothing to continue."""
    written = (*finished.glob("*.pt"), finished / "metrics.csv", finished / "training_curves.png")
    for file in written:
        file.unlink()
    assert (finished / "run.json").exists()
    assert execute(ANCRA, *DIGITS, "--model-dir", tmp_path / "run") == 0


def test_resuming_without_a_run_is_refused(refused, finished, tmp_path):
    for path in ((), (tmp_path / "other",), (tmp_path / "other/last_state.pt",)):
        flags = (*DIGITS, "--model-dir", tmp_path / "other", "--resume", *path)
        refused(ANCRA, *flags, mentions=("--resume", "does not exist"))
    weights = finished / "best_adv_model.pt"
    refused(ANCRA, "--resume", weights, mentions=(weights,))


def test_resuming_from_another_version_or_a_weight_that_is_not_finite_is_refused(refused, finished):
    file = finished / "last_state.pt"
    state = state_of(finished)
    state["model"]["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, file)
    refused(ANCRA, "--resume", finished, mentions=(file, "conv1.weight"))
    state["version"] += 1
    torch.save(state, file)
    refused(ANCRA, "--resume", finished, mentions=(file, "version"))


# A whole process


def test_a_process_says_one_line_and_exits_with_two(tmp_path):
    answer = python(*evaluation(tmp_path / "weights.pt"))
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    assert str(tmp_path / "weights.pt") in line


# Unusual but right


@pytest.mark.parametrize(
    "script, flags",
    [
        (ANCRA, ["--method", "mart"]),
        (ANCRA, ["--strategy", "easy_adv", "--warmup-epochs", "0"]),
        ("train_CIFAR10_WideResNet.py", ["--width", "1"]),
        ("train_Tiny_ImageNet_PreActResNet.py", []),
        (BASELINE, []),
    ],
)
def test_a_last_batch_of_one_image_is_trained_on(tmp_path, script, flags):
    """Which is a batch of one class, too."""
    assert execute(script, *DIGITS, *flags, "--model-dir", tmp_path / "run") == 0
    (row,) = metrics(folder(tmp_path))
    assert all(math.isfinite(float(value)) for value in row.values()), row
