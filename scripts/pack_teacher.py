"""Pack the EMA weights of a timm run into a teacher file: float16, with the facts in its metadata.

python scripts/pack_teacher.py RUN ghosttrain/models/digits_teacher.safetensors
"""

import sys
from pathlib import Path

from ghosttrain.distill.pretrained import Packed, save_packed
from ghosttrain.engine.load import classes_of, load_run
from ghosttrain.engine.run_files import read_config, read_result

run, out = Path(sys.argv[1]), Path(sys.argv[2])
config, result = read_config(run), read_result(run)
if config.model.source != "timm" or result is None:
    sys.exit(f"{run} is no finished run of a timm model")
data = config.data
about = Packed(
    architecture=config.model.name,
    input_size=data.train_size,
    mean=data.mean,
    std=data.std,
    interpolation=data.interpolation,
    classes=tuple(classes_of(run)),
    top1=result["weights"][result["headline"]]["top1"],
    source=f"ghosttrain +recipe={config.recipe} seed={config.seed}, {data.name}, training split",
)
save_packed(out, load_run(run).state_dict(), about)
print(f"{out}: {out.stat().st_size:,} bytes, {about.architecture}, top-1 {about.top1:.2f} %")
