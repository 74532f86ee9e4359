"""cifar10, cifar100 and mnist through tensorflow-datasets, without TensorFlow.

The builders in tensorflow-datasets unpack and encode with TensorFlow. These carry the same names, versions
and features but read the archives with the standard library, so what they write is what
`tfds.data_source(name)` reads. It imports tensorflow_datasets, so import it only where data must be made.
"""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader

CHUNK = 2_000  # images decoded at once
RETRIES = 4  # of a download; tensorflow-datasets' own 10 keep a machine without a network waiting 200 s


def arrays(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of sources.KEYS and label_names, in the order of the official files.

    Prepares DATA_DIR/<name>/<version> if it is not there, from the archives in DATA_DIR/downloads/<name> (or
    downloads/manual) if they are, else over http. Raises whatever tensorflow-datasets raises.
    """
    version = BUILDERS[name].VERSION
    try:
        builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{data_dir / name / str(version)} is in a format that only TensorFlow reads: move it away"
        ) from error
    downloader.MAX_RETRIES = RETRIES
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
        archive = dl_manager.download(self.URL)  # not download_and_extract: that is where TensorFlow comes in
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
                dl_manager.download(f"{self.URL}{stem}-images-idx3-ubyte.gz"),
                dl_manager.download(f"{self.URL}{stem}-labels-idx1-ubyte.gz"),
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
