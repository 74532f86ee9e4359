"""Images in folders as a data set: which are found, how they are split, what they become."""

import folders
import numpy as np
import prepare
import pytest
from PIL import Image

from fedmetanas_jax.data import sources


def put(path, color="red", size=(6, 4), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **how)


@pytest.fixture
def photos(tmp_path):
    """Ten cats, red, and five dogs, blue."""
    for number in range(15):
        name, color = ("cat", "red") if number < 10 else ("dog", "blue")
        put(tmp_path / "photos" / name / f"{number:02}.png", color)
    return tmp_path / "photos"


def run(capsys, folder, *flags, name="mine"):
    """-> (exit status, what was printed)"""
    status = prepare.main(["prepare.py", str(folder), name, f"--data_dir={folder.parent}", *flags])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def made(capsys, folder, *flags):
    status, printed = run(capsys, folder, *flags)
    assert status == 0, printed
    return sources.load("mine", folder.parent), printed


def test_a_folder_a_class(photos, capsys):
    (photos / "cat" / ".hidden.png").write_text("")
    (photos / "cat" / "notes.txt").write_text("")
    mine, printed = made(capsys, photos, "--size=8")
    assert mine.label_names == ("cat", "dog")
    assert mine.train_images.shape == (12, 8, 8, 3)
    assert np.bincount(mine.train_labels).tolist() == [8, 4]
    assert np.bincount(mine.test_labels).tolist() == [2, 1]
    colors = np.array([[255, 0, 0], [0, 0, 255]])
    np.testing.assert_array_equal(mine.train_images[:, 3, 3], colors[mine.train_labels])
    np.testing.assert_array_equal(mine.test_images[:, 3, 3], colors[mine.test_labels])
    assert mine.train_client is None
    assert f"left out what is no image by its name: {photos / 'cat' / 'notes.txt'}\n" in printed
    assert "12 training and 3 test images (8 x 8 x 3) of 2 classes" in printed
    assert printed.endswith("to use it: --config.dataset=mine\n")


def test_an_existing_data_set_stays(photos, capsys):
    made(capsys, photos)
    before = (photos.parent / "mine.npz").read_bytes()
    status, printed = run(capsys, photos, "--size=8")
    assert status == 2
    assert "already; it stays as it is" in printed
    assert (photos.parent / "mine.npz").read_bytes() == before


def test_folders_may_be_split(photos, capsys):
    photos.rename(photos.parent / "train")
    photos.mkdir()
    (photos.parent / "train").rename(photos / "train")
    put(photos / "test" / "dog" / "a.png")
    put(photos / "test" / "bird" / "a.png")
    mine, _ = made(capsys, photos, "--size=4")
    assert mine.label_names == ("bird", "cat", "dog")
    assert np.bincount(mine.train_labels).tolist() == [0, 10, 5]
    assert mine.test_labels.tolist() == [0, 2]
    status, printed = run(capsys, photos, "--test_share=0.1", name="other")
    assert (status, "leave --test_share out" in printed) == (2, True)
    put(photos / "val" / "dog" / "a.png")
    status, printed = run(capsys, photos, name="other")
    assert (status, "but holds more (val)" in printed) == (1, True)


def test_a_folder_a_client(tmp_path, capsys):
    folder = tmp_path / "users"
    for client, count in {"ann": 10, "bo": 4, "cy": 1}.items():
        for number in range(count):
            put(folder / client / f"class{number % 2}" / f"{number}.png", 100, mode="L")
    (folder / "bo" / "class2").mkdir()  # of which bo has none
    mine, printed = made(capsys, folder, "--clients", "--test_share=0.3", "--size=4")
    assert mine.train_images.shape == (11, 4, 4, 1)
    assert {name: np.sum(mine.train_client == name) for name in ("ann", "bo", "cy")} == {"ann": 7, "bo": 3, "cy": 1}
    assert {name: np.sum(mine.test_client == name) for name in ("ann", "bo", "cy")} == {"ann": 3, "bo": 1, "cy": 0}
    assert "2 clients have training and test images" in printed
    assert printed.endswith("--config.partition=natural --config.clients=2\n")
    status, printed = run(capsys, folder, name="other")
    assert (status, "holds the folder class0; with --clients" in printed) == (1, True)


def test_what_is_kept_is_drawn_by_the_seed():
    found = [folders.Picture(None, label, None, None) for label in "aaaaaaaaaabbbbbbbbbbc"]
    first, again, other = (prepare.kept(found, 0.5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first[:10].sum(), first[10:20].sum(), first[20]) == (5, 5, False)
    assert prepare.kept(found, 0.01, 1).sum() == prepare.kept(found, 0.99, 1)[:20].sum() / 9 == 2


def test_unreadable_images_are_named(photos, capsys):
    whole = (photos / "cat" / "00.png").read_bytes()
    (photos / "cat" / "00.png").write_bytes(whole[:40])
    (photos / "dog" / "x.jpg").write_text("no image")
    status, printed = run(capsys, photos)
    assert status == 1
    assert "2 of 16 images cannot be read: " in printed
    assert "cat/00.png (" in printed
    assert "dog/x.jpg (" in printed
    assert printed.count("\n") == 1
    assert not (photos.parent / "mine.npz").exists()
    mine, printed = made(capsys, photos, "--skip_unreadable", "--size=4")
    assert len(mine.train_labels) + len(mine.test_labels) == 14
    assert "left out 2 of 16 images" in printed


def test_pixels_of_every_kind(tmp_path):
    Image.fromarray(np.full((4, 4), 51_400, np.uint16)).save(tmp_path / "sixteen.png")
    put(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    put(tmp_path / "gray.png", 77, mode="L")
    put(tmp_path / "palette.gif", 0, mode="P")
    put(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK")
    put(tmp_path / "real.tiff", 0.5, mode="F")
    turned = Image.new("RGB", (8, 4), "blue")
    turned.paste("red", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)

    def look(*names, gray=False):
        failed = []
        found = [folders.Picture(tmp_path / name, "a", None, None) for name in names]
        return folders.pixels(found, 4, gray, failed), failed

    both, _ = look("sixteen.png", "gray.png")
    assert both.shape == (2, 4, 4, 1)
    assert np.unique(both[0]).tolist() == [200]
    assert np.unique(both[1]).tolist() == [77]
    mixed, failed = look("gray.png", "clear.png", "palette.gif", "cmyk.jpg", "real.tiff", "turned.png")
    assert mixed.shape == (5, 4, 4, 3)
    assert [name.name for name, _ in failed] == ["real.tiff"]
    assert np.unique(mixed[0]).tolist() == [77]
    assert np.unique(mixed[1]).tolist() == [255]
    assert mixed[3, 0, 0, 0] > 200 > 50 > mixed[3, 0, 0, 1]
    assert (mixed[4, 0, 0].argmax(), mixed[4, 0, 3].argmax()) == (2, 0)
    assert look("clear.png", "cmyk.jpg", gray=True)[0].shape == (2, 4, 4, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prepare.py FOLDER NAME"),
        (["."], "prepare.py FOLDER NAME"),
        (["none", "mine"], "folder is 'none', which is no folder"),
        ([".", "digits"], "a published data set's"),
        ([".", "mnist"], "a published data set's"),
        ([".", "a/b"], "'a/b' is no data set's name"),
        ([".", "mine", "--size=2"], "size: '2' is not a whole number of at least 4"),
        ([".", "mine", "--size=2000"], "size is 2000; it must be at most 1024"),
        ([".", "mine", "--test_share=1"], "test_share is 1.0; it must be above 0 and below 1"),
        ([".", "mine", "--sise=2"], "no flag 'sise'; did you mean 'size'"),
        ([".", "mine", "more"], "unexpected argument 'more'"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["prepare.py", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_folders_without_images_are_refused_in_one_line(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    assert "holds no folders: images lie in FOLDER/CLASS" in run(capsys, folder)[1]
    (folder / "cat").mkdir()
    assert "is a class, but holds no images" in run(capsys, folder)[1]
    assert "cat holds no folders" in run(capsys, folder, "--clients")[1]
    (folder / "cat" / "brown").mkdir()
    assert "holds no images" in run(capsys, folder, "--clients")[1]
    put(folder / "cat" / "brown" / "1.png")
    status, printed = run(capsys, folder, "--clients")
    assert (status, "of 1 images none are test images" in printed) == (1, True)


def test_more_than_the_memory_is_refused(photos, monkeypatch, capsys):
    monkeypatch.setattr(folders.os, "sysconf", lambda name: 100)
    status, printed = run(capsys, photos)
    assert (status, "make --size (32) smaller" in printed) == (2, True)
