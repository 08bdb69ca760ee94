#!/usr/bin/env bash
# Fine-tune weights of this package with timm's own training script, on images/train/CLASS/... and images/val/CLASS/...
#
#   $ curl -O https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.31/train.py
#   $ examples/timm_train.sh train.py images tuned --epochs 5     # here 160 scanned digits of four classes
#   ...
#   *** Best metric: 100.0 (epoch 1)
#   next: eit predict tuned IMAGE...
#
# It starts from the digits that ship; WEIGHTS=runs/pets names a run folder or a file. What follows the output folder
# goes to train.py. That is in timm's repository alone: take it at the tag of the timm that is installed. Tried is the
# one of August 2026 (its 1.0.29.dev0), with timm 1.0.29 and 1.0.31.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: [WEIGHTS=digits] [PYTHON=python] $0 TRAIN_PY IMAGES OUT [OPTION...]" >&2; exit 2; }
train_py=$1 images=$2 out=$3 weights=${WEIGHTS:-digits} python=${PYTHON:-python}
shift 3

# Weights, architecture and preprocessing as a folder of timm's format; for as many classes the head is kept.
# A file alone needs the rest as options,
#   --model eit_mini --model-kwargs img_size=8 embed_dim=64 ... --input-size 3 8 8 --mean 0.5 0.5 0.5 --std ...
# and one of
#   --pretrained --pretrained-path best.safetensors   # a new head, whatever the classes
#   --initial-checkpoint best.safetensors             # with its head: as many classes, in the same order
"$python" -m eit push "$weights" --to "$out/start" > /dev/null
said=$("$python" - "$images" "$out/start" <<'EOF'
import sys
import torch
from eit.weights.load import read_card
from timm.data import create_dataset
images, start = sys.argv[1:]
classes = create_dataset("", root=images, split="train").reader.class_to_idx
print(len(classes), read_card(start).in_chans, "cuda" if torch.cuda.is_available() else "cpu")
EOF
)
read -r classes in_chans device <<<"$said"

# What --device-modules names is imported before the model is made; importing eit registers its models.
"$python" "$train_py" --data-dir "$images" --device "$device" --device-modules eit \
  --model "local-dir:$out/start" --pretrained --num-classes "$classes" --in-chans "$in_chans" \
  --opt adamw --lr 1e-3 --weight-decay 0.05 --layer-decay 0.75 --epochs 5 --warmup-epochs 1 \
  --batch-size 32 --workers 2 --scale 0.6 1 --hflip 0 \
  --output "$(dirname "$out")" --experiment "$(basename "$out")" "$@"

# The best epoch's weights as a file of this package. timm's order of classes is the natural one, 2 before 10.
"$python" - "$images" "$out" <<'EOF'
import sys
from pathlib import Path
from eit.weights.formats import save_weights
from eit.weights.load import read_card
from timm.data import create_dataset
from timm.models import load_state_dict
images, out = sys.argv[1], Path(sys.argv[2])
classes = list(create_dataset("", root=images, split="train").reader.class_to_idx)
card = read_card(out / "start").model_copy(update=dict(classes=classes, recipe=None, metrics=None))
save_weights(out / "best.safetensors", load_state_dict(str(out / "model_best.pth.tar")), card)
EOF
echo "next: eit predict $out IMAGE..."
