"""The model card and the upload, against a Hub on loopback: what goes up, what comes back, and what goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hub_stub
import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http, enable_progress_bars
from PIL import Image
from remote_code_probe import scores
from runs import TINY, trained_in_process, write_split

import train
from aliblip import doctor, publish
from aliblip.models import card, upload
from aliblip.models.card import MARK, all_results, model_card, write_card
from aliblip.models.upload import HubArguments
from aliblip.publish import PublishArguments
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError, main_with_usage_errors
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.checkpoint import save_model
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

HUB_FILES = {path.name for path in ROOT.glob("*_aliblip.py")}
WANTED = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
WANTED |= HUB_FILES | {"README.md"}


@pytest.fixture(scope="module")
def connected():
    """This process takes a hub on loopback for the Hub, with a token that may write, and never waits."""
    patch = pytest.MonkeyPatch()

    def to(hub: hub_stub.Hub) -> None:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", hub_stub.TOKEN)

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, in native code
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    for module in (publish, upload):
        patch.setattr(module, "WAITS", (0.0, 0.0, 0.0, 0.0))
    wait = upload.Publisher._wait
    patch.setattr(upload.Publisher, "_wait", lambda self, seconds: wait(self, 0.0))
    patch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield to
    patch.undo()
    enable_progress_bars()


@pytest.fixture
def hub(connected):
    with hub_stub.Hub() as made:
        connected(made)
        yield made


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 16)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", str(folder / "data"), "--tokenizer_name", str(folder / "tokenizer")]


PUSH = ["--push_to_hub", "--hub_model_id", "me/name", "--hub_private_repo", "--hub_license", "mit"]


@pytest.fixture(scope="module")
def trained(catalogue, connected, tmp_path_factory):
    """A run of two epochs that publishes: (output folder, the hub, what was printed)."""
    folder, out = tmp_path_factory.mktemp("trained") / "run", tmp_path_factory.mktemp("printed") / "out.txt"
    with hub_stub.Hub() as made, out.open("w+") as stream, pytest.MonkeyPatch.context() as patch:
        connected(made)
        patch.setattr(sys, "stdout", stream)
        # HF_TOKEN is wrong here: the flag goes before it
        patch.setenv("HF_TOKEN", "hf_wrong")
        trained_in_process([*catalogue, *PUSH, "--num_train_epochs", "2", "--hub_token", hub_stub.TOKEN], folder)
        patch.undo()
        stream.flush()
        yield folder, made, out.read_text()


# --- a run that publishes ---------------------------------------------------------------------------------------------


def test_a_run_leaves_its_best_model_on_the_hub(trained):
    folder, hub, printed = trained
    files = hub.commits["me/name"][-1]
    assert files.keys() == WANTED | {".gitattributes"}
    for name in WANTED:
        assert files[name] == (folder / "best" / name).read_bytes(), name
    assert hub.private["me/name"] in ("private", True)
    assert hub.messages["me/name"][1:] and all(
        re.fullmatch(r"Model of epoch [12]", message) for message in hub.messages["me/name"][1:]
    )
    assert f"published: {hub.url}/me/name" in printed
    assert not list(folder.glob(".publish*"))


def test_the_token_is_written_nowhere(trained):
    folder, hub, printed = trained
    assert hub_stub.TOKEN not in printed
    for path in folder.rglob("*"):
        assert path.is_dir() or hub_stub.TOKEN.encode() not in path.read_bytes(), path
    for files in hub.commits["me/name"]:
        assert not any(hub_stub.TOKEN.encode() in data for data in files.values())


def test_the_card_says_what_is_known(trained):
    folder, hub, _ = trained
    text = hub.commits["me/name"][-1]["README.md"].decode()
    results = json.loads((folder / "best" / "results.json").read_text())
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "zero-shot-image-classification" and "image-text-retrieval" in card.data.tags
    assert card.data.base_model is None and card.data.datasets is None
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert len(values) == 13  # two directions, two stages, three recalls; and their mean
    assert values["text to image R@5 (ITM)"] == round(100 * results["text_to_image"]["itm"]["recall@5"], 2)
    assert values["mean recall"] == round(100 * results["mean_recall"], 2)
    row = results["image_to_text"]["itc"]
    shown = [f"{100 * row[name]:.1f}" for name in ("recall@1", "recall@5", "recall@10", "mean_recall")]
    assert f"| image to text, ITC | {' | '.join(shown)} | {row['median_rank']:g} |" in text
    assert "On 16 rows of `data`, train (1 file)." in text
    assert re.search(r"These are the weights after step [24] \(epoch [12]\)\.", text)
    assert f"torch {torch.__version__}" in text and "Hardware: CPU" in text and "32 x 32 pixels" in text
    assert str(folder.parent) not in text and "/tokenizer" not in text  # where things lie here is nobody's business


def test_the_settings_of_the_card_are_a_recipe(trained, tmp_path):
    folder, hub, _ = trained
    (block,) = re.findall(r"```yaml\n(.*?)```", hub.commits["me/name"][-1]["README.md"].decode(), flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    groups = parse([ModelArguments, TrainDataArguments, TrainingArguments], ["--config", str(tmp_path / "recipe.yaml")])
    again = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    arguments = json.loads((folder / "arguments.json").read_text())
    differing = {key for key in arguments if again[key] != arguments[key]}
    assert differing == {"output_dir", "push_to_hub", "data_dir", "tokenizer_name"}
    assert (again["data_dir"], again["tokenizer_name"]) == ("data", "tokenizer")


def test_a_stranger_gets_equal_outputs_and_every_snippet_runs(trained, tmp_path):
    folder, hub, _ = trained
    for name, colour in (("mug", "blue"), ("lamp", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.jpg")
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    result = run(
        [sys.executable, "-I", ROOT / "tests" / "published_probe.py", "me/name", tmp_path / "found.pt"],
        env=env,
        cwd=tmp_path,
    )
    assert_succeeded(result)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["module"].startswith("transformers_modules.me.name.")
    best = folder / "best"
    expected = scores(AliBlipForImageTextRetrieval.from_pretrained(best), AliBlipProcessor.from_pretrained(best))
    for name, value in expected.items():
        assert torch.equal(found["scores"][name], value), name
    compare, search, gallery = found["printed"]
    assert compare.count("tensor(") == 2
    assert {line.split()[0] for line in search.splitlines()} == {"mug.jpg", "lamp.jpg"}
    assert gallery.count("'itm_probability'") == 1


def test_a_hub_that_dies_ends_no_run(catalogue, hub, tmp_path, capsys):
    hub.dies_at = "/commit/"
    trained_in_process([*catalogue, *PUSH, "--num_train_epochs", "2"], tmp_path / "run")
    printed = capsys.readouterr().out
    assert "done in" in printed and hub.commits["me/name"] == [{".gitattributes": b""}]
    assert printed.count("could not be uploaded to me/name") >= 1 and "the run goes on" in printed
    (again,) = re.findall(r"not on the Hub: \S+; to upload it: python -m aliblip\.publish (.*)", printed)
    assert again == f"--model_name_or_path {tmp_path / 'run' / 'best'} --hub_model_id me/name --hub_license mit"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "completed"
    # and the command does it, once the Hub is back
    with hub_stub.Hub() as back, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", back.url)
        told = publish.publish(*parse([PublishArguments, HubArguments], again.split()))
        assert told[-1] == f"published: {back.url}/me/name"
        assert back.commits["me/name"][-1].keys() == WANTED | {".gitattributes"}


def set_up(catalogue, folder, *flags) -> train.Setup:
    groups = [ModelArguments, TrainDataArguments, TrainingArguments, HubArguments]
    return train.set_up(*parse(groups, [*TINY, *catalogue, "--output_dir", str(folder), *map(str, flags)]))


def test_only_the_main_process_publishes(catalogue, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    small = ("--per_device_train_batch_size", "4")
    assert set_up(catalogue, tmp_path, *PUSH, *small).publisher is None and hub.requests == []
    monkeypatch.setenv("RANK", "0")
    assert set_up(catalogue, tmp_path, *PUSH, *small).publisher is not None


def test_mistakes_are_told_before_training(catalogue, hub, tmp_path):
    def refused(*flags) -> str:
        with pytest.raises(UsageError) as raised:
            set_up(catalogue, tmp_path / "run", *flags)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "--hub_model_id is missing" in refused("--push_to_hub")
    assert "would upload nothing" in refused("--hub_model_id", "me/name")
    assert "--hub_model_id me/a--b:" in refused("--push_to_hub", "--hub_model_id", "me/a--b")
    assert hub.requests == []
    assert "is not accepted by" in refused(*PUSH, "--hub_token", "hf_wrong")


# --- permissions ------------------------------------------------------------------------------------------------------


def refusal(**values) -> str:
    with pytest.raises(UsageError) as raised:
        upload.connect(HubArguments(**{"hub_model_id": "me/name", **values}))
    message = str(raised.value)
    assert "\n" not in message and not any(token in message for token in ("hf_wrong", hub_stub.READ_TOKEN))
    return message


def test_what_the_hub_would_refuse_is_told_at_once(hub, monkeypatch):
    hub.make("other/name")
    assert refusal(hub_token="hf_wrong").startswith("--hub_token is not accepted by http://127.0.0.1")
    told = refusal(hub_token=hub_stub.READ_TOKEN)
    assert "--hub_token (user me) may not write to me/name" in told and told.endswith("a token with write permission")
    assert "such as me/new" in refusal(hub_model_id="other/new")
    # it is there and can be read, so that only the question for the permission tells
    assert "may not write to other/name" in refusal(hub_model_id="other/name")
    assert "--hub_license apache is not accepted" in refusal(hub_license="apache")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal().startswith("the token of HF_TOKEN or of `hf auth login` is not accepted")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token for the Hub" in refusal()
    assert "me/name" not in hub.commits


def test_without_a_network_a_push_is_refused(hub, monkeypatch):
    hub.die()
    assert f"{hub.url} can't be used (ConnectError" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "switched off by HF_HUB_OFFLINE" in refusal()


def test_a_name_without_a_user_is_the_users_own(hub):
    assert upload.connect(HubArguments(hub_model_id="name"))[1] == "me/name"
    assert upload.connect(HubArguments(hub_model_id="name"))[1] == "me/name"  # and it may be there


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("me/new", hub_stub.TOKEN, None),
        ("new", hub_stub.TOKEN, None),
        ("me/there", hub_stub.TOKEN, None),
        ("me/new", hub_stub.READ_TOKEN, "(the token may only read): give a token with write permission"),
        ("other/new", hub_stub.TOKEN, "(other is neither the user nor an organization of theirs): give a token"),
        ("other/there", hub_stub.TOKEN, "may not write to other/there"),
        ("me/new", "hf_wrong", "is not accepted by"),
    ],
)
def test_the_doctor_asks_the_hub_and_changes_nothing(catalogue, hub, tmp_path, monkeypatch, capsys, name, token, said):
    for there in ("me/there", "other/there"):
        hub.make(there)
    flags = [*TINY, *catalogue, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", name]
    monkeypatch.setattr(sys, "argv", ["doctor", *flags, "--hub_token", token, "--compared_rows", "0"])
    code = doctor.main()
    (line,) = [line for line in capsys.readouterr().out.split("\nHub\n")[1].splitlines() if line][:1]
    if said is None:
        full = name if "/" in name else f"me/{name}"
        assert code == 0 and line == f"  ok        {full} can be written at {hub.url}"
    else:
        assert code == 2 and line.startswith("  problem") and said in line and token not in line
    assert hub.commits.keys() == {"me/there", "other/there"} and not (tmp_path / "run").exists()
    assert all(method in ("GET", "HEAD") for method, _ in hub.requests)


# --- uploads in the background ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "outputs" / "best"
    folder.parent.mkdir()
    processor = tiny.processor()
    assert save_model(tiny.model(vocab_size=len(processor.tokenizer)), processor, folder) is None
    return folder


def change(model: Path, value: float) -> bytes:
    """Another model in the folder, as `NewFolder` would put it there. Its weights."""
    made = AliBlipForImageTextRetrieval.from_pretrained(model)
    made.temp.data.fill_(value)
    assert save_model(made, tiny.processor(), model) is None
    return (model / "model.safetensors").read_bytes()


@pytest.fixture
def publisher(hub):
    told = []
    made = upload.Publisher(*upload.connect(HubArguments(hub_model_id="me/name")), tell=told.append)
    made.told = told
    yield made
    hub.gate.set()
    # A thread that asks a hub that is gone closes the connections of the others: huggingface_hub has them in common.
    with made._changed:
        assert made._changed.wait_for(lambda: not made._busy and made._waiting is None, timeout=60)


def weights(hub) -> list[bytes]:
    return [files["model.safetensors"] for files in hub.commits["me/name"][1:]]


@pytest.mark.parametrize("status", [500, 429])
def test_an_upload_is_tried_again(status, hub, publisher, model):
    hub.faults = [("/validate-yaml", status), ("/commit/", status), ("/large/", status)]
    publisher.push(model, "one")
    publisher.finish(20)
    assert hub.faults == [] and weights(hub) == [(model / "model.safetensors").read_bytes()]
    assert publisher.told[-1] == f"published: {hub.url}/me/name"
    assert not any("warning" in line for line in publisher.told)


def test_what_is_refused_is_not_tried_again(hub, publisher, model):
    hub.faults = [("/commit/", 403), ("/commit/", 403)]
    publisher.push(model, "one")
    publisher.finish(20)
    assert len(hub.faults) == 1 and weights(hub) == []
    assert len([line for line in publisher.told if line.startswith("warning: one could not be uploaded")]) == 1


def test_a_model_that_failed_is_uploaded_when_it_is_pushed_again(hub, publisher, model):
    hub.faults = [("/commit/", 502)] * 5
    publisher.push(model, "one")
    while not any("could not be uploaded" in line for line in publisher.told):
        time.sleep(0.01)
    while publisher._busy:
        time.sleep(0.01)
    publisher.push(model, "one again")
    publisher.finish(20)
    assert hub.messages["me/name"][1:] == ["one again"] and publisher.told[-1].startswith("published: ")


def test_a_model_is_uploaded_as_it_was_and_one_in_between_is_left_out(hub, publisher, model):
    hub.gate.clear()
    first = (model / "model.safetensors").read_bytes()
    publisher.push(model, "one")  # returns, though the Hub does not
    while not any("/tree/" in path for _, path in hub.requests):
        time.sleep(0.01)
    change(model, 0.05)
    publisher.push(model, "two")
    last = change(model, 0.06)
    publisher.push(model, "three")
    publisher.push(model, "three again")  # nothing new
    hub.gate.set()
    publisher.finish(20)
    assert weights(hub) == [first, last] and hub.messages["me/name"][1:] == ["one", "three"]
    assert not list(model.parent.glob(".publish*"))


def test_the_end_waits_so_long_and_no_longer(hub, publisher, model, monkeypatch):
    """By a clock that goes on by ten seconds at each look."""
    hub.gate.clear()
    publisher.push(model, "one")
    monkeypatch.setattr(upload, "SECONDS_BETWEEN_NEWS", 0.01)
    monkeypatch.setattr(upload, "time", SimpleNamespace(monotonic=itertools.count(100, 10).__next__))
    publisher.finish(35)
    news = [line for line in publisher.told if line.startswith(f"uploading {model} to me/name (")]
    assert [line.split("(")[1].split(" s")[0] for line in news] == ["10", "20", "30"]
    assert publisher.told[-1] == (
        f"not on the Hub: {model}; to upload it: python -m aliblip.publish --model_name_or_path {model} "
        "--hub_model_id me/name"
    )
    assert not list(model.parent.glob(".publish*"))


def test_a_model_that_cannot_be_read_is_told(publisher, model):
    (model / "config.json").write_text("{")
    publisher.push(model, "one")
    assert f"warning: {model} can't be uploaded" in publisher.told[0]
    publisher.finish(5)
    assert publisher.told[-1].startswith(f"not on the Hub: {model}; ")


# --- a finished folder ------------------------------------------------------------------------------------------------


def of_flags(*flags) -> list[str]:
    return publish.publish(*parse([PublishArguments, HubArguments], list(map(str, flags))))


def test_a_repository_holds_exactly_the_model_and_what_others_put_there(hub, model):
    (model / "evaluation").mkdir()
    for name in ("results.json", "momentum.safetensors", "optimizer.safetensors", "evaluation/rankings.parquet"):
        (model / name).write_text("{}")
    of_flags("--model_name_or_path", model, "--hub_model_id", "me/name")
    assert hub.commits["me/name"][-1].keys() == WANTED | {".gitattributes"}
    hub.commits["me/name"][-1] |= {
        **{"model-00001-of-00002.safetensors": b"", "old_aliblip.py": b""},
        **{"photo.png": b"", "onnx/model.safetensors": b""},
    }
    of_flags("--model_name_or_path", model, "--hub_model_id", "me/name", "--hub_license", "mit")
    assert hub.commits["me/name"][-1].keys() == WANTED | {".gitattributes", "photo.png", "onnx/model.safetensors"}


def test_without_a_repository_only_the_card_is_written(hub, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish.py", "--model_name_or_path", str(model)])
    assert publish.main() == 0 and hub.requests == []
    assert capsys.readouterr().out == f"written: {model / 'README.md'}\nto upload it, give --hub_model_id too\n"
    card = (model / "README.md").read_text()
    assert f'AutoModel.from_pretrained("{model}", trust_remote_code=True)' in card
    assert "Not measured." in card and "Not known: " in card and "license:" not in card and "model-index" not in card


def test_folders_that_are_no_model_are_refused(hub, model, tmp_path):
    def refused(folder) -> str:
        with pytest.raises(UsageError) as raised:
            of_flags("--model_name_or_path", folder, "--hub_model_id", "me/name")
        return str(raised.value)

    assert "there is no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json, no weights" in refused(tmp_path / "empty")
    for path in model.glob("*.py"):
        path.unlink()
    assert "python -m aliblip.convert --model_name_or_path" in refused(model)
    assert hub.requests == []


def test_damaged_files_are_mistakes_and_a_bug_is_a_traceback(hub, model, monkeypatch, capsys):
    def told() -> str:
        monkeypatch.setattr(sys, "argv", ["publish.py", "--model_name_or_path", str(model)])
        with pytest.raises(SystemExit) as ended:
            main_with_usage_errors("aliblip.publish", publish.main)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.count("\n") == 1
        return printed

    monkeypatch.setattr(card, "write_text", lambda *args: int("a bug"))
    monkeypatch.setattr(sys, "argv", ["publish.py", "--model_name_or_path", str(model)])
    with pytest.raises(ValueError, match="a bug"):  # Python shows it with its traceback, and exit code 1
        main_with_usage_errors("aliblip.publish", publish.main)
    (model / "results.json").write_text("{")
    assert f"{model / 'results.json'} can't be read" in told()
    (model / "results.json").unlink()
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:100])
    assert f"{model / 'model.safetensors'} can't be read" in told()
    (model / "config.json").write_text("[")
    assert f"{model / 'config.json'} can't be read" in told()


def test_an_upload_that_fails_is_a_mistake_only_where_the_hub_failed(hub, model, monkeypatch):
    hub.faults = [("/commit/", 403)]
    with pytest.raises(UsageError, match="could not be uploaded to me/name .*403"):
        of_flags("--model_name_or_path", model, "--hub_model_id", "me/name")
    monkeypatch.setattr(publish, "upload", lambda *args: int("a bug"))
    with pytest.raises(ValueError, match="a bug") as raised:
        of_flags("--model_name_or_path", model, "--hub_model_id", "me/name")
    assert not isinstance(raised.value, UsageError)


def test_a_card_that_was_edited_stays(hub, model):
    write_card(model, "me/name")
    mine = (model / "README.md").read_text().replace(MARK, "") + "my own words"
    (model / "README.md").write_text(mine)
    told = of_flags("--model_name_or_path", model, "--hub_model_id", "me/name")
    assert told[0] == f"left as you edited it: {model / 'README.md'}"
    assert hub.commits["me/name"][-1]["README.md"].decode() == mine


# --- results of the card ----------------------------------------------------------------------------------------------


def test_the_evaluation_goes_before_the_trainings_own_if_it_is_of_these_weights(trained, tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    for path in (trained[0] / "best").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    own = json.loads((folder / "results.json").read_text())
    evaluated = json.loads(json.dumps(own)) | {
        "mean_recall": 0.5,
        "mean_recall_interval": [0.4, 0.6],
        "fusion_weight": 32.0,
    }
    evaluated["text_to_image"]["itm"]["intervals"] = {"recall@1": [0.1, 0.3], "mean_recall": [0.2, 0.4]}
    evaluation = folder / "evaluation" / "results.json"
    evaluation.parent.mkdir()
    evaluation.write_text(json.dumps(evaluated))
    assert all_results(folder) == [evaluated]
    text = model_card(folder, "me/name")
    assert "(10.0 to 30.0)" in text
    assert "Mean of all ITM recalls: 50.00 (40.00 to 60.00). Re-ranked by match logit + 32 x ITC" in text
    # of other data: both
    evaluation.write_text(json.dumps(evaluated | {"dataset": "someone/photos", "split": "test"}))
    assert [results["split"] for results in all_results(folder)] == ["test", "validation"]
    results = {
        result.dataset_type: result.dataset_split for result in ModelCard(model_card(folder, "n")).data.eval_results
    }
    assert results == {"someone/photos": "test", "custom": "validation"}
    # of other weights
    before = (folder / "model.safetensors").stat().st_mtime - 10
    os.utime(evaluation, (before, before))
    assert all_results(folder) == [own]


def test_hub_names_in_the_arguments_become_metadata(trained, tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    for path in (trained[0] / "best").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arguments = json.loads((trained[0] / "arguments.json").read_text())
    names = {"dataset_name": "someone/photos", "text_model_name_or_path": "google-bert/bert-base-uncased"}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments | names))
    data = ModelCard(model_card(folder, "me/name")).data
    assert data.datasets == ["someone/photos"] and data.base_model == ["google-bert/bert-base-uncased"]
