"""Write a few validation digits as PNG files, in one folder per class: `python tools/demo_images.py OUT`."""

import sys
from pathlib import Path

from eit.config import Data
from eit.data.datasets import DIGITS, open_data

_, val = open_data(Data(root=DIGITS))
for index in range(0, len(val), len(val) // 6):
    file = Path(sys.argv[1]) / val.classes[val.labels[index]] / f"{val.names[index]}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    val.read(index, 1).save(file)
