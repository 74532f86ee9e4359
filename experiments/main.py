"""A run from a clone: `fedmetanas_jax/main.py` by the name that the README and every record give it.

python experiments/main.py --config=digits_dir01 --config.rounds=20
"""

import sys

from fedmetanas_jax.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
