"""Data sets by name: what is read, what is refused, and that nothing damaged gets through."""

import contextlib
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

from fedmetanas_jax.data import sources
from fedmetanas_jax.data.dataset import DataError, Official

ROOT = Path(__file__).parents[1]


def toy(n=12, m=6, classes=3, shape=(4, 4, 1), seed=0):
    """Arrays of a small sound data set."""
    rng = np.random.default_rng(seed)
    return {
        "train_images": rng.integers(0, 256, (n, *shape), np.uint8),
        "train_labels": np.arange(n) % classes,
        "test_images": rng.integers(0, 256, (m, *shape), np.uint8),
        "test_labels": np.arange(m) % classes,
    }


OWNERS = {"train_client": np.arange(12) % 4, "test_client": np.arange(6) % 4}


def save(folder, name="mine", **changes):
    arrays = {key: value for key, value in (toy() | changes).items() if value is not None}
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.npz"


def refusal(name, folder):
    with pytest.raises(DataError) as caught:
        sources.load(name, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_official(monkeypatch):
    """The official sets as if they had 20 + 4 images, the number in this file's archives, which are made official."""
    from fedmetanas_jax.data import prepare

    for name, official in sources.OFFICIAL.items():
        monkeypatch.setitem(sources.OFFICIAL, name, official._replace(train=20, test=4))
    monkeypatch.setattr(prepare, "ARCHIVES", dict(prepare.ARCHIVES))


def test_bundled_digits_are_the_whole_uci_set(tmp_path):
    digits = sources.load("digits", tmp_path)
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    assert np.bincount(digits.test_labels).tolist() == [36] * 10
    # Counts of the published file, digit by digit.
    both = np.bincount(digits.train_labels) + np.bincount(digits.test_labels)
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(digits.train_images)) == 17  # 0..16, rescaled
    assert digits.label_names == tuple("0123456789")


def test_own_file_with_and_without_names(tmp_path):
    path = save(tmp_path, label_names=np.array(["a", "b", "c", "d"]))
    mine = sources.load("mine", tmp_path)
    with np.load(path) as file:
        for key in sources.KEYS:
            np.testing.assert_array_equal(getattr(mine, key), file[key])
    assert mine.label_names == ("a", "b", "c", "d")  # a class may have no images
    save(tmp_path)
    assert sources.load("mine", tmp_path).label_names == ("0", "1", "2")


def test_whose_an_image_is(tmp_path):
    save(tmp_path)
    assert sources.load("mine", tmp_path)[5:7] == (None, None)
    save(tmp_path, train_client=np.arange(12, dtype=np.uint8), test_client=np.arange(6, dtype=np.int32))
    mine = sources.load("mine", tmp_path)
    assert mine.train_client.tolist() == list(range(12))
    assert {mine.train_client.dtype, mine.test_client.dtype} == {np.dtype(np.int64)}
    save(tmp_path, train_client=np.full(12, "ann"), test_client=np.full(6, "bo"))
    assert sources.load("mine", tmp_path).test_client.tolist() == ["bo"] * 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": None, "test_images": None}, "lacks train_images, test_images"),
        ({"train_images": np.zeros((12, 4, 4, 1), np.float32)}, "train_images is float32"),
        ({"train_images": np.zeros((12, 4, 4), np.uint8)}, "must be uint8 [n, h, w, c]"),
        ({"train_images": np.zeros((0, 4, 4, 1), np.uint8), "train_labels": np.zeros(0, int)}, "not empty"),
        ({"train_labels": np.zeros(12)}, "train_labels is float64"),
        ({"train_labels": np.zeros((12, 1), int)}, "train_labels is int64 (12, 1)"),
        ({"train_labels": np.zeros(11, int)}, "12 train_images but 11 train_labels"),
        ({"test_images": np.zeros((6, 5, 4, 1), np.uint8)}, "(4, 4, 1) each but test_images (5, 4, 1)"),
        ({"test_labels": np.full(6, -1)}, "labels run from -1"),
        ({"label_names": np.array(["a", "b"])}, "labels run from 0 to 2; 2 names allow 0 to 1"),
        ({"label_names": np.arange(3)}, "label_names is int64"),
        ({"label_names": np.array(["a", None, "c"])}, "cannot be read"),
        ({"test_labels": np.full(6, 2**40)}, "without label_names they can be at most 65535"),
        ({"train_images": np.zeros((12, 3, 32, 32), np.uint8)}, "as if channels came first; they must be [n, h, w, c]"),
        ({"train_images": np.zeros((12, 1, 8, 8), np.uint8)}, "numpy.moveaxis(images, 1, -1)"),
        ({"train_client": np.arange(12)}, "has train_client but no test_client; it needs both, or neither"),
        ({"test_client": np.arange(6)}, "has test_client but no train_client"),
        (OWNERS | {"train_client": np.zeros(12)}, "train_client is float64 (12,); it must be integers or strings [n]"),
        (OWNERS | {"test_client": np.zeros((6, 1), int)}, "test_client is int64 (6, 1)"),
        (OWNERS | {"test_client": np.zeros(5, int)}, "6 test_images but 5 test_client"),
        (OWNERS | {"test_client": np.full(6, "a")}, "train_client is int64 but test_client is <U1; both must be"),
    ],
)
def test_unsound_own_file_is_refused_in_one_line(tmp_path, changes, said):
    path = save(tmp_path, **changes)
    message = refusal("mine", tmp_path)
    assert said in message
    assert str(path) in message


def test_every_kind_of_damage_is_refused(tmp_path):
    path = save(tmp_path)
    sound = path.read_bytes()
    whole = sources.load("mine", tmp_path)
    for cut in (0, 10, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:cut])
        assert "cannot be read" in refusal("mine", tmp_path)
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :])
        try:  # a few bytes of a zip mean nothing, such as the time of writing
            got = sources.load("mine", tmp_path)
        except DataError:
            continue
        for a, b in zip(got[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    assert "cannot be read" in refusal("mine", tmp_path)


def test_names_are_checked(tmp_path):
    save(tmp_path)
    message = refusal("cifar1O", tmp_path)
    assert "cifar10, cifar100, digits, mine, mnist" in message
    assert str(tmp_path / "cifar1O.npz") in message
    assert "without folder" in refusal("../mine", tmp_path)
    save(tmp_path, "digits")
    assert "bundled" in refusal("digits", tmp_path)


def test_what_is_no_regular_file_or_no_file_name_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "cifar10.npz").mkdir()
    for name in ("pipe", "folder", "cifar10"):
        assert "is no regular file" in refusal(name, tmp_path)
    for name in ("", "x" * 300, "a\0b", "ä" * 126):
        assert "is no data set's name" in refusal(name, tmp_path)
    assert "there are cifar10, cifar100, digits, mnist" in refusal("mine", tmp_path / "none" / "here")
    with pytest.raises(DataError, match="~nosuchuser is no user's folder"):
        sources.data_dir("~nosuchuser/x")


def test_classes_without_images_are_said(tmp_path, caplog):
    save(tmp_path, train_labels=np.repeat([0, 2], 6), test_labels=np.arange(6) % 3)
    sources.load("mine", tmp_path)
    assert "no training images of label 1; the network gets 3 classes all the same" in caplog.text
    assert "no test images" not in caplog.text
    caplog.clear()
    save(tmp_path, train_labels=np.arange(12) % 3 + 1, test_labels=np.arange(6) % 3 + 1)
    sources.load("mine", tmp_path)
    assert "labels are 1 to 3, and 0 is a class too; subtract 1 from them unless it is meant to be one" in caplog.text
    assert "no test images of label 0; the network gets 4 classes all the same" in caplog.text
    caplog.clear()
    save(tmp_path, label_names=np.array(["none", "a", "b", "c"]), test_labels=np.arange(6) % 3 + 1)
    sources.load("mine", tmp_path)
    assert "subtract" not in caplog.text
    caplog.clear()
    names = np.array(["cat", "dog", "bird", *(f"odd{i}" for i in range(12))])
    save(tmp_path, label_names=names)
    sources.load("mine", tmp_path)
    said = ", ".join(f"{label} (odd{label - 3})" for label in range(3, 13))
    for split in ("training", "test"):
        assert f"no {split} images of label {said} and 2 more; the network gets 15 classes all the same" in caplog.text
    caplog.clear()
    save(tmp_path)
    sources.load("mine", tmp_path)
    sources.load("digits", tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", sources.OFFICIAL)
@pytest.mark.parametrize("changes", [{}, {"train_labels": None}, {"test_labels": np.full(6, -1)}])
def test_somebodys_own_file_of_an_official_name_is_never_replaced(tmp_path, monkeypatch, name, changes):
    monkeypatch.setattr(sources, "_make", lambda *_: pytest.fail("was made again"))
    path = save(tmp_path, name, **changes)
    before = path.read_bytes()
    message = refusal(name, tmp_path)
    assert "it stays as it is: give your own file another name" in message
    assert str(path) in message
    assert path.read_bytes() == before


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDMETANAS_DATA", raising=False)
    assert sources.data_dir() == tmp_path / ".cache/fedmetanas_jax/data"
    monkeypatch.setenv("FEDMETANAS_DATA", str(tmp_path / "b"))
    assert sources.data_dir() == tmp_path / "b"
    assert sources.data_dir("~/c") == tmp_path / "c"


def test_without_a_home_the_cache_is_in_the_current_folder(monkeypatch, tmp_path):
    def nobody(*_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("FEDMETANAS_DATA", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert sources.data_dir() == tmp_path / ".cache/fedmetanas_jax/data"
    assert sources.cache("xla") == tmp_path / ".cache/fedmetanas_jax/xla"
    assert len(sources.load("digits", sources.data_dir()).test_labels) == 360


def test_mean_std(tmp_path):
    images = np.zeros((2, 1, 2, 2), np.uint8)
    images[..., 0] = [[[0, 255]], [[255, 0]]]  # mean 1/2, deviation 1/2
    images[..., 1] = [[[0, 0]], [[0, 255]]]  # mean 1/4, variance 3/16
    dataset = sources.Dataset(images, np.zeros(2, np.int32), images, np.zeros(2, np.int32), ("a",))
    mean, std = sources.mean_std("mine", dataset)
    assert mean == pytest.approx((0.5, 0.25))
    assert std == pytest.approx((0.5, (3 / 16) ** 0.5))
    assert sources.mean_std("mnist", dataset) == ((0.1307,), (0.3081,))
    flat = dataset._replace(train_images=np.full((2, 1, 2, 1), 7, np.uint8))
    with pytest.raises(DataError, match="channel 0 is constant"):
        sources.mean_std("mine", flat)


# cifar10, cifar100, mnist


def test_a_present_file_is_read_without_tensorflow_datasets(tmp_path):
    save(tmp_path, "cifar10", **toy(20, 4, 10, (32, 32, 3)), label_names=np.array(list("abcdefghij")))
    program = (
        "import sys; from pathlib import Path; from fedmetanas_jax.data import sources;"
        "sources.OFFICIAL['cifar10'] = sources.OFFICIAL['cifar10']._replace(train=20, test=4);"
        "print(len(sources.load('cifar10', Path(sys.argv[1])).train_images));"
        "sys.exit(any(name.startswith('tensorflow') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_mnist_hands_out_the_first_50000(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MNIST_TRAIN", 15)
    monkeypatch.setitem(sources.OFFICIAL, "mnist", Official(20, 4, (4, 4, 1), 10, (0.5,), (0.5,)))
    arrays = toy(20, 4, 10)
    save(tmp_path, "mnist", **arrays, label_names=np.array(list("0123456789")))
    mnist = sources.load("mnist", tmp_path)
    np.testing.assert_array_equal(mnist.train_images, arrays["train_images"][:15])
    np.testing.assert_array_equal(mnist.train_labels, arrays["train_labels"][:15])
    np.testing.assert_array_equal(mnist.test_images, arrays["test_images"])


def test_nothing_there_and_no_network_is_one_line(tmp_path, monkeypatch):
    from fedmetanas_jax.data import prepare

    monkeypatch.setattr(prepare, "RETRIES", 0)
    monkeypatch.setattr(prepare.Cifar10, "URL", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    message = refusal("cifar10", tmp_path)
    assert str(tmp_path / "cifar10.npz") in message
    assert str(tmp_path / "downloads") in message
    assert "put the .npz there, or give tensorflow-datasets a network or its archives" in message
    assert not (tmp_path / "cifar10.npz").exists()


def test_without_tensorflow_datasets_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "fedmetanas_jax.data.prepare", raising=False)
    monkeypatch.delattr("fedmetanas_jax.data.prepare", raising=False)
    message = refusal("mnist", tmp_path)
    assert str(tmp_path / "mnist.npz") in message
    assert "pip install 'fedmetanas_jax[data]'" in message


def lay(folder, name, arrays):
    """The official archive of `name` with these images, where tensorflow-datasets keeps downloads -> its content."""
    from tensorflow_datasets.core.download import checksums, resource

    from fedmetanas_jax.data import prepare

    builder = prepare.BUILDERS[name]
    known = checksums.get_all_url_infos()

    def put(url, content):
        path = folder / "downloads" / name / resource.get_dl_fname(url, known[url].checksum)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        Path(f"{path}.INFO").write_text("{}")
        prepare.ARCHIVES[url.rpartition("/")[2]] = (len(content), hashlib.sha256(content).hexdigest())
        return content

    if name == "mnist":
        for split, stem in builder.FILES.items():
            pixels = arrays[f"{split}_images"].tobytes()
            labels = arrays[f"{split}_labels"].astype(np.uint8).tobytes()
            put(f"{builder.URL}{stem}-images-idx3-ubyte.gz", gzip.compress(bytes(16) + pixels))
            put(f"{builder.URL}{stem}-labels-idx1-ubyte.gz", gzip.compress(bytes(8) + labels))
        return None
    files = {file: "\n".join(names_of(classes)) + "\n\n" for classes, file in builder.LABELS.values()}
    files = {file: text.encode() for file, text in files.items()}
    for split, members in builder.FILES.items():
        pixels = arrays[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = arrays[f"{split}_labels"].astype(np.uint8)[:, None]
        records = np.concatenate([labels // 5] * (len(builder.LABELS) - 1) + [labels, pixels], axis=1)
        for member, part in zip(members, np.split(records, len(members)), strict=True):
            files[member] = part.tobytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{builder.FOLDER}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return put(builder.URL, buffer.getvalue())


def names_of(classes):
    return [f"class {c}" for c in range(classes)]


@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [("cifar10", 10, (32, 32, 3)), ("cifar100", 100, (32, 32, 3)), ("mnist", 10, (28, 28, 1))],
)
def test_official_set_is_prepared_from_its_archive(tmp_path, small_official, name, classes, shape):
    import tensorflow_datasets as tfds

    arrays = toy(20, 4, classes, shape)
    lay(tmp_path, name, arrays)
    made = sources.load(name, tmp_path)
    cached = sources.load(name, tmp_path)
    for key in sources.KEYS:  # same images, labels and order as in the archive
        np.testing.assert_array_equal(getattr(made, key), arrays[key])
        np.testing.assert_array_equal(getattr(cached, key), arrays[key])
    expected = [str(c) for c in range(10)] if name == "mnist" else names_of(classes)
    assert made.label_names == cached.label_names == tuple(expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, f"{name}.npz", "downloads"])
    # What was written is the official data set, as far as tensorflow-datasets can tell.
    examples = tfds.data_source(name, split="test", data_dir=tmp_path, download=False)
    assert sorted(int(e["label"]) for e in examples) == sorted(arrays["test_labels"].tolist())


def test_damaged_cache_is_named_and_made_again(tmp_path, small_official, caplog):
    arrays = toy(20, 4, 10, (28, 28, 1))
    lay(tmp_path, "mnist", arrays)
    path = tmp_path / "mnist.npz"
    path.write_bytes(b"not a zip")
    mnist = sources.load("mnist", tmp_path)
    np.testing.assert_array_equal(mnist.train_images, arrays["train_images"])
    assert f"{path} cannot be read" in caplog.text
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(sources.load("mnist", tmp_path).test_images, arrays["test_images"])
    with np.load(path) as file:
        assert len(file["train_images"]) == 20


def test_damaged_cache_that_cannot_be_made_again_is_refused(tmp_path, monkeypatch):
    from fedmetanas_jax.data import prepare

    monkeypatch.setattr(prepare, "RETRIES", 0)
    monkeypatch.setattr(prepare.Mnist, "URL", "http://127.0.0.1:9/")
    path = save(tmp_path, "mnist", **toy(20, 4, 10, (28, 28, 1)), label_names=np.array(list("0123456789")))
    before = path.read_bytes()
    message = refusal("mnist", tmp_path)
    assert f"{path} is not the official set" in message
    assert "(20, 4, (28, 28, 1), 10)" in message
    assert path.read_bytes() == before


def test_records_only_tensorflow_can_read_are_refused(tmp_path, small_official):
    lay(tmp_path, "mnist", toy(20, 4, 10, (28, 28, 1)))
    sources.load("mnist", tmp_path)
    (tmp_path / "mnist.npz").unlink()
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert f"{info.parent} is in a format that only TensorFlow reads" in refusal("mnist", tmp_path)


def test_damaged_archive_is_named_and_removed(tmp_path, small_official):
    whole = lay(tmp_path, "cifar10", toy(20, 4, 10, (32, 32, 3)))
    (archive,) = (tmp_path / "downloads" / "cifar10").glob("*.tar.gz")
    archive.write_bytes(whole[:5000])
    message = refusal("cifar10", tmp_path)
    assert message.startswith(f"{archive}, from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, has 5000")
    assert f"the official file has {len(whole)} and SHA-256" in message
    assert message.endswith("it is removed: the same command fetches it again")
    assert list(archive.parent.iterdir()) == []
    assert not (tmp_path / "cifar10.npz").exists()


def test_what_somebody_has_put_into_manual_is_named_and_stays(tmp_path):
    theirs = tmp_path / "downloads/manual/cifar-10-binary.tar.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half")
    message = refusal("cifar10", tmp_path)
    assert f"{theirs}, from" in message
    assert message.endswith("put the right one there, or remove it: then it is fetched")
    assert theirs.read_bytes() == b"half"


@pytest.fixture
def served(monkeypatch):
    """What any address answers, with status 200 and no word of its length: {"content": bytes}."""
    from tensorflow_datasets.core.download import downloader

    answer = {}

    @contextlib.contextmanager
    def opened(url, **_):
        yield types.SimpleNamespace(url=url, headers={}), [answer["content"]]

    monkeypatch.setattr(downloader, "_open_url", opened)
    return answer


def test_half_an_archive_or_a_page_is_not_kept(tmp_path, monkeypatch, small_official, served):
    from fedmetanas_jax.data import prepare

    arrays = toy(20, 4, 10, (32, 32, 3))
    whole = lay(tmp_path / "elsewhere", "cifar10", arrays)
    official = prepare.Cifar10.URL
    monkeypatch.setattr(prepare.Cifar10, "URL", "http://mirror/cifar-10-binary.tar.gz")  # not in tensorflow-datasets
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    for bad, said in [(whole[: len(whole) // 2], "bytes; the"), (b"<html>", "6 bytes; the"), (changed, "another SHA")]:
        served["content"] = bad
        message = refusal("cifar10", tmp_path)
        assert "from http://mirror/cifar-10-binary.tar.gz, has" in message
        assert said in message
        assert list((tmp_path / "downloads/cifar10").iterdir()) == []
    served["content"] = whole
    np.testing.assert_array_equal(sources.load("cifar10", tmp_path).train_images, arrays["train_images"])
    monkeypatch.setattr(prepare.Cifar10, "URL", official)
    served["content"] = b"<html>"  # which tensorflow-datasets refuses by itself, and keeps
    assert f"from {official}, has 6 bytes; the official file has" in refusal("cifar10", tmp_path / "other")
    assert list((tmp_path / "other/downloads/cifar10").iterdir()) == []


def test_no_progress_bar_is_written_into_a_file(tmp_path, small_official, capsys):
    import tensorflow_datasets as tfds

    tfds.enable_progress_bar()
    lay(tmp_path, "mnist", toy(20, 4, 10, (28, 28, 1)))
    sources.load("mnist", tmp_path)
    assert capsys.readouterr().err.count("\r") == 0


REAL = sources.data_dir() / "cifar10.npz"


@pytest.mark.skipif(not REAL.exists(), reason=f"needs the real CIFAR-10 as {REAL}: set FEDMETANAS_DATA")
def test_real_cifar10_has_its_published_statistics():
    cifar = sources.load("cifar10", REAL.parent)
    assert np.bincount(cifar.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar.test_labels).tolist() == [1000] * 10
    assert cifar.label_names[3] == "cat"
    mean, std = sources.mean_std("computed", cifar)
    assert mean == pytest.approx(sources.OFFICIAL["cifar10"].mean, abs=1e-3)
    assert std == pytest.approx(sources.OFFICIAL["cifar10"].std, abs=1e-3)
