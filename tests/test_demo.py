"""The demo's catalogue: what it promises about its products, titles, files and refusals."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, assert_succeeded, run
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))

import make_catalogue as demo  # noqa: E402
import what_next  # noqa: E402

from aliblip.runtime.arguments import parse  # noqa: E402
from aliblip.serve import ServeArguments  # noqa: E402

TRAIN, VALIDATION = 300, 40


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "catalogue"
    demo.make_catalogue(folder, seed=1, num_train=TRAIN, num_validation=VALIDATION)
    return folder


def make(*args) -> object:
    return run([sys.executable, "demo/make_catalogue.py", *args])


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path, split: str) -> list[dict]:
    import pyarrow.parquet as pq

    return [row for path in sorted(folder.glob(f"data/{split}-*")) for row in pq.read_table(path).to_pylist()]


def product_of(row: dict) -> demo.Product:
    return demo.Product(*(row[field] for field in demo.Product._fields))


def differences(one: demo.Product, other: demo.Product) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


# --- products ---------------------------------------------------------------------------------------------------------


def test_more_than_2000_products_are_possible():
    products = demo.all_products()
    assert len(set(products)) == len(products) == 23_040
    assert len({product.product_id for product in products}) == len(products)
    assert len(demo.SHAPES) >= 12


@pytest.mark.parametrize("seed", [42, 7])
def test_products_of_the_default_size(seed):
    train, validation, test = demo.choose_products(seed, 5000, 400)
    assert len(train) == 5000 and len(validation) == len(set(validation)) == len(set(test)) == len(test) == 400
    assert (train, validation, test) == demo.choose_products(seed, 5000, 400)
    assert not set(validation) & set(test)

    # Never seen together: not the product, nor even its type, colour and pattern.
    assert not set(train) & set(validation + test)
    assert not {product.held_out_by for product in train} & {product.held_out_by for product in validation + test}
    # Seen apart: every value, and of every two attributes nearly all pairs of values.
    for first, second in itertools.combinations(range(len(demo.Product._fields)), 2):
        possible = set(itertools.product(demo.CHOICES[first], demo.CHOICES[second]))
        seen = {(product[first], product[second]) for product in train}
        assert {pair[0] for pair in seen} == set(demo.CHOICES[first])
        assert {pair[1] for pair in seen} == set(demo.CHOICES[second])
        assert len(seen) >= 0.95 * len(possible)

    for products in (validation, test):
        twins_by = dict.fromkeys(demo.Product._fields, 0)
        for product in products:
            twins = [other for other in products if differences(product, other) == 1]
            assert twins
            for field in demo.Product._fields:
                twins_by[field] += any(getattr(product, field) != getattr(twin, field) for twin in twins)
        assert min(twins_by.values()) >= 40  # every attribute is asked about


def test_too_many_products():
    with pytest.raises(demo.Mistake, match="--num_train is 30000: at most 17280 photos"):
        demo.choose_products(0, 30_000, 40)
    for too_many in (9000, 4000):  # for the validation; for the test after it
        with pytest.raises(demo.Mistake, match=f"--num_validation is {too_many}, and as many to test: at most"):
            demo.choose_products(0, 100, too_many)


# --- titles and photos ------------------------------------------------------------------------------------------------


def read_title(title: str) -> set[demo.Product]:
    """All products that a title can mean, by looking for every word of every attribute."""
    title = f" {title.lower().replace(',', ' ')} "
    found = []
    for options in demo.WORDS:
        found.append(
            [v for v, words in options.items() if any(re.search(rf"\s{re.escape(w)}\s", title) for w in words)]
        )
    return {demo.Product(*values) for values in itertools.product(*found)}


def test_a_validation_title_means_one_product():
    rng = random.Random(0)
    titles = set()
    for product in rng.sample(demo.all_products(), 1500):
        title = demo.write_title(product, rng, clean=True)
        assert read_title(title) == {product}, title
        titles.add(re.sub(r"\W+", " ", title.lower()))
    assert len(titles) > 1400


def test_a_train_title_may_err_or_leave_something_out():
    rng = random.Random(0)
    product = demo.all_products()[0]
    titles = [demo.write_title(product, rng, clean=False) for _ in range(1000)]
    clear = sum(read_title(title) == {product} for title in titles) / len(titles)
    assert 0.75 < clear < 0.95
    assert all(len(title.split()) <= 20 for title in titles)


def test_every_attribute_changes_the_photo():
    """Same random numbers: another value of any attribute shows at 64 pixels, without one the photo stays the same."""

    def pixels(product: demo.Product) -> bytes:
        photo = Image.open(io.BytesIO(demo.draw_photo(product, random.Random(5)))).convert("RGB")
        return photo.resize((64, 64), Image.Resampling.BICUBIC).tobytes()

    rng = random.Random(0)
    for product in rng.sample(demo.all_products(), 12):
        assert pixels(product) == pixels(product)
        for field, choices in zip(demo.Product._fields, demo.CHOICES, strict=True):
            value = rng.choice([choice for choice in choices if choice != getattr(product, field)])
            one, other = pixels(product), pixels(product._replace(**{field: value}))
            far = sum(abs(a - b) > 60 for a, b in zip(one, other, strict=True))
            assert far > 60, (product, field, value)  # of 12,288 values


# --- files ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(catalogue, tmp_path):
    for name, seed in (("again", 1), ("other", 2)):
        # Another process: nothing may depend on the order of a hash table.
        settings = ("--seed", seed, "--num_train", TRAIN, "--num_validation", VALIDATION)
        assert_succeeded(make("--output_dir", tmp_path / name, *settings))
    assert digest(tmp_path / "again") == digest(catalogue)
    assert digest(tmp_path / "other")["data/train-00000-of-00001.parquet"] not in digest(catalogue).values()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # no partial folder stays


def test_rows(catalogue):
    train, validation, test = (rows(catalogue, split) for split in ("train", "validation", "test"))
    assert len(train) == TRAIN and len(validation) == len(test) == VALIDATION
    for row in train + validation + test:
        product = product_of(row)
        assert row["product_id"] == product.product_id
        with Image.open(io.BytesIO(row["image"]["bytes"])) as photo:
            assert photo.format == "JPEG" and photo.size == (demo.PHOTO, demo.PHOTO) and photo.mode == "RGB"
    assert not {row["product_id"] for row in train} & {row["product_id"] for row in validation + test}
    assert len({row["product_id"] for row in validation + test}) == 2 * VALIDATION  # one photo each
    for split in (validation, test):
        for row in split:
            assert read_title(row["caption"]) == {product_of(row)}
            assert any(differences(product_of(row), product_of(other)) == 1 for other in split)


def test_rows_are_cut_into_shards(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_ROWS_PER_SHARD", 70)
    expected = rows(catalogue, "train")
    (tmp_path / "data").mkdir()
    demo.write_split(tmp_path / "data", "train", expected)
    names = [f"train-0000{shard}-of-00005.parquet" for shard in range(5)]
    assert sorted(path.name for path in tmp_path.glob("data/*")) == names
    assert rows(tmp_path, "train") == expected


def test_datasets_streams_every_shard(catalogue):
    import datasets

    for split, count in (("train", TRAIN), ("validation", VALIDATION), ("test", VALIDATION)):
        stream = datasets.load_dataset(str(catalogue), split=split, streaming=True)
        assert stream.column_names == ["image", "caption", "product_id", *demo.Product._fields]
        read = list(stream)
        assert len(read) == count
        assert read[0]["image"].size == (demo.PHOTO, demo.PHOTO)
        assert [row["caption"] for row in read] == [row["caption"] for row in rows(catalogue, split)]


def test_the_loader_reads_it(catalogue):
    from aliblip.data.sources import decode, open_source

    source = open_source(data_dir=str(catalogue), split="validation")
    examples = [decode(row) for shard in source.shards for row in source.read(shard.index)]
    assert len({example.product_id for example in examples}) == VALIDATION


def test_tokenizer(catalogue):
    from transformers import AutoTokenizer, BertTokenizer

    folder = catalogue / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token]
    assert special == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer))) and len(tokenizer) <= 800

    titles = [row["caption"] for row in rows(catalogue, "validation")]
    encoded = tokenizer(titles)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert max(map(len, encoded)) <= 35
    assert encoded == tokenizer([title.upper() for title in titles])["input_ids"]
    assert tokenizer.decode(encoded[0], skip_special_tokens=True).replace(" ", "") == titles[0].lower().replace(" ", "")
    # The same as BERT's own tokenizer with this vocabulary.
    plain = BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=True)
    assert encoded == plain(titles)["input_ids"]
    assert tokenizer("mug", "hat") == plain("mug", "hat")


# --- a second run -----------------------------------------------------------------------------------------------------


def test_second_run(catalogue):
    before = {path: os.stat(path).st_mtime_ns for path in catalogue.rglob("*")}
    settings = ("--output_dir", catalogue, "--num_train", TRAIN, "--num_validation", VALIDATION)
    same = make(*settings, "--seed", 1)
    assert_succeeded(same)
    assert "is up to date" in same.stdout

    other = make(*settings, "--seed", 2)
    assert other.returncode == 2 and not other.stdout
    (line,) = other.stderr.splitlines()
    assert "holds a catalogue of other settings" in line and '"seed": 1' in line and "delete it or give another" in line
    assert before == {path: os.stat(path).st_mtime_ns for path in catalogue.rglob("*")}


def test_a_catalogue_of_an_older_version_is_refused(catalogue, monkeypatch):
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    with pytest.raises(demo.Mistake, match="holds a catalogue of other settings"):
        demo.make_catalogue(catalogue, 1, TRAIN, VALIDATION)


@pytest.mark.parametrize("content", [None, "not JSON", json.dumps([1])])
def test_a_folder_of_something_else_is_kept(tmp_path, content):
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "catalogue.json").write_text(content)
    with pytest.raises(demo.Mistake, match="delete it or give another --output_dir"):
        demo.make_catalogue(tmp_path, 1, 10, 4)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 4), "--num_train is 0"), ((10, 3), "--num_validation is 3"), ((10, 0), "--num_validation is 0")],
)
def test_numbers_out_of_range(tmp_path, numbers, message):
    with pytest.raises(demo.Mistake, match=message):
        demo.make_catalogue(tmp_path / "catalogue", 1, *numbers)
    assert not any(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_tokenizer", lambda *args: int("a bug"))
    monkeypatch.setattr(
        sys, "argv", ["make_catalogue.py", "--output_dir", str(tmp_path / "catalogue"), "--num_train", "9"]
    )
    with pytest.raises(ValueError, match="a bug"):
        demo.main()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.make_catalogue(tmp_path / "catalogue", 1, 10, 4)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "catalogue").mkdir()  # an empty folder is as good as none
    assert "10 photos" in demo.make_catalogue(tmp_path / "catalogue", 1, 10, 4)


# --- the last words ---------------------------------------------------------------------------------------------------


def test_the_last_words_name_a_command_that_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation = Path("demo/output/evaluation")
    evaluation.mkdir(parents=True)
    Path("demo/catalogue").mkdir()
    Path("demo/catalogue/photos").write_bytes(bytes(3_000_000))
    recalls = {"itc": {"recall@1": 0.64}, "itm": {"recall@1": 0.685}}
    results = {"split": "test", "num_texts": 400, "text_to_image": recalls}
    (evaluation / "results.json").write_text(json.dumps(results))
    what_next.main(["--started", str(time.time() - 545), "--python", ".venv/bin/python"])
    *told, command = capsys.readouterr().out.splitlines()
    assert told == [
        "done in 9 minutes; demo/catalogue takes 3 MB, demo/output 0 MB",
        "of 400 titles 68.5 % find their photo first (64.0 % without re-ranking)",
        "to look at: demo/output/contact_sheet.png, demo/output/report.html",
        "next, a page to search these photos with:",
    ]
    assert command.startswith(".venv/bin/python -m aliblip.serve ")
    (flags,) = parse([ServeArguments], command.split()[3:])
    assert (flags.model_name_or_path, flags.gallery) == ("demo/output/best", "demo/catalogue")
    assert (flags.split_name, flags.fusion_weight) == ("test", None), "the model has its own weight"
