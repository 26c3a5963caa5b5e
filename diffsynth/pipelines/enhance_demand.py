"""What enhancing a prompt needs: the text model as a writer, in one traversal of its layers per token."""

from collections.abc import Iterable

from diffsynth.conditioning import enhance
from diffsynth.conditioning.enhance import Chat
from diffsynth.models.gemma3_writer import head_rows
from diffsynth.pipelines.costs.text import enhance_cost, picture_cost
from diffsynth.pipelines.phases import ENHANCE, LOOK
from diffsynth.pipelines.sizes import ModelSizes
from diffsynth.vram.blocks import BLOCK_ALIGNMENT
from diffsynth.vram.planner import Block, Choice, PhaseDemand


def enhance_demands(chat: Chat, sizes: ModelSizes, workspace: float) -> Iterable[PhaseDemand]:
    """The phases of enhancing a prompt; none without a text model.

    Args:
        chat: what the text model is given.
        sizes: of the model.
        workspace: share of the activations that matrix products and the allocator take besides.
    """
    if not sizes.has("text_encoder"):
        return
    if chat.picture is not None:
        yield _look(sizes, workspace)
    gemma, part = sizes.gemma, sizes.parts["text_encoder"]
    tokens, new_tokens, picture = len(chat.ids), enhance.MAX_NEW_TOKENS, chat.picture is not None
    cost = enhance_cost(gemma, tokens, new_tokens, picture, sizes.itemsize)
    # A chunk of the head lies beside every layer: what is resident of the one is resident of the other.
    chunks = (_aligned(rows * gemma.hidden_size * sizes.itemsize) for rows in head_rows(gemma))
    yield PhaseDemand(
        name=ENHANCE,
        part="text_encoder",
        choices=(
            Choice(
                activation_bytes=cost.nbytes,
                workspace_bytes=int(workspace * cost.nbytes),
                flops=cost.flops,
            ),
        ),
        blocks=tuple(Block(block.name, block.nbytes, next(chunks, 0)) for block in part.blocks),
        rest_bytes=part.rest_bytes,
        scratch_bytes=part.scratch_bytes,
        traversals=enhance.MAX_NEW_TOKENS,
        activation_cause="enhance_prompt",
        weight_cause="the storage format of the text encoder",
    )


def _look(sizes: ModelSizes, workspace: float) -> PhaseDemand:
    part, cost = sizes.parts["picture_encoder"], picture_cost(sizes.vision, sizes.itemsize)
    return PhaseDemand(
        name=LOOK,
        part="picture_encoder",
        choices=(
            Choice(
                activation_bytes=cost.nbytes, workspace_bytes=int(workspace * cost.nbytes), flops=cost.flops
            ),
        ),
        rest_bytes=part.rest_bytes,
        scratch_bytes=part.scratch_bytes,
        activation_cause="enhance_prompt with a picture",
        weight_cause="the vision tower of the text model",
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
