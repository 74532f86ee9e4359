"""cifar10, cifar100 and mnist through tensorflow-datasets, without TensorFlow.

The builders in tensorflow-datasets unpack and encode with TensorFlow. These carry the same names, versions
and features but read the archives with the standard library, so what they write is what
`tfds.data_source(name)` reads. It imports tensorflow_datasets, so import it only where data must be made.
"""

import contextlib
import gzip
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums, download_manager, downloader, resource

from fedmetanas_jax.data.dataset import DataError

# Bytes and SHA-256 by the last part of an address, as in tensorflow-datasets' own lists. Those it consults for what it
# fetches from these addresses, but it trusts what lies in its folder already.
ARCHIVES = {
    "cifar-10-binary.tar.gz": (170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "cifar-100-binary.tar.gz": (168_513_733, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
    "train-images-idx3-ubyte.gz": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte.gz": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
CHUNK = 2_000  # images decoded at once
RETRIES = 4  # of a download; tensorflow-datasets' own 10 keep a machine without a network waiting 200 s


def arrays(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of dataset.KEYS and label_names, in the order of the official files.

    Prepares DATA_DIR/<name>/<version> if it is not there, from the archives in DATA_DIR/downloads/<name> (or
    downloads/manual) if they are, else over http. DataError for an archive that is not the official one; besides,
    whatever tensorflow-datasets raises.
    """
    version = BUILDERS[name].VERSION
    try:
        builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{data_dir / name / str(version)} is in a format that only TensorFlow reads: move it away"
        ) from error
    downloader.MAX_RETRIES = RETRIES
    if not (sys.stderr and sys.stderr.isatty()):  # in a file every step of a progress bar is a line
        tfds.disable_progress_bar()
    builder.download_and_prepare()
    found = {}
    for split in ("train", "test"):
        source = tfds.data_source(f"{name}:{version}", split=split, data_dir=data_dir, download=False)
        images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
        labels = np.empty(len(source), np.uint8)
        place = np.arange(len(source))
        for start in range(0, len(source), CHUNK):
            rows = range(start, min(start + CHUNK, len(source)))
            for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
                images[row], labels[row] = example["image"], example["label"]
                if "id" in example:  # "train_00042" is the 43rd image of the official file
                    place[row] = int(example["id"].decode().rpartition("_")[2])
        order = np.argsort(place)
        found |= {f"{split}_images": images[order], f"{split}_labels": labels[order]}
    return found | {"label_names": np.array(builder.info.features["label"].names)}


def _fetch(manager: tfds.download.DownloadManager, url: str) -> Path:
    """The archive at `url`, or where it was kept.

    DataError if it is not the official one: half of it, or a page in its place. It is thrown away then, so that it is
    fetched again; but not what somebody has put into downloads/manual.
    """
    try:
        path = Path(manager.download(url))
    except download_manager.NonMatchingChecksumError as error:  # says so in five lines, and keeps the file
        place = re.search(r"downloaded to (.+), has wrong checksum", str(error))
        if place is None:
            raise
        path = Path(place[1])
    size, digest = ARCHIVES[url.rpartition("/")[2]]
    found = checksums.compute_url_info(path)
    if (int(found.size), found.checksum) == (size, digest):
        return path
    what = f"{path}, from {url}, has {int(found.size)} bytes" + (" and another SHA-256" if found.size == size else "")
    fate = _discard(path)
    raise DataError(f"{what}; the official file has {size} and SHA-256 {digest[:8]}...; {fate}")


def _discard(path: Path) -> str:
    """Throws away what was fetched -> what became of it."""
    if path.parent.name == "manual":
        return "put the right one there, or remove it: then it is fetched"
    with contextlib.suppress(OSError):
        if ".tmp." in path.parent.name:  # a folder for this download alone
            shutil.rmtree(path.parent)
        else:
            resource.get_info_path(path).unlink(missing_ok=True)
            path.unlink()
        return "it is removed: the same command fetches it again"
    return "remove it: then the same command fetches it again"


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10: records of one label byte and 3 x 32 x 32 pixel bytes."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")
    URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    FOLDER = "cifar-10-batches-bin"
    FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    LABELS = {"label": (10, "batches.meta.txt")}  # in the order of a record's bytes

    def _info(self):
        features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
        for label, (classes, _) in self.LABELS.items():
            features[label] = tfds.features.ClassLabel(num_classes=classes)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        archive = _fetch(dl_manager, self.URL)  # not download_and_extract: that is where TensorFlow comes in
        with tarfile.open(archive) as tar:
            for label, (_, file) in self.LABELS.items():
                names = tar.extractfile(f"{self.FOLDER}/{file}").read().decode().split("\n")
                self.info.features[label].names = [name for name in names if name]
        return {split: self._generate_examples(archive, split) for split in self.FILES}

    def _generate_examples(self, archive, split):
        head = len(self.LABELS)
        index = 0
        with tarfile.open(archive) as tar:
            for file in self.FILES[split]:
                data = np.frombuffer(tar.extractfile(f"{self.FOLDER}/{file}").read(), np.uint8)
                for record in data.reshape(-1, head + 3072):
                    pixels = record[head:].reshape(3, 32, 32).transpose(1, 2, 0)
                    yield index, {
                        "id": f"{split}_{index:05d}",
                        "image": Image.fromarray(np.ascontiguousarray(pixels)),
                        **dict(zip(self.LABELS, record[:head].tolist(), strict=True)),
                    }
                    index += 1


class Cifar100(Cifar10, skip_registration=True):
    """CIFAR-100: records of a coarse label byte, a label byte and 3 x 32 x 32 pixel bytes."""

    name = "cifar100"
    VERSION = tfds.core.Version("3.0.2")
    URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    FOLDER = "cifar-100-binary"
    FILES = {"train": ["train.bin"], "test": ["test.bin"]}
    LABELS = {"coarse_label": (20, "coarse_label_names.txt"), "label": (100, "fine_label_names.txt")}


class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """MNIST: gzipped idx files, a header of 16 bytes before the pixels and of 8 before the labels."""

    name = "mnist"
    VERSION = tfds.core.Version("3.0.1")
    URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    FILES = {"train": "train", "test": "t10k"}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # MNIST's features have no id that could give the file's order back
        )

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(
                _fetch(dl_manager, f"{self.URL}{stem}-images-idx3-ubyte.gz"),
                _fetch(dl_manager, f"{self.URL}{stem}-labels-idx1-ubyte.gz"),
            )
            for split, stem in self.FILES.items()
        }

    def _generate_examples(self, image_file, label_file):
        with gzip.open(image_file) as images, gzip.open(label_file) as labels:
            pixels = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
            classes = np.frombuffer(labels.read(), np.uint8, offset=8)
        for index, (image, label) in enumerate(zip(pixels, classes, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}


BUILDERS = {builder.name: builder for builder in (Cifar10, Cifar100, Mnist)}
