"""``python -m model.train.pretrain STEP …``: make the starting points of a small model from phantoms alone."""

import sys

from model.train.pretrain.pipeline import main

if __name__ == "__main__":
    sys.exit(main())
