"""Wrong use and bad input: one clear line on standard error, exit status 2, nothing written or overwritten."""

import gzip
import importlib.util
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

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
    PLAIN,
    RA,
    ROOT,
    SCRIPTS,
    RunsCode,
    checkpoint,
    environment,
    execute,
    files,
    folder,
    folder_flags,
    image_folder,
    metrics,
    python,
)
from tests.helpers import state as state_of
from utils.system.checkpoints import load_model, read
from utils.system.errors import UsageError
from utils.system.options import parse, parse_training
from utils.system.settings import (
    PATH_OR_OWN,
    SWITCH,
    TRUTH,
    Distances,
    Evaluation,
    Histograms,
    Kind,
    Training,
    Umap,
    described,
)
from utils.training.runs import run_folder

pytestmark = pytest.mark.usefixtures("short_runs")


# flags


CHANNELS = [
    "",
    " ",
    "nonsense",
    "cifar",
    "0.5",
    "0.1,0.2",
    "0.1,0.2,0.3,0.4",
    "nan,0.1,0.1",
    "-1,0.1,0.1",
    "125,123,114",
]
NUMBERS = ["", " ", "nonsense", "nan", "inf", "-inf", "1e999", "-1", "1,", "0x10", "٣x", "--", "9" * 5000]
WRONG = {  # by kind of setting
    "number": NUMBERS,
    "whole": [*NUMBERS, "0.5", "1e2", "99999999999999999999"],
    "side": [*NUMBERS, "0.5", "8", "17", "99999999999999999999"],
    "epochs": [*NUMBERS, "0.5", "9,3", "3,3", "0"],
    "attacks": ["", "nonsense", "pgd,", "pgd,nonsense"],
    "truth": ["", "maybe"],
    "path": ["", " "],
    "path or own": ["", " "],
    "word": ["", " "],
    "file name": ["", " ", "a/b", "a\\b", "a:b", ".hidden", "a\nb"],
    "mean": CHANNELS,
    "std": [*CHANNELS, "0,0.1,0.1"],
    "switch": ["", "yes"],
}


@pytest.mark.parametrize("cls", [Training, Evaluation, Distances, Histograms, Umap])
def test_every_flag_refuses_wrong_values_in_one_line(monkeypatch, capsys, cls):
    """Every setting there is, so that new ones are covered, under each of its names, in both spellings."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for name, about in described(cls).items():
        assert about.help
        wrong = WRONG[about.kind.name] if isinstance(about.kind, Kind) else ["", "nonsense", about.kind[0] + "x"]
        names = [name, *(flag[2:] for flag in about.also if flag.startswith("--"))]
        flags = {f"--{n.replace(*change)}" for n in names for change in (("-", "_"), ("_", "-"))}
        bare = [] if about.kind in (SWITCH, TRUTH, PATH_OR_OWN) else [[flag] for flag in flags]
        for argv in (*bare, *([f"{flag}={value}"] for flag in flags for value in wrong)):
            with pytest.raises(SystemExit) as stop:
                parse_training("", RA, argv) if cls is Training else parse(cls, "", argv)
            line = capsys.readouterr().err.removesuffix("\n")
            assert stop.value.code == 2 and line.isprintable(), (argv, line)
            assert line.startswith("script.py: error: ") and any(flag in line for flag in flags), (argv, line)


OUT_OF_RANGE = {
    "--batch-size": "1 0", "--test-batch-size": "0", "--epochs": "0", "--epsilon": "2 8/0", "--num-steps": "0",
    "--step-size": "0 2", "--width": "0", "--lr": "0", "--momentum": "1.5", "--alpha": "2", "--image-size": "12 2048",
    "--sample_class_number": "0", "--sample_number": "0", "--limit-train": "1", "--limit-test": "0",
    "--eval-interval": "0", "--log-interval": "0", "--save-freq": "0",
}  # fmt: skip


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(refused, tmp_path, flag):
    for value in OUT_OF_RANGE[flag].split():
        refused(ANCRA, "--model-dir", tmp_path / "run", f"{flag}={value}", mentions=(flag, value))
        if flag[2:].replace("-", "_") in {*described(Evaluation), "limit_test"}:
            refused(ATTACK, "--ckpt_url", tmp_path, f"{flag}={value}", mentions=(flag, value))


NEAR_MISSES = {
    "--epsilon 8": "8/255", "--step-size 2.0": "2/255", "--epoch 3": "--epochs", "--eps 0.1": "--epsilon",
    "--learning_rate 1": "--lr", "--steps 3": "--step-size or --num-steps", "-epochs 3": "--epochs",
    "--dataset cifar": "cifar10 or cifar100", "--dataset CIFAR-10": "cifar10", "--arch resnet": "ResNet18",
    "--method TRADES": "trades", "--strategy hard-adv": "hard_adv", "--momentum 9": None, "--epsilon 300": None,
    "--bogus": None, "--dataset mnist": None,
}  # fmt: skip


def test_a_near_miss_is_answered(refused, tmp_path):
    for miss, meant in NEAR_MISSES.items():
        line = refused(ANCRA, "--model-dir", tmp_path / "run", *miss.split(), mentions=miss.split()[1:])
        assert line.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in line, line
    refused(ATTACK, "--ckpt_url", tmp_path, "--attacks", "autoatack", mentions=["did you mean autoattack?"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_named(refused, script):
    for extra in ("--bogus", "--see", "stray"):
        refused(script, extra, mentions=(extra,))


@pytest.mark.parametrize(
    "script, flags, mentions",
    [
        (ATTACK, "", ["--ckpt_url"]),
        (ANCRA, "--restart_epoch 1", ["--ckpt_url"]),
        (ANCRA, "--ckpt_url weights.pt", ["--restart_epoch"]),
        (ANCRA, "--restart_epoch 1 --ckpt_url weights.pt --resume", ["--restart_epoch", "--resume"]),
        (ANCRA, "--overwrite --resume", ["--overwrite", "--resume"]),
        (ANCRA, "--restart_epoch 5 --ckpt_url weights.pt --epochs 5", ["--restart_epoch 5", "--epochs"]),
    ],
)
def test_flags_that_are_missing_or_do_not_go_together_are_named(refused, script, flags, mentions):
    refused(script, *flags.split(), mentions=mentions)


PUBLISHED = {
    "batch-size": ("64", 64), "test-batch-size": ("50", 50), "epochs": ("7", 7), "weight-decay": ("0.25", 0.25),
    "lr": ("0.5", 0.5), "momentum": ("0.8", 0.8), "epsilon": ("4/255", 4 / 255), "num-steps": ("3", 3),
    "step-size": ("2/255", 2 / 255), "beta": ("5", 5.0), "alpha": ("0.5", 0.5), "seed": ("9", 9),
    "log-interval": ("11", 11), "model-dir": ("here", "here"), "save-freq": ("4", 4), "cr_beta": ("1.5", 1.5),
    "zeta": ("2", 2.0), "sample_class_number": ("2", 2), "sample_number": ("3", 3), "strategy": ("soft", "soft"),
}  # fmt: skip


def test_published_flags_parse_in_both_spellings():
    for name, (text, value) in PUBLISHED.items():
        key = name.replace("-", "_")
        for spelling in (key, key.replace("_", "-")):
            command = parse_training("", {}, [f"--{spelling}", text])
            assert command.given == {key: value} and getattr(command.settings, key) == value != getattr(Training, key)
    settings = parse_training("", {}, ["-s", "4", "--wd", "0.25", "--no_cuda"]).settings
    assert (settings.save_freq, settings.weight_decay, settings.no_cuda) == (4, 0.25, True)
    for dash in ("_", "-"):
        settings = parse_training("", {}, [f"--restart{dash}epoch", "3", f"--ckpt{dash}url", "w.pt"]).settings
        assert (settings.restart_epoch, settings.ckpt_url) == (3, "w.pt")
    settings = parse(Evaluation, "", ["--model_dir", "w.pt", "--random", "False", "--log-path", "l", "--no-cuda"])
    assert (settings.ckpt_url, settings.random, settings.log_path, settings.no_cuda) == (("w.pt",), False, "l", True)


def test_flags_without_effect_are_accepted_with_one_line(capsys):
    for name, value, parsed in (("strategy", "soft_adv", "soft_adv"), ("zeta", "1", 1.0), ("cr_beta", "1", 1.0)):
        settings = parse_training("", PLAIN, [f"--{name}", value]).settings
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--{name}" in line and "no effect" in line and getattr(settings, name) == parsed
    parse_training("", {}, ["--strategy", "soft_adv", "--zeta", "1", "--alpha", "0.5", "--cr_beta", "1", "--beta", "2"])
    assert capsys.readouterr() == ("", "")


def test_help_and_wrong_flags_answer_without_the_slow_imports(tmp_path):
    for name in ("torch", "torchvision", "numpy", "sklearn", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        answer = python(script, "--help", PYTHONPATH=str(tmp_path))
        assert (answer.returncode, answer.stderr) == (0, ""), script
        assert answer.stdout.count(":\n  -") > 3 or "hist" in script, script  # groups of flags
        assert "default: 8/255; digits: 0.1" in answer.stdout or not script.startswith("train")
        assert "(default: " in answer.stdout and f"python {script}" in answer.stdout, script
    answer = python(ANCRA, "--epochs", "0", PYTHONPATH=str(tmp_path))
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and "--epochs" in answer.stderr


def test_paths_begin_at_home_and_lines_are_utf8(monkeypatch, tmp_path):
    """Shells leave `~` alone behind `=`; consoles of other systems have encodings of their own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings = parse_training("", {}, ["--data-dir=~/data", "--model-dir", "~/runs/x", "--resume=~/r"]).settings
    found = settings.data_dir, settings.model_dir, settings.resume
    assert found == tuple(str(tmp_path / name) for name in ("data", "runs/x", "r"))
    checkpoint(tmp_path / "x.pt")
    assert load_model("~/x.pt")[1]["arch"] == "ResNet18"
    answer = subprocess.run(
        [sys.executable, ANCRA, "--strategy", "☃"],
        cwd=ROOT,
        env=environment(PYTHONIOENCODING="cp1252"),
        capture_output=True,
    )
    assert "'☃'" in answer.stderr.decode("utf-8") and answer.returncode == 2


ODD_NAMES = {"no UTF-8": os.fsdecode(b"r\xfcn"), "two lines": "two\nlines", "no letters": "\u2603\u202e"}


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="their file names are Unicode")
@pytest.mark.parametrize("kind", ODD_NAMES)
def test_a_path_that_cannot_be_shown_is_a_path(tmp_path, kind):
    """It is trained in, logged, recorded, evaluated and resumed like any other."""
    parent = tmp_path / ODD_NAMES[kind]
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    run = folder(parent)
    assert "evaluate by" in (run / "train.log").read_text(encoding="utf-8")
    assert json.loads((run / "run.json").read_text())["settings"]["model_dir"] == str(parent / "run")
    assert execute(ATTACK, "--ckpt_url", run, *EVALUATE) == 0
    assert json.loads((run / "white_attack.json").read_text())["checkpoint"] == str(run / "best_adv_model.pt")
    assert execute(ANCRA, "--resume", run, "--epochs", 2) == 0
    assert execute(ANCRA, "--resume", parent / "no such run") == 2


@pytest.mark.parametrize("script", [ANCRA, ATTACK])
def test_a_device_that_is_not_there_is_named(refused, monkeypatch, tmp_path, script):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = {ANCRA: (*DIGITS, "--model-dir", tmp_path / "run"), ATTACK: ("--ckpt_url", tmp_path / "x.pt")}[script]
    for device in ("cuda", "cuda:0", "cuda:7", "foo", "cuda:x", "meta", "mps:-1"):
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
def test_a_missing_or_truncated_archive_says_what_to_get(refused, no_network, tmp_path, dataset, mentions):
    store = tmp_path / "data"
    flags = ("--dataset", dataset, "--data-dir", store, "--model-dir", tmp_path / "run")
    refused(ANCRA, *flags, mentions=(*mentions, store))
    store.mkdir(exist_ok=True)
    (store / mentions[0]).write_bytes(b"\x1f\x8b\x08\x00 or PK, cut off")
    refused(ANCRA, *flags, mentions=(*mentions, store))


@pytest.mark.parametrize("size", ["1436", "1437", "5000"])
def test_holding_out_more_than_there_is_is_refused(refused, tmp_path, size):
    flags = (*DIGITS, "--model-dir", tmp_path / "run", "--val-size", size)
    refused(ANCRA, *flags, mentions=(f"--val-size {size}", "1437"))


# checkpoints


@pytest.fixture
def restart(tmp_path):
    """The command that starts a run from the weights in a file."""
    return lambda file: (
        ANCRA, *DIGITS, "--epochs", "2", "--restart_epoch", "1", "--ckpt_url", file, "--model-dir", tmp_path / "run"
    )  # fmt: skip


def cut(path, by, **how):
    torch.save({"fc.weight": torch.zeros(10, 32)}, path, **how)
    path.write_bytes(path.read_bytes()[:-by])


NO_CHECKPOINTS = {  # what is wrong with a file, and how it is written
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights, I promise\n"),
    "zeros": lambda path: path.write_bytes(bytes(4000)),
    "truncated": lambda path: cut(path, by=1000),
    "almost whole": lambda path: cut(path, by=1),
    "legacy, truncated": lambda path: cut(path, by=100, _use_new_zipfile_serialization=False),
    "image": lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "number": lambda path: torch.save(3, path),
    "empty dictionary": lambda path: torch.save({}, path),
    "another network": lambda path: torch.save({"layers.0.weight": torch.zeros(3, 3)}, path),
    "model is a number": lambda path: torch.save({"model": 3}, path),
    "model is empty": lambda path: torch.save({"model": {}, "arch": "ResNet18"}, path),
    "whole module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "holds itself": lambda path: torch.save(held_by_itself(), path),
}


def held_by_itself():
    """Dictionaries that all hold one another: ways through them are beyond counting."""
    parts = [{} for _ in range(60)]
    for part in parts:
        part |= {f"{i}": other for i, other in enumerate(parts)}
    return parts[0]


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named(refused, restart, tmp_path, kind):
    file = tmp_path / "weights.pt"
    NO_CHECKPOINTS[kind](file)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file,))
    refused(*restart(file), mentions=(file,))
    refused(ANCRA, "--resume", file, mentions=(file,))


OTHER_KINDS = {  # how files of other kinds begin, and what is said of them
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html>\n<html><title>404 \xe2\x98\x83</title>" + b"x" * 2000, "web page"),
    "a page of XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "an answer in JSON": (b'{"message": "Not Found"}', "JSON"),
    "text": ("weights, I promise \N{SNOWMAN}\n".encode(), "text"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(50), "unpack"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.9.0:\x9c\x01" + bytes(50), "ONNX"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "empty": (b"", "empty"),
    "a plain pickle": (pickle.dumps({"conv1.weight": [1.0]}), "pickle"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_told_what_it_is(refused, restart, tmp_path, kind):
    content, said = OTHER_KINDS[kind]
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    for argv in ((ATTACK, "--ckpt_url", file, *EVALUATE), restart(file), (ANCRA, "--resume", file)):
        assert "weights_only" not in refused(*argv, mentions=(file, said))


def tarred(path):
    path.with_suffix(".log").write_text("a log")
    with tarfile.open(path, "w") as tar:
        tar.add(path.with_suffix(".log"), "run.log")


def gzipped(path):
    path.write_bytes(gzip.compress(b"something"))


def zipped(path, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("run/weights.pt", b"something")


def keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", b"something")


def saved_by_numpy(save):
    def write(path):
        with open(path, "wb") as file:
            save(file, np.zeros(3))

    return write


ARCHIVES = {  # how they are written, and what is said of them
    "tar": (tarred, "unpack"),
    "tar.gz": (gzipped, "unpack"),
    "zip": (zipped, "unpack"),
    "zip, stored": (lambda path: zipped(path, zipfile.ZIP_STORED), "unpack"),
    "npy": (saved_by_numpy(np.save), "numpy"),
    "npz": (saved_by_numpy(np.savez), "numpy"),
    "npz, compressed": (saved_by_numpy(np.savez_compressed), "numpy"),
    "keras": (keras, "Keras"),
    "torchscript": (lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path), "TorchScript"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_another_kind_is_told_what_it_is(tmp_path, kind):
    write, said = ARCHIVES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        write(tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=said) as refusal:
        read(tmp_path / "weights.pt")
    assert "weights_only" not in str(refusal.value)


def write_safetensors(path, state):
    header, data = {}, b""
    for key, value in state.items():
        content = value.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        span = [len(data), len(data) + len(content)]
        header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load_safetensors(content):
    """Stands for safetensors.torch.load, where the package is not installed."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data, state = json.loads(content[8 : 8 + length]), content[8 + length :], {}
    for key, about in header.items():
        begin, end = about["data_offsets"]
        dtype = {"F32": torch.float32, "I64": torch.int64}[about["dtype"]]
        state[key] = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(about["shape"])
    return state


def test_safetensors_are_read_where_the_package_is_installed(refused, monkeypatch, tmp_path):
    net = build_model("ResNet18", 10, width=4, image_size=16)
    file = tmp_path / "weights.safetensors"
    write_safetensors(file, net.state_dict())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file, "pip install safetensors"))
    if importlib.util.find_spec("safetensors"):
        monkeypatch.undo()
    else:
        monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "safetensors.torch", SimpleNamespace(load=load_safetensors))
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(file, image_size=16)[0](x), net.eval()(x))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_checkpoint_never_runs_code(refused, restart, tmp_path, how, wrapped):
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
    for argv in ((ATTACK, "--ckpt_url", file, *EVALUATE), restart(file), (ANCRA, *DIGITS, "--resume", file)):
        refused(*argv, mentions=(file, f"run code, {os.mkdir.__module__}.mkdir" if how != "pickle" else "", "re-save"))
        assert not marker.exists()


def test_a_checkpoint_that_is_not_there_is_named(refused, tmp_path):
    for path in ("no.pt", "no/no.pt", "."):
        refused(ATTACK, "--ckpt_url", tmp_path / path, *EVALUATE, mentions=(tmp_path / path,))


def test_a_checkpoint_of_another_number_of_classes_or_kind_of_network_is_named(refused, restart, tmp_path):
    file = checkpoint(tmp_path / "weights.pt", num_classes=7)
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, mentions=(file, "7 classes", "digits has 10"))
    refused(*restart(file), mentions=(file, "(7, 32)", "(10, 32)", "7 classes, not 10"))
    refused(*restart(checkpoint(file, arch="PreActResNet18")), mentions=(file, "architecture"))


MISREAD = {  # what is in a file that cannot be read as it is meant, and what is said
    "another data set": (lambda net: net | {"fc.weight": torch.ones(100, 32), "fc.bias": torch.ones(100)}, "cifar100"),
    "unknown": (lambda net: {"epoch": 3, "generator": {"weight": torch.ones(3)}}, "it holds epoch, generator"),
    "nothing of the name": (lambda net: {"state_dict": net}, "network called ema; it holds state_dict"),
    "another network before it": (lambda net: wrapped(net) | {"denoise.weight": torch.ones(3)}, "denoise.weight"),
    "a mean alone": (lambda net: net | {"mean": torch.ones(3)}, "unexpected mean"),
    "images of 0 to 255": (lambda net: net | {"mean": torch.ones(3) * 120, "std": torch.ones(3)}, "not of images in"),
}


def wrapped(net, prefix="model."):
    return {f"{prefix}{key}": value for key, value in net.items()}


@pytest.mark.parametrize("kind", MISREAD)
def test_a_published_file_that_would_be_misread_is_named(refused, no_network, tmp_path, kind):
    """Before anything is downloaded: where --dataset is left out, too."""
    change, said = MISREAD[kind]
    file = checkpoint(tmp_path / "weights.pt")
    torch.save(change(torch.load(file, weights_only=True)["model"]), file)
    flags = ("--key", "ema") if kind == "nothing of the name" else ()
    refused(ATTACK, "--ckpt_url", file, "--device", "cpu", *flags, mentions=(file, said))


def test_training_does_not_start_from_a_network_of_normalised_images(refused, restart, tmp_path):
    file = checkpoint(tmp_path / "weights.pt")
    net = torch.load(file, weights_only=True)["model"]
    torch.save(wrapped(net) | {"normalize.mean": torch.ones(3) / 2, "normalize.std": torch.ones(3)}, file)
    refused(*restart(file), mentions=(file, "normalised"))


def test_mean_and_std_come_together(refused, tmp_path):
    for flag in ("--mean", "--std"):
        refused(ATTACK, "--ckpt_url", tmp_path, f"{flag}=cifar10", mentions=("--mean and --std need each other",))


@pytest.mark.parametrize(
    "flags, mentions",
    [
        ("--mean cifar10 --std cifar10", ["mean None", "0.4914"]),
        ("--key model", ["leave --key out"]),
        ("--arch WRN-34-10", ["ResNet18", "WRN-34-10"]),
        ("--arch PreActResNet18", ["ResNet18", "PreActResNet18"]),
        ("--width 8", ["4", "8"]),
        ("--image-size 32", ["16", "32"]),
        ("--no-ra", ["reverse"]),  # no tensor tells: the wrong network would be evaluated silently
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_named(refused, tmp_path, flags, mentions):
    file = checkpoint(tmp_path / "weights.pt")
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, *flags.split(), mentions=(file, *mentions))


def test_a_data_set_that_does_not_fit_the_checkpoint_is_explained(refused, no_network, tmp_path):
    """The size comes from the checkpoint: advice to leave out a flag that was not given would lead nowhere."""
    file = checkpoint(tmp_path / "weights.pt")
    flags = ("--dataset", "cifar10", "--data-dir", tmp_path / "data", "--device", "cpu")
    assert "leave the flag out" not in refused(ATTACK, "--ckpt_url", file, *flags, mentions=("16", "32"))
    checkpoint(file, dataset="svhn")
    refused(ATTACK, "--ckpt_url", file, "--device", "cpu", mentions=(file, "svhn", "--dataset"))


def test_a_moved_folder_of_images_is_named_and_no_other_taken(refused, monkeypatch, tmp_path, capsys):
    """Not even ./data, where other images of the same classes may be."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "data")
    pets = image_folder(tmp_path / "pets")
    known = {"classes": ["cat", "dog"], "dataset": "folder", "recipe": {"data_dir": str(pets)}}
    file = checkpoint(tmp_path / "weights.pt", num_classes=2, **known)
    pets.rename(tmp_path / "moved")
    refused(ATTACK, "--ckpt_url", file, "--device", "cpu", mentions=(file, pets, "--data-dir"))
    checkpoint(file, recipe={"data_dir": str(pets)})
    assert execute(ATTACK, "--ckpt_url", file, *EVALUATE) == 0
    assert f"recorded '{pets}' as the folder of its images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, change, said",
    [
        ("layer2.0.conv1.weight", lambda t: t.fill_(math.nan), "is not finite"),
        ("layer2.0.conv1.weight", lambda t: t.fill_(-math.inf), "is not finite"),
        ("conv1.weight", lambda t: t.fill_(2e6), "reaches 2e+06"),
        ("bn1.running_var", lambda t: t.fill_(-1), "is a variance of -1"),
        ("bn1.num_batches_tracked", lambda t: t.fill_(-1), "is negative"),
        ("fc.weight", lambda t: t.long(), "is of torch.int64"),
        ("fc.bias", lambda t: t.to(torch.complex64), "is of torch.complex64"),
        ("fc.bias", lambda t: t.to_sparse(), "is no ordinary tensor"),
    ],
)
def test_weights_that_cannot_be_right_are_named(refused, restart, tmp_path, key, change, said):
    file = checkpoint(tmp_path / "weights.pt")
    content = torch.load(file, weights_only=True)
    content["model"][key] = change(content["model"][key])
    torch.save(content, file)
    for argv in ((ATTACK, "--ckpt_url", file, *EVALUATE), restart(file)):
        refused(*argv, mentions=(file, key, said))


def test_a_log_that_cannot_be_written_is_named(refused, tmp_path):
    file = checkpoint(tmp_path / "weights.pt")
    (tmp_path / "log").mkdir()
    refused(ATTACK, "--ckpt_url", file, *EVALUATE, "--log_path", tmp_path / "log", mentions=("--log_path",))


# run folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on five digits."""
    parent = tmp_path_factory.mktemp("finished")
    assert execute(ANCRA, *DIGITS, "--model-dir", parent / "run") == 0
    return folder(parent)


@pytest.fixture
def finished(made, tmp_path):
    """A copy of the finished run -> its folder; `tmp_path / "run"` is its --model-dir."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def test_an_output_folder_that_cannot_be_written_is_named(refused, tmp_path):
    """A file stands where the folder, or one above it, should be."""
    name = run_folder(parse_training("", RA, [*DIGITS, "--model-dir", str(tmp_path / "out")]))
    name.write_text("a file")
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "out", mentions=(name, "--model-dir"))
    (tmp_path / "run").write_text("a file")
    refused(ANCRA, *DIGITS, "--model-dir", tmp_path / "run/deeper", mentions=(tmp_path / "run", "--model-dir"))


def test_a_new_run_never_overwrites_another(refused, finished, tmp_path):
    """Nor what is left of one: its checkpoints, as of a published run, or all but these, removed to save space."""
    assert {"last_state.pt", "metrics.csv", "run.json", "train.log"} <= {f.name for f in finished.iterdir()}
    command = (ANCRA, *DIGITS, "--model-dir", tmp_path / "run")
    assert "holds a run already" in refused(*command, mentions=(finished, "--resume", "--model-dir"))
    for kept in (".pt", ".csv .json .log"):
        (tmp_path / "whole").exists() or finished.rename(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", finished, dirs_exist_ok=True)
        for file in finished.iterdir():
            if file.suffix not in kept.split():
                file.unlink()
        refused(*command, mentions=(finished, "--model-dir"))


def test_a_run_that_never_saved_a_state_is_no_dead_end(finished, tmp_path):
    """A run killed in its first epoch has nothing to continue, so that a new one must not be sent to --resume."""
    for file in (*finished.glob("*.pt"), finished / "metrics.csv", finished / "training_curves.png"):
        file.unlink()
    assert not list(finished.glob("*.pt")) and (finished / "run.json").exists()
    assert execute(ANCRA, *DIGITS, "--model-dir", tmp_path / "run") == 0


def test_resuming_without_a_run_is_refused(refused, finished, tmp_path):
    for named in ((), (tmp_path / "other",), (tmp_path / "other/last_state.pt",)):
        flags = (*DIGITS, "--model-dir", tmp_path / "other", "--resume", *named)
        refused(ANCRA, *flags, mentions=("--resume", "does not exist"))
    refused(ANCRA, "--resume", finished / "best_adv_model.pt", mentions=("best_adv_model.pt", "cannot be resumed"))


@pytest.mark.parametrize("length", [1, 100, 0.3, 0.9, 0.999])
def test_resuming_names_a_truncated_state(refused, finished, length):
    file = finished / "last_state.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * length) if length < 1 else length])
    refused(ANCRA, "--resume", finished, mentions=(file,))


@pytest.mark.parametrize("value", [None, "3", {}, torch.zeros(3), 10**5000], ids=["None", "3", "{}", "tensor", "huge"])
def test_resuming_names_a_state_with_an_entry_of_another_kind(refused, finished, value):
    file = finished / "last_state.pt"
    state = state_of(finished)
    for key in ("recipe", "progress", "optimizer", "generator", "classes", "model", "training_images", "ranks"):
        torch.save(state | {key: value}, file)
        if (key, type(value)) != ("generator", torch.Tensor):  # which may be another device's
            refused(ANCRA, "--resume", finished, mentions=(file,))


@pytest.mark.parametrize("key, value", [("epochs", 0), ("lr", "0.1"), ("dataset", "svhn"), ("milestones", [3, 1])])
def test_resuming_names_a_state_with_settings_that_no_command_can_give(refused, finished, key, value):
    file, state = finished / "last_state.pt", state_of(finished)
    state["recipe"][key] = value
    torch.save(state, file)
    refused(ANCRA, "--resume", finished, mentions=(file, "cannot be resumed"))


def test_resuming_with_a_weight_that_is_not_finite_is_refused(refused, finished):
    file, state = finished / "last_state.pt", state_of(finished)
    state["model"]["conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, file)
    refused(ANCRA, "--resume", finished, mentions=(file, "conv1.weight"))


def test_a_state_of_the_first_release_resumes_and_one_of_another_version_is_refused(refused, finished):
    """The first release wrote no version."""
    file, state = finished / "last_state.pt", state_of(finished)
    unknown = {"recipe": state["recipe"] | {"sharpness": 1.0}}
    for changed in ({"version": state["version"] + 1}, {"version": torch.zeros(2)}, unknown):
        torch.save(state | changed, file)
        refused(ANCRA, "--resume", finished, mentions=(file, "another version", "sharpness" * (changed is unknown)))
    del state["version"], state["recipe"]["awp"]  # a setting that is new since then
    torch.save(state, file)
    assert execute(ANCRA, "--resume", finished, "--epochs", "2") == 0
    assert [row["epoch"] for row in metrics(finished)] == ["1", "2"]


# whole processes: nothing but the line


@pytest.mark.parametrize("script", [pytest.param(ANCRA, marks=pytest.mark.slow), ATTACK])
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
    answer = python(script, *argv)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1 and str(named) in answer.stderr
    assert files(tmp_path) == before and not marker.exists()


# odd but right


def assert_trained(parent):
    (row,) = metrics(folder(parent))
    assert all(math.isfinite(float(value)) for value in row.values()), row


@pytest.mark.parametrize("method", ["pgd", "trades", "mart"])
@pytest.mark.parametrize("script", [ANCRA, "train_CIFAR10_WideResNet.py", "train_Tiny_ImageNet_PreActResNet.py"])
def test_a_last_batch_of_one_image_is_trained_on(tmp_path, script, method):
    width = () if "Wide" not in script else ("--width", "1")
    assert execute(script, *DIGITS, *width, "--method", method, "--model-dir", tmp_path / "run") == 0
    assert_trained(tmp_path)


def test_a_baseline_trains_on_a_last_batch_of_one_image(tmp_path, capsys):
    assert execute(BASELINE, *DIGITS, "--strategy", "hard", "--model-dir", tmp_path / "run") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "--strategy" in line
    assert_trained(tmp_path)


@pytest.mark.parametrize("strategy", ["random", "soft_adv", "hard", "easy_adv"])
def test_a_batch_of_one_class_is_trained_on(tmp_path, strategy):
    """Four images of one class and one of the other, two a batch: one batch at least holds one class only."""
    root = image_folder(tmp_path / "pictures", {"train": {"cat": 4, "dog": 1}, "test": {"cat": 2, "dog": 2}})
    flags = (*folder_flags(root), "--batch-size", 2, "--strategy", strategy, "--warmup-epochs", 0)
    assert execute(ANCRA, *flags, "--model-dir", tmp_path / "run") == 0
    assert_trained(tmp_path)
