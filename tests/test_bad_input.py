"""Wrong use and bad input: one clear line on standard error, exit status 2, nothing written or overwritten."""

import csv
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from tests.helpers import (
    ANCRA,
    ATTACK,
    BASELINE,
    DIGITS,
    EVALUATE,
    ROOT,
    SCRIPTS,
    RunsCode,
    checkpoint,
    execute,
    files,
    folder_flags,
    image_folder,
)
from utils.options import TRAINING, parse_evaluation, parse_training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The parent folder of a finished run on five digits, the folder's name a fixed one."""
    parent = tmp_path_factory.mktemp("finished")
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    return parent


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of the finished run -> its folder; `tmp_path / "run"` is its --model-dir."""
    (folder,) = finished.iterdir()
    return Path(shutil.copytree(folder, tmp_path / folder.name))


# flags


BAD_FLAGS = [
    ("--batch-size", "1"),
    ("--batch-size", "0"),
    ("--batch-size", "-4"),
    ("--batch-size", "2.5"),
    ("--test-batch-size", "0"),
    ("--epochs", "0"),
    ("--epochs", "-1"),
    ("--epochs", "ten"),
    ("--epsilon", "-1"),
    ("--epsilon", "2"),
    ("--epsilon", "nan"),
    ("--epsilon", "inf"),
    ("--epsilon", "abc"),
    ("--epsilon", "8/0"),
    ("--num-steps", "0"),
    ("--num-steps", "-1"),
    ("--step-size", "0"),
    ("--step-size", "-0.1"),
    ("--width", "0"),
    ("--width", "-4"),
    ("--image-size", "12"),
    ("--image-size", "17"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--momentum", "1.5"),
    ("--weight-decay", "-1"),
    ("--beta", "-1"),
    ("--alpha", "2"),
    ("--zeta", "-1"),
    ("--cr_beta", "-1"),
    ("--milestones", "9,3"),
    ("--milestones", "a"),
    ("--warmup-epochs", "-1"),
    ("--sample_class_number", "0"),
    ("--sample_number", "-1"),
    ("--val-size", "-1"),
    ("--limit-train", "1"),
    ("--limit-train", "-5"),
    ("--limit-test", "0"),
    ("--eval-interval", "0"),
    ("--log-interval", "-1"),
    ("--save-freq", "0"),
    ("--seed", "-1"),
    ("--restart_epoch", "-1"),
    ("--method", "fgsm"),
    ("--dataset", "svhn"),
    ("--arch", "ResNet50"),
    ("--strategy", "softest"),
    ("--inner", "mse"),
    ("--model-dir", ""),
]


@pytest.mark.parametrize("flag, value", BAD_FLAGS)
def test_a_value_out_of_range_is_named(refused, tmp_path, flag, value):
    model_dir = () if flag == "--model-dir" else ("--model-dir", tmp_path / "run")
    refused(ANCRA, *model_dir, f"{flag}={value}", mentions=(flag, value))


@pytest.mark.parametrize(
    "flag, value",
    [("--epsilon", "-1"), ("--num-steps", "0"), ("--width", "0"), ("--random", "maybe"), ("--limit-test", "0")],
)
def test_a_value_out_of_range_is_named_in_evaluation(refused, tmp_path, flag, value):
    refused(ATTACK, "--ckpt_url", tmp_path, f"{flag}={value}", mentions=(flag, value))


@pytest.mark.parametrize("script", [ANCRA, BASELINE, ATTACK])
@pytest.mark.parametrize("extra", ["--bogus", "--batch", "stray"])
def test_an_unknown_flag_is_named(refused, tmp_path, script, extra):
    refused(script, "--model-dir", tmp_path / "run", extra, mentions=(extra,))


def test_evaluation_needs_a_checkpoint(refused):
    refused(ATTACK, mentions=("--ckpt_url",))


@pytest.mark.parametrize(
    "flags, mentions",
    [
        (("--restart_epoch", "1"), ("--ckpt_url",)),
        (("--ckpt_url", "weights.pt"), ("--restart_epoch",)),
        (("--restart_epoch", "1", "--ckpt_url", "weights.pt", "--resume"), ("--restart_epoch", "--resume")),
        (("--restart_epoch", "5", "--ckpt_url", "weights.pt", "--epochs", "5"), ("--restart_epoch 5", "--epochs")),
    ],
)
def test_flags_that_do_not_go_together_are_named(refused, tmp_path, flags, mentions):
    refused(ANCRA, "--model-dir", tmp_path / "run", *flags, mentions=mentions)


@pytest.mark.parametrize("spell", [lambda name: name.replace("-", "_"), lambda name: name.replace("_", "-")])
@pytest.mark.parametrize(
    "name, value, parsed",
    [
        ("batch-size", "64", 64),
        ("test-batch-size", "50", 50),
        ("epochs", "7", 7),
        ("weight-decay", "0.25", 0.25),
        ("lr", "0.5", 0.5),
        ("momentum", "0.8", 0.8),
        ("epsilon", "4/255", 4 / 255),
        ("num-steps", "3", 3),
        ("step-size", "2/255", 2 / 255),
        ("beta", "5", 5.0),
        ("alpha", "0.5", 0.5),
        ("seed", "9", 9),
        ("log-interval", "11", 11),
        ("model-dir", "here", "here"),
        ("save-freq", "4", 4),
        ("cr_beta", "1.5", 1.5),
        ("zeta", "2", 2.0),
        ("sample_class_number", "2", 2),
        ("sample_number", "3", 3),
        ("strategy", "hard_adv", "hard_adv"),
    ],
)
def test_published_flags_parse_in_both_spellings(name, value, parsed, spell):
    options = parse_training("", {}, [f"--{spell(name)}", value])
    setting = name.replace("-", "_")
    assert getattr(options, setting) == parsed != TRAINING[setting]
    assert options.given == [setting]


def test_short_and_paired_published_flags_parse():
    options = parse_training("", {}, ["-s", "4", "--wd", "0.25", "--no_cuda"])
    assert (options.save_freq, options.weight_decay, options.no_cuda) == (4, 0.25, True)
    for dash in ("_", "-"):
        options = parse_training("", {}, [f"--restart{dash}epoch", "3", f"--ckpt{dash}url", "w.pt"])
        assert (options.restart_epoch, options.ckpt_url) == (3, "w.pt")
    options = parse_evaluation("", ["--model_dir", "w.pt", "--random", "False", "--log-path", "l", "--no-cuda"])
    assert (options.ckpt_url, options.random, options.log_path, options.no_cuda) == ("w.pt", False, "l", True)


@pytest.mark.parametrize(
    "flag, value, parsed", [("--strategy", "soft_adv", "soft_adv"), ("--zeta", "1", 1.0), ("--alpha", "0.5", 0.5)]
)
def test_a_published_flag_without_effect_is_accepted_with_one_line(capsys, flag, value, parsed):
    options = parse_training("", {"no_ra": True, "no_anc": True}, [flag, value])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and flag in lines[0] and "no effect" in lines[0]
    assert getattr(options, flag[2:]) == parsed


def test_the_weight_of_heads_that_are_not_there_is_said_to_have_no_effect(capsys):
    parse_training("", {"no_ra": True, "no_anc": True}, ["--cr_beta", "1"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--cr_beta" in lines[0] and "no effect" in lines[0]


def test_flags_with_an_effect_are_taken_silently(capsys):
    parse_training("", {}, ["--strategy", "soft_adv", "--zeta", "1", "--alpha", "0.5", "--cr_beta", "1", "--beta", "2"])
    assert capsys.readouterr() == ("", "")


def test_help_answers_without_the_slow_imports(tmp_path):
    for name in ("torch", "torchvision", "numpy", "sklearn", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        answer = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (answer.returncode, answer.stderr) == (0, ""), script
        assert "(default: " in answer.stdout and f"python {script}" in answer.stdout, script


def test_a_wrong_flag_answers_without_the_slow_imports(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    answer = subprocess.run(
        [sys.executable, ANCRA, "--epochs", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and "--epochs" in answer.stderr


# devices


@pytest.mark.parametrize("script", [ANCRA, ATTACK])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "foo", "cuda:x", "meta", "mps:-1"])
def test_a_device_that_is_not_there_is_named(refused, monkeypatch, tmp_path, script, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = {ANCRA: (*DIGITS, "--model-dir", tmp_path / "run"), ATTACK: ("--ckpt_url", tmp_path / "x.pt")}[script]
    refused(script, *argv, "--device", device, mentions=(f"--device {device}", "cpu"))


# data sets


@pytest.mark.parametrize(
    "dataset, mentions",
    [
        ("cifar10", ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "https://")),
        ("cifar100", ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "https://")),
        ("tiny-imagenet", ("tiny-imagenet-200.zip", "248,100,043", "90528d7ca1a48142e341f4ef8d21d0de", "http")),
    ],
)
@pytest.mark.parametrize("archive", ["missing", "truncated"])
def test_a_missing_or_truncated_archive_says_what_to_get(refused, no_network, tmp_path, dataset, mentions, archive):
    store = tmp_path / "data"
    if archive == "truncated":
        store.mkdir()
        (store / mentions[0]).write_bytes(b"\x1f\x8b\x08\x00 or PK, cut off")
    flags = ("--dataset", dataset, "--data-dir", store, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(*mentions, store))


def test_a_data_folder_that_is_a_file_is_named(refused, no_network, tmp_path):
    (tmp_path / "data").write_text("a file")
    for dataset in ("cifar10", "tiny-imagenet", "folder"):
        flags = ("--dataset", dataset, "--data-dir", tmp_path / "data", "--model-dir", tmp_path / "run")
        refused(ANCRA, *flags, mentions=(tmp_path / "data",))


@pytest.mark.parametrize(
    "counts, mentions",
    [
        ({"train": {"cat": 2}, "test": {"cat": 2}}, ("train", "at least 2")),
        ({"train": {}, "test": {}}, ("train",)),
        ({"train": {"cat": 2, "dog": 0}, "test": {"cat": 2, "dog": 2}}, ("train/dog",)),
        ({"train": {"cat": 2, "dog": 2}, "test": {"cat": 0, "dog": 2}}, ("test/cat",)),
        ({"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "emu": 2}}, ("train", "test", "dog", "emu")),
        ({"train": {"cat": 2, "dog": 2}, "val": {"cat": 2}}, ("train", "val", "dog")),
        ({"test": {"cat": 2, "dog": 2}}, ("train",)),
        ({"train": {"cat": 2, "dog": 2}}, ("test", "val")),
    ],
)
def test_a_folder_of_another_layout_is_named(refused, tmp_path, counts, mentions):
    root = tmp_path / "pictures"
    root.mkdir()
    image_folder(root, counts)
    for part in counts:
        (root / part).mkdir(exist_ok=True)
    refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=mentions)


def test_a_folder_that_is_not_there_is_named(refused, tmp_path):
    refused(ANCRA, *folder_flags(tmp_path / "no"), "--model-dir", tmp_path / "run", mentions=(tmp_path / "no",))


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "ppm"])
def test_a_truncated_image_is_named(refused, tmp_path, ending):
    root = image_folder(tmp_path / "pictures")
    file = root / "train" / "dog" / f"broken.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    whole = file.read_bytes()
    for length in (0, 3, 12, 20, 50, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        line = refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=(file,))
        assert "replace or remove" in line


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "ppm"])
def test_damaged_images_are_read_or_named(tmp_path, ending):
    """Bytes changed at random: whatever the decoder raises becomes a line that names the file."""
    from utils.data import _decode
    from utils.options import UsageError

    file = tmp_path / f"broken.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    whole, generator, failed = file.read_bytes(), np.random.default_rng(1), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 120), 3):
            damaged[place] = generator.integers(0, 256)
        file.write_bytes(damaged)
        try:
            assert _decode(file, 16).shape == (3, 16, 16)
        except UsageError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            failed += 1
    assert failed


@pytest.mark.parametrize("content", [b"", b"no image at all", b"<html>404</html>", bytes(300)])
def test_a_file_that_is_no_image_is_named(refused, tmp_path, content):
    root = image_folder(tmp_path / "pictures")
    file = root / "train" / "cat" / "broken.png"
    file.write_bytes(content)
    refused(ANCRA, *folder_flags(root), "--model-dir", tmp_path / "run", mentions=(file,))


@pytest.mark.parametrize("size", ["1436", "1437", "5000"])
def test_holding_out_more_than_there_is_is_refused(refused, tmp_path, size):
    flags = (*DIGITS, "--model-dir", tmp_path / "run", "--val-size", size)
    refused(ANCRA, *flags, mentions=(f"--val-size {size}", "1437"))


# checkpoints


def no_checkpoint(path, kind):
    """Write a file that is no checkpoint; kind: what is wrong with it."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("weights, I promise\n")
    elif kind == "zeros":
        path.write_bytes(bytes(4000))
    elif kind == "truncated":
        content = checkpoint(path).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "almost whole":
        path.write_bytes(checkpoint(path).read_bytes()[:-1])
    elif kind == "legacy, truncated":
        torch.save({"fc.weight": torch.zeros(10, 32)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "image":
        Image.new("RGB", (8, 8)).save(path, "PNG")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "number":
        torch.save(3, path)
    elif kind == "empty dictionary":
        torch.save({}, path)
    elif kind == "another network":
        torch.save({"layers.0.weight": torch.zeros(3, 3)}, path)
    elif kind == "model is a number":
        torch.save({"model": 3}, path)
    elif kind == "model is empty":
        torch.save({"model": {}, "arch": "ResNet18"}, path)
    elif kind == "whole module":
        torch.save(torch.nn.Linear(2, 2), path)
    return path


KINDS = (
    "empty",
    "text",
    "zeros",
    "truncated",
    "almost whole",
    "legacy, truncated",
    "image",
    "tensor",
    "number",
    "empty dictionary",
    "another network",
    "model is a number",
    "model is empty",
    "whole module",
)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_names_a_file_that_is_no_checkpoint(refused, tmp_path, kind):
    file = no_checkpoint(tmp_path / "weights.pt", kind)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file,))


@pytest.mark.parametrize("kind", KINDS)
def test_restarting_names_a_file_that_is_no_checkpoint(refused, tmp_path, kind):
    file = no_checkpoint(tmp_path / "weights.pt", kind)
    flags = (*DIGITS, "--epochs", "2", "--restart_epoch", "1", "--ckpt_url", file, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(file,))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_checkpoint_never_runs_code(refused, tmp_path, how, wrapped):
    marker, file = tmp_path / "executed", tmp_path / "weights.pt"
    content = RunsCode(marker)
    if wrapped:
        content = torch.load(checkpoint(file), weights_only=True) | {"epoch": content}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "torch")
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    marker.rmdir()  # raises unless the payload works
    flags = (*DIGITS, "--epochs", "2", "--model-dir", tmp_path / "run")
    for argv in (
        (ATTACK, "--ckpt_url", file, *EVALUATE),
        (ANCRA, *flags, "--restart_epoch", "1", "--ckpt_url", file),
        (ANCRA, *flags, "--resume", file),
    ):
        refused(*argv, mentions=(file,))
        assert not marker.exists()


@pytest.mark.parametrize("path", ["no.pt", "no/no.pt", "."])
def test_a_checkpoint_that_is_not_there_is_named(refused, tmp_path, path):
    refused(ATTACK, "--ckpt_url", tmp_path / path, *EVALUATE, mentions=(tmp_path / path,))


def test_a_checkpoint_of_another_number_of_classes_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt", num_classes=7)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file, "7 classes", "digits has 10"))
    flags = (*DIGITS, "--epochs", "2", "--restart_epoch", "1", "--ckpt_url", file, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(file, "(7, 32)", "(10, 32)"))


@pytest.mark.parametrize(
    "flag, value", [("--arch", "WRN-34-10"), ("--arch", "PreActResNet18"), ("--width", "8"), ("--image-size", "32")]
)
def test_a_flag_that_contradicts_the_checkpoint_is_named(refused, tmp_path, flag, value):
    file = checkpoint(tmp_path / "weights.pt")
    known = {"--arch": "ResNet18", "--width": "4", "--image-size": "16"}[flag]
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, flag, value, mentions=(file, known, value))


def test_a_checkpoint_with_reverse_attention_is_not_evaluated_without(refused, tmp_path):
    """No tensor tells one from the other, so that the wrong network would be evaluated silently."""
    file = checkpoint(tmp_path / "weights.pt")
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, "--no-ra", mentions=(file, "reverse"))


def test_a_checkpoint_of_another_kind_of_network_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt", arch="PreActResNet18")
    flags = (*DIGITS, "--epochs", "2", "--restart_epoch", "1", "--ckpt_url", file, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(file, "architecture"))


def test_a_data_set_of_another_size_than_the_checkpoint_is_explained(refused, no_network, tmp_path):
    """The size comes from the checkpoint: advice to leave out a flag that was not given would lead nowhere."""
    file = checkpoint(tmp_path / "weights.pt")
    flags = ("--dataset", "cifar10", "--data-dir", tmp_path / "data", "--device", "cpu")
    assert "leave the flag out" not in refused(ATTACK, "--ckpt_url", file, *flags, mentions=("16", "32"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(refused, tmp_path, value):
    state = build_model("ResNet18", 10, width=4, image_size=16).state_dict()
    state["layer2.0.conv1.weight"][1, 2, 0, 1] = value
    file = checkpoint(tmp_path / "weights.pt", model=state)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file, "layer2.0.conv1.weight", "not finite"))
    flags = (*DIGITS, "--epochs", "2", "--restart_epoch", "1", "--ckpt_url", file, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(file, "layer2.0.conv1.weight", "not finite"))


def test_a_log_that_cannot_be_written_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt")
    (tmp_path / "log").mkdir()
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, "--log_path", tmp_path / "log", mentions=("--log_path",))


# run folders


@pytest.mark.parametrize("where", ["run", "run/deeper"])
def test_an_output_folder_that_cannot_be_written_is_named(refused, tmp_path, where):
    """A file stands where the folder, or one above it, should be."""
    (tmp_path / "run").write_text("a file")
    if where == "run":
        options = parse_training("", {"arch": "ResNet18"}, [*DIGITS, "--model-dir", str(tmp_path / "out")])
        from utils.runs import run_folder

        name = run_folder(options)
        name.write_text("a file")
        refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "out", mentions=(name, "--model-dir"))
    else:
        refused(ANCRA, *DIGITS, "--model-dir", tmp_path / where, mentions=(tmp_path / "run", "--model-dir"))


def test_a_new_run_never_overwrites_another(refused, trained, tmp_path):
    assert {"last_state.pt", "metrics.csv", "run.json", "train.log"} <= {f.name for f in trained.iterdir()}
    line = refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "run", mentions=(trained, "--resume", "--model-dir"))
    assert "holds a run already" in line


@pytest.mark.parametrize("kept", [".pt", ".csv .json .log"])
def test_part_of_a_run_is_not_overwritten_either(refused, trained, tmp_path, kept):
    """Only its checkpoints are left, as a published run has them, or all but these, removed to save space."""
    for file in trained.iterdir():
        if file.suffix not in kept.split():
            file.unlink()
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "run", mentions=(trained, "--model-dir"))


def test_a_run_that_never_saved_a_state_is_no_dead_end(trained, tmp_path, capsys):
    """A run killed in its first epoch has nothing to continue, so that a new one must not be sent to --resume."""
    for file in (*trained.glob("*.pt"), trained / "metrics.csv", trained / "training_curves.png"):
        file.unlink()
    assert not list(trained.glob("*.pt")) and (trained / "run.json").exists()
    status = execute(ANCRA, *DIGITS, "--model-dir", tmp_path / "run")
    line = capsys.readouterr().err
    assert status == 0 or (status == 2 and "--resume" not in line)


@pytest.mark.parametrize("resume", [(), ("run",), ("run/last_state.pt",)])
def test_resuming_without_a_run_is_refused(refused, tmp_path, resume):
    argv = [tmp_path / path for path in resume]
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "run", "--resume", *argv, mentions=("--resume", "does not exist"))


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_names_a_corrupted_state(refused, trained, tmp_path, kind):
    file = no_checkpoint(trained / "last_state.pt", kind)
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "run", "--resume", mentions=(file,))


@pytest.mark.parametrize("length", [1, 100, 0.3, 0.9, 0.999])
def test_resuming_names_a_truncated_state(refused, trained, length):
    file = trained / "last_state.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * length) if length < 1 else length])
    refused(ANCRA, "--resume", trained, mentions=(file,))


def test_resuming_from_a_checkpoint_without_a_state_is_refused(refused, trained):
    refused(ANCRA, "--resume", trained / "best_adv_model.pt", mentions=("best_adv_model.pt", "last_state.pt"))


@pytest.mark.parametrize("key", ["recipe", "progress", "optimizer", "classes", "model"])
@pytest.mark.parametrize("value", [None, 3, {}])
def test_resuming_names_a_state_with_an_entry_of_another_kind(refused, trained, key, value):
    file = trained / "last_state.pt"
    torch.save(torch.load(file, weights_only=True) | {key: value}, file)
    refused(ANCRA, "--resume", trained, mentions=(file,))


def test_resuming_with_a_weight_that_is_not_finite_is_refused(refused, trained):
    file = trained / "last_state.pt"
    state = torch.load(file, weights_only=True)
    state["model"]["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, file)
    refused(ANCRA, "--resume", trained, mentions=(file, "conv1.weight"))


# whole processes: nothing but the line


@pytest.mark.parametrize("script", [ANCRA, ATTACK])
def test_a_process_says_one_line_and_exits_with_two(tmp_path, script):
    root = image_folder(tmp_path / "pictures")
    broken = root / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    marker, file = tmp_path / "executed", tmp_path / "weights.pt"
    torch.save({"model": RunsCode(marker)}, file)
    argv, named = {
        ANCRA: ((*folder_flags(root), "--model-dir", tmp_path / "run"), broken),
        ATTACK: (("--ckpt_url", file, *EVALUATE), file),
    }[script]
    before = files(tmp_path)
    answer = subprocess.run([sys.executable, script, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1 and str(named) in answer.stderr
    assert files(tmp_path) == before and not marker.exists()


def test_settings_that_matplotlib_refuses_are_named(tmp_path):
    command = [sys.executable, "draw_hist.py", "--distances", str(tmp_path / "none.npz")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "gtk9"})
    (line,) = answer.stderr.splitlines()
    assert answer.returncode == 2 and line.startswith("draw_hist.py: error: matplotlib: ") and "MPLBACKEND" in line


# odd but right


def rows(parent):
    (file,) = parent.glob("run*/metrics.csv")
    with open(file, newline="") as table:
        return list(csv.DictReader(table))


def assert_trained(parent):
    (row,) = rows(parent)
    for key, value in row.items():
        assert math.isfinite(float(value)), key


@pytest.mark.parametrize("method", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("script", [ANCRA, "train_CIFAR10_WideResNet.py", "train_Tiny_ImageNet_PreActResNet.py"])
def test_a_last_batch_of_one_image_is_trained_on(tmp_path, script, method):
    width = () if "Wide" not in script else ("--width", "1")
    assert execute(script, *DIGITS, *width, "--method", method, "--model-dir", tmp_path / "run") == 0
    assert_trained(tmp_path)


def test_a_baseline_trains_on_a_last_batch_of_one_image(tmp_path, capsys):
    assert execute(BASELINE, *DIGITS, "--strategy", "hard", "--model-dir", tmp_path / "run") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--strategy" in lines[0]
    assert_trained(tmp_path)


@pytest.mark.parametrize("strategy", ["random", "soft_adv", "hard", "easy_adv"])
def test_a_batch_of_one_class_is_trained_on(tmp_path, strategy):
    """Four images of one class and one of the other, two a batch: one batch at least holds one class only."""
    root = image_folder(tmp_path / "pictures", {"train": {"cat": 4, "dog": 1}, "test": {"cat": 2, "dog": 2}})
    flags = (*folder_flags(root), "--batch-size", 2, "--strategy", strategy, "--warmup-epochs", 0)
    assert execute(ANCRA, *flags, "--model-dir", tmp_path / "run") == 0
    assert_trained(tmp_path)
