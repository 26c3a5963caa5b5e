"""The predictions of ``docs/performance.md``, made anew: ``python -m benchmarks.plan_table``.

Everything between the two marks of that file is what this prints.  Nothing is measured and nothing is
downloaded: see :mod:`diffsynth.vram.planner` for how the figures come about.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from diffsynth.cli.plan import MODELS, MODES
from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines.demand import demands_for
from diffsynth.pipelines.gpus import GPUS, GpuClass
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.released import released_parts
from diffsynth.pipelines.sizes import ModelSizes, model_sizes
from diffsynth.pipelines.storage import Storage
from diffsynth.request import GenerateRequest
from diffsynth.vram.planner import Budget, PhaseDemand, fits, plan

BEGIN = "<!-- python -m benchmarks.plan_table -->"
END = "<!-- end -->"
SIZES = ((512, 768), (1024, 1536))
FRAMES = 121
HOST_GB = 32.0
GB = 2**30
SMALL_CARDS = (
    (GpuClass(name="6 GB, 20 TFLOPS", vram_gb=6, tflops=20, link_gb_per_s=12.5), "int8"),
    (GpuClass(name="4 GB, 10 TFLOPS", vram_gb=4, tflops=10, link_gb_per_s=6.2), "int8"),
    (GpuClass(name="4 GB, 10 TFLOPS", vram_gb=4, tflops=10, link_gb_per_s=6.2), "int4"),
)
"""Not a product: what little memory allows, with the slow links of such cards."""


def table() -> str:
    """The whole section between the marks, without a newline at the end."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield BEGIN
    for model in MODELS:
        yield from ("", f"### {model}, {FRAMES} frames (predicted)", "")
        columns = [f"{mode} {width}x{height}" for mode, (height, width) in product(MODES, SIZES)]
        yield "| card | stored as | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 2) + "|"
        parts = released_parts(MODELS[model])
        sizes = {storage: model_sizes(parts, Storage.named(storage)) for storage in ("int8", "int4")}
        questions = {storage: _questions(sizes[storage]) for storage in sizes}
        for card, storage in (*((gpu, "int8") for gpu in GPUS), *SMALL_CARDS):
            cells = [_cell(card, question) for question in questions[storage]]
            yield "| " + " | ".join((card.name, storage, *cells)) + " |"
    yield from ("", END)


class _Question(NamedTuple):
    """A request to a model, and what it needs on any card."""

    request: GenerateRequest
    sizes: ModelSizes
    demands: tuple[PhaseDemand, ...]


def _questions(sizes: ModelSizes) -> list[_Question]:
    """In the order of the columns."""
    found = []
    for (two_stage, distilled), (height, width) in product(MODES.values(), SIZES):
        request = GenerateRequest(
            height=height,
            width=width,
            num_frames=FRAMES,
            use_two_stage_pipeline=two_stage,
            use_distilled_pipeline=distilled,
        )
        demands = demands_for(request, sizes.version, storage="", parts=sizes)
        found.append(_Question(request, sizes, demands))
    return found


def _cell(card: GpuClass, question: _Question) -> str:
    budget = card.budget(host_gb=HOST_GB)
    if not fits(question.demands, budget):
        return f"too large: {_hint(question, budget)}"
    found = plan(question.demands, budget)
    vram, host = found.peak_vram_bytes / GB, found.peak_host_bytes / GB
    return f"{found.seconds:.0f} s, {vram:.1f}, {host:.1f}"


def _hint(question: _Question, budget: Budget) -> str:
    request, sizes, _ = question
    try:
        plan_request(request, sizes.version, budget, storage="", parts=sizes)
    except MemoryBudgetError as error:
        return error.hint
    raise AssertionError("what does not fit is refused")


if __name__ == "__main__":
    print(table())
