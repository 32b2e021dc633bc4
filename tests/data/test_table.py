"""CsvData: tables as people and tools write them, and one line for those that are not clear."""
import pytest
import torch

from tests.data.images import truncate, write_image
from visionattn.data import CsvData
from visionattn.data.check import check
from visionattn.data.guess import guess_data

ROWS = [("0.jpg", "cat"), ("1.jpg", "dog"), ("2.jpg", "cat"), ("3.jpg", "dog"), ("4.jpg", "cat"), ("5.jpg", "dog")]


@pytest.fixture
def table(tmp_path):
    """Writes a table beside a folder of six images; reads it."""
    for index in range(6):
        write_image(tmp_path / "images" / f"{index}.jpg", seed=index)

    def make(text, file="labels.csv", encoding="utf-8", **options):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(text.encode(encoding))
        return CsvData(str(tmp_path), image_size=32, batch_size=2, num_workers=0, **options)
    return make


def _listed(data, split="train"):
    return {file.name: label for file, label in data.samples[split]}


def _text(head, row="{},{}"):
    return "\n".join([head, *(row.format(*cells) for cells in ROWS)]) + "\n"


@pytest.mark.parametrize("text", [
    _text("path,label", "images/{},{}"),
    _text("File Name;Class", "images\\{};{}"),
    _text("image\ttag", "C:\\Users\\me\\images\\{}\t{}"),
    _text("\ufefffilename,category", '"{}", "{}"'),
    _text("sep=;\nimage_id;target", "{};{}"),
    _text("id,breed", "{},{}").replace(".jpg", ""),
    _text("label,images", "{1},{0}"),
    "\n\n".join(",".join(row) for row in ROWS),  # without a head
    "id,cat,dog\n" + "".join(f"{file},{int(name == 'cat')},{int(name == 'dog')}\n" for file, name in ROWS),
    _text("path,label,width", "{},{},40"),
    _text(",path,label", '7,{},{}'),
    _text("path,label,notes", '{},{},"two\nlines, and more"'),
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_is_clear_is_read_alike(table, text, encoding):
    data = table(text, encoding=encoding)
    data.setup("fit")
    assert (data.class_names, data.multi_label) == (["cat", "dog"], False)
    assert _listed(data) | _listed(data, "val") == {file: int(name == "dog") for file, name in ROWS}
    assert len(data.samples["val"]) == 2
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.dtype) == ((2, 3, 32, 32), torch.int64)


def test_the_validation_split_is_fixed_and_said(table, said):
    first, second = table(_text("path,label")), table(_text("path,label"), seed=5)
    first.setup("fit"), second.setup("fit")
    assert first.samples == second.samples
    assert sorted(_listed(first, "val").values()) == [0, 1]
    assert "of its 6 training images, 4 train and 2 validate" in said.text


@pytest.mark.parametrize(("head", "values"), [
    ("split", ("Train", "valid", "Testing")), ("is_valid", ("False", "True", "")),
    ("Set", ("training", "dev", "test"))])
def test_a_column_of_splits(table, head, values):
    splits = [values[index // 2 % (3 if values[2] else 2)] for index in range(6)]
    data = table(f"path,label,{head}\n" + "".join(
        f"{file},{name},{split}\n" for (file, name), split in zip(ROWS, splits, strict=True)))
    data.setup("fit"), data.setup("test")
    assert [len(data.samples[split]) for split in ("train", "val", "test")] == ([2, 2, 2] if values[2] else [4, 2, 2])


@pytest.mark.parametrize("places", ["{}.csv", "labels_{}.csv", "{}/_classes.csv"])
def test_a_table_for_each_split(table, tmp_path, places):
    text = _text("path,label").splitlines()
    for split, rows in (("train", text[1:4]), ("valid", text[4:6]), ("test", text[6:])):
        if "/" in places:
            for row in rows:
                write_image(tmp_path / split / row.split(",")[0], seed=int(row[0]) + 50)
        data = table("\n".join([text[0], *rows]), places.format(split)) if split == "test" else (
            (tmp_path / places.format(split)).parent.mkdir(exist_ok=True),
            (tmp_path / places.format(split)).write_text("\n".join([text[0], *rows])))
    data.setup("fit"), data.setup("test")
    assert [len(data.samples[split]) for split in ("train", "val", "test")] == [3, 2, 1]


@pytest.mark.parametrize(("text", "options"), [
    ("path,tags\n0.jpg,cat|dog\n1.jpg,dog\n2.jpg,cat\n3.jpg,\n4.jpg,cat | dog\n5.jpg,dog\n", {}),
    ("path,tags\n0.jpg,cat;dog\n1.jpg,dog\n2.jpg,cat\n3.jpg,\n4.jpg,dog;cat\n5.jpg,dog\n", {}),
    ("path,tags\n0.jpg,cat dog\n1.jpg,dog\n2.jpg,cat\n3.jpg,\n4.jpg,dog cat\n5.jpg,dog\n", {"label_separator": " "}),
    ('path,tags\n0.jpg,"cat,dog"\n1.jpg,dog\n2.jpg,cat\n3.jpg,\n4.jpg,"cat,dog"\n5.jpg,dog\n',
     {"label_separator": ","}),
    ("path,cat,dog\n0.jpg,1,1\n1.jpg,0,1\n2.jpg,1,0\n3.jpg,0,0\n4.jpg,1.0,True\n5.jpg,0,1\n", {}),
    ("path,age,cat,dog\n0.jpg,3,1,1\n1.jpg,4,0,1\n2.jpg,3,1,0\n3.jpg,3,0,0\n4.jpg,9,1,1\n5.jpg,3,0,1\n",
     {"label_columns": ["cat", "dog"]}),
    ("path,tag\n0.jpg,cat\n0.jpg,dog\n1.jpg,dog\n2.jpg,cat\n3.jpg,\n4.jpg,cat\n4.jpg,dog\n5.jpg,dog\n",
     {"multi_label": True}),
])
def test_several_labels(table, text, options):
    data = table(text, **options)
    data.setup("fit")
    assert (data.class_names, data.multi_label) == (["cat", "dog"], True)
    assert _listed(data) | _listed(data, "val") == {
        "0.jpg": (0, 1), "1.jpg": (1,), "2.jpg": (0,), "3.jpg": (), "4.jpg": (0, 1), "5.jpg": (1,)}
    assert "1 of the 6 train images that are listed have no label" in data.report.text()
    _, label = data.val_dataloader().dataset[0]
    assert label.dtype == torch.float32
    assert tuple(label.nonzero().flatten().tolist()) == data.samples["val"][0][1]


def test_numbers_are_names_in_their_order(table):
    data = table("path,label\n" + "".join(f"{index},{label}\n" for index, label in enumerate((10, 9, 10, 2, 9, 2))))
    assert data.class_names == ["2", "9", "10"]


@pytest.mark.parametrize(("row", "message"), [
    ("9.jpg,cat", "line 8: there is no such file"),
    ("0.jpg,dog", "line 8: the image is listed before, with another label .*cat and dog; set multi_label to true"),
    ("5.jpg,", "line 8: its label is empty"), ("5.jpg,cat,1", "line 8: it has another number of cells than the head"),
    (",cat", "line 8: it names no file"),
])
def test_bad_rows_are_named_or_left_out(table, row, message):
    with pytest.raises(ValueError, match=message):
        table(_text("path,label") + row + "\n").setup("fit")
    data = table(_text("path,label") + row + "\n", on_error="skip")
    data.setup("fit")
    assert data.report.left_out() == 1
    kept = len(data.samples["train"]) + len(data.samples["val"])
    assert kept == (5 if row == "0.jpg,dog" else 6)  # of two labels neither is taken


def test_rows_that_say_the_same_twice_are_counted(table):
    data = table(_text("path,label") + "0.jpg,cat\n")
    data.setup("fit")
    assert len(data.samples["train"]) + len(data.samples["val"]) == 6
    assert data.report.splits["train"].left_out[0][1] == "the image is listed before, with the same label"


def test_a_class_that_training_lacks_and_an_unknown_split(table):
    text = "path,label,split\n0.jpg,cat,train\n1.jpg,dog,train\n2.jpg,emu,val\n3.jpg,cat,val\n"
    with pytest.raises(ValueError, match=r"line 4: training has no image of its class \(emu\)"):
        table(text).setup("fit")
    data = table(text, on_error="skip")
    data.setup("fit")
    assert _listed(data, "val") == {"3.jpg": 0}
    with pytest.raises(ValueError, match=r"line 5: its split is none of train, val and test \(fold 3\)"):
        table(text.replace("cat,val", "cat,fold 3")).setup("fit")


def test_unreadable_images_are_skipped(table, tmp_path):
    truncate(tmp_path / "images" / "0.jpg")
    data = table(_text("path,label"), on_error="skip")
    data.setup("fit")
    assert "0.jpg" not in _listed(data) | _listed(data, "val")


@pytest.mark.parametrize(("text", "options", "message"), [
    ("a,b,c\n0.jpg,1,x\n", {}, "none of the columns a, b, c has a usual name of the files"),
    ("path,age,sex\n0.jpg,31,1\n1.jpg,2,0\n", {}, "not clear which of the columns age, sex hold the labels"),
    ('path,label\n0.jpg,"a,b"\n1.jpg,a\n', {}, "hold commas, such as 'a,b': set label_separator"),
    ("path,label\n0.jpg,a|b\n1.jpg,a;b\n", {}, "hold | and ;"),
    ("path,cat,cat\n0.jpg,1,0\n", {}, "two columns called 'cat'"),
    (_text("path,label"), {"label_columns": "breed"}, "has no column 'breed'"),
    ("path,label\n0.jpg,cat\n", {}, "one class only, cat"), ("path,label\n", {}, "no labels"), ("", {}, "is empty"),
    ("filename,width,xmin,xmax,class\n0.jpg,1,2,3,cat\n", {}, "lists boxes"),
    ("path,cat,dog\n0.jpg,1,2\n1.jpg,0,1\n", {"label_columns": ["cat", "dog"]}, "a label is neither 0 nor 1"),
    ("path,label\n" + "".join(f"{index}.jpg,{index / 7}\n" for index in range(50)), {}, "they are no classes"),
    (_text("path,label"), {"image_folder": "photos"}, "image_folder .*photos does not exist"),
    (_text("path,label"), {"val_fraction": 1.5}, "val_fraction"),
])
def test_what_is_not_clear_is_asked(table, text, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("|", r"\|")):
        table(text, **options).setup("fit")


def test_several_tables(table, tmp_path, said):
    (tmp_path / "old.csv").write_text(_text("path,label"))
    with pytest.raises(ValueError, match=r"holds several tables, labels.csv, old.csv: call them train.csv"):
        table(_text("path,label"))
    (tmp_path / "labels.csv").rename(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("path\n0.jpg\n")
    data = CsvData(str(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert "has the tables old.csv beside those of its splits" in said.text
    assert "test.csv has no labels" in said.text


def test_balanced_sampling_draws_classes_equally_often_and_reproducibly(table, tmp_path):
    rows = "".join(f"{index}.jpg,{'rare' if index == 0 else 'common'},train\n" for index in range(5))
    data = table("path,label,split\n" + rows + "5.jpg,rare,val\n", balanced_sampling=True, min_batches=100)
    data.setup("fit")
    loader = data.train_dataloader()

    def drawn(epoch):
        loader.sampler.set_epoch(epoch)
        return [index % 5 for index in loader.sampler]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(0).count(0) / len(drawn(0)) == pytest.approx(0.5, abs=0.15)


def test_ranks_share_what_is_drawn():
    from visionattn.data.loading import _EpochSampler
    weights = torch.tensor([1.0, 1.0, 8.0, 1.0, 1.0])
    whole, *parts = (list(_EpochSampler(range(5), ranks, rank, 3, False, weights=weights))
                     for ranks, rank in ((1, 0), (2, 0), (2, 1)))
    assert len(whole) == 5
    assert [len(part) for part in parts] == [3, 3]
    assert [index for pair in zip(*parts, strict=True) for index in pair][:5] == whole


def test_guess_and_check(table, tmp_path):
    table(_text("path,label"))
    for path in (tmp_path, tmp_path / "labels.csv"):
        kind = guess_data(path)
        assert (kind.task, kind.module) == ("classification", "CsvData")
        module, error = check(kind)
        assert error is None
        assert len(module.samples["train"]) == 4
    for name in ("cat", "dog"):  # class folders with a table about them
        write_image(tmp_path / "photos" / name / "1.jpg")
    assert guess_data(tmp_path).module == "ImageFolderData"
