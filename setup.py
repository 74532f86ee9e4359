"""Packaging of fedmetanas_jax. The lower bounds are the lowest versions the test suite was run with."""

from setuptools import find_packages, setup

setup(
    name="fedmetanas_jax",
    version="0.1.0",
    description="Federated neural architecture search with model-agnostic meta-learning, in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["fedmetanas_jax", "fedmetanas_jax.*"]),
    package_data={"fedmetanas_jax.data": ["digits.npz", "DIGITS.md"]},
    entry_points={"console_scripts": ["fedmetanas=fedmetanas_jax.main:console"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "chex>=0.1.92",
        "orbax-checkpoint>=0.12.8",
        "numpy>=2.0",
        "scipy>=1.15",
        "absl-py>=2.5",
        "matplotlib>=3.10",
        "pillow>=11",
        "rich>=14",
    ],
    extras_require={
        # Only for experiments/bench.py, experiments/oracle.py and tests/test_oracle.py, which skips without it.
        "bench": ["torch>=2.13"],
        # Only to fetch cifar10, cifar100 and mnist; a cached DATA_DIR/<name>.npz needs none of it.
        "data": ["tensorflow-datasets>=4.9.10", "array_record>=0.8", "importlib_resources>=6"],
        # Only for main.py --sinks, an extra each.
        "tensorboard": ["tensorboard>=2.21"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow>=3.17"],
        # Only for experiments/export.py and tests/test_export.py; its PyTorch module needs "bench". JAX writes its own
        # exports by flatbuffers, which it does not bring.
        "export": ["flatbuffers>=25.12", "onnx>=1.23", "onnxruntime>=1.32", "safetensors>=0.8"],
        # Only for differential privacy (config.aggregate=clip:C,gaussian:Z) and its tests, which skip without it. It
        # wants an attrs below 24.
        "privacy": ["dp-accounting>=0.6"],
        # Only for experiments/serve.py, join.py and what tries them; tests/test_deploy*.py skip without it.
        # pycryptodome is for secure sums alone (config.aggregate=clip:...,secure).
        "deploy": ["grpcio>=1.85", "msgpack>=1.2", "cryptography>=50", "pycryptodome>=3.24", "prometheus-client>=0.26"],
        # Only for experiments/flower_app; tests/test_flower_*.py skip without it. It wants a pycryptodome below 4, a
        # protobuf below 7, a rich below 15 and a packaging below 26.
        "flower": ["flwr>=1.42", "grpcio>=1.85", "msgpack>=1.2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "ruff>=0.14",
            "tensorflow-datasets>=4.9.10",
            "array_record>=0.8",
            "importlib_resources>=6",
        ],
    },
)
