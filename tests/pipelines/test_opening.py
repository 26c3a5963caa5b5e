"""What opening a pipeline imports: the large libraries that it does not need stay away."""

import os
import subprocess
import sys
from pathlib import Path

from tests.pipelines.tiny import DEV, GEMMA, UPSCALER

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import torch

brought_by_torch = set(sys.modules)

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.released import released_parts

*models, tokenizer = [ModelConfig(path=path) for path in sys.argv[1:]]
pipe = LTX2AudioVideoPipeline.from_pretrained(
    device="cpu", model_configs=models, tokenizer_config=tokenizer, vram_limit=1.0
)
assert pipe.tokenizer.count("a boat") > 1
released_parts("2.0")
released_parts("2.3")
imported = {name.partition(".")[0] for name in sys.modules.keys() - brought_by_torch}
torch_parts = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp"} & sys.modules.keys()
libraries = {"transformers", "sklearn", "scipy", "sympy", "huggingface_hub", "modelscope"} & imported
print(sorted(libraries | torch_parts - brought_by_torch))
"""


def test_opening_imports_no_compiler_and_no_library_of_other_models(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(DEV), str(GEMMA), str(UPSCALER), str(GEMMA)],
        cwd=ROOT,
        env={**os.environ, "DIFFSYNTH_CACHE_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
