"""Wrong use of the programs in tests/tools is refused before anything is computed."""

import pytest

from tests.helpers import GOLDEN
from tests.tools import benchmarks, full_scale, study, truth

NO_STUDY = f"{GOLDEN}/ResNet18.keys.json"


@pytest.mark.parametrize(
    ("tool", "flags", "words"),
    [
        (benchmarks, "stpe", "stpe"),
        (benchmarks, "negatives --device gpu", "--device gpu"),
        (benchmarks, "negatives --out file/figures.json", "file/figures.json"),
        (full_scale, "--dataset digits", "nothing is counted here"),
        (full_scale, "--precision bf16", "nothing is counted here"),
        (full_scale, "--resume x", "nothing is counted here"),
        (study, "nothing", "'nothing'"),
        (study, "digits --rows TRADES;nothing", "nothing"),
        (study, "digits --seeds x", "--seeds"),
        (study, "digits --jobs 0", "--jobs"),
        (study, "digits --print --file nowhere.json", "nowhere.json"),
        (study, f"digits --file {NO_STUDY}", "ResNet18.keys.json"),
        (truth, "nothing", "unknown: nothing; known: ra_gate"),
        (truth, "--images 0", "argument --images"),
        (truth, "--print none", "holds no tables"),
    ],
)
def test_wrong_use_is_refused(here, capsys, tool, flags, words):
    (here / "file").touch()
    with pytest.raises(SystemExit) as end:
        tool.main(flags.split())
    assert end.value.code == 2
    assert words in capsys.readouterr().err
