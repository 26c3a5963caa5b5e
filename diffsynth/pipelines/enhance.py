"""The unit that lets the text model rewrite the prompt, and what is known of it before it runs."""

import hashlib
import logging
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from diffsynth.conditioning import enhance
from diffsynth.conditioning.enhance import PICTURE_TOKEN, Chat, chat_of, prepare_picture, rewrite
from diffsynth.pipelines.enhanced_cache import Writing
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.phases import ENHANCE, LOOK
from diffsynth.pipelines.state import GenerationState
from diffsynth.request import GenerateRequest

FIRST_FRAME = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnhancePrompt:
    """The prompt -> a detailed one, which takes its place; the negative prompt stays as it is."""

    needs: tuple[str, ...] = ("tokenizer", "text_encoder")

    def run(self, parts: Parts, state: GenerationState) -> None:
        """Fill ``enhanced_prompt``, if an earlier run did not write it."""
        if state.enhanced_prompt is None:
            state.enhanced_prompt = self._written(parts, state)
        logger.info("enhanced prompt: %s", state.enhanced_prompt)

    def _written(self, parts: Parts, state: GenerationState) -> str:
        if FIRST_FRAME in state.request.image_frames() and not _looks(parts, state.request):
            logger.warning(
                "the text model was loaded without its vision tower: the prompt is enhanced without a look "
                "at the first frame"
            )
        writing = writing_of(parts, state.request, state.inputs)
        text = self._write(parts, state, writing)
        if not text:
            logger.warning("the text model wrote nothing: the prompt stays as it is")
            return state.request.prompt
        if parts.enhanced_cache is not None:
            parts.enhanced_cache.put(writing, text)
        return text

    def _write(self, parts: Parts, state: GenerationState, writing: Writing) -> str:
        assert parts.text_encoder is not None
        assert parts.tokenizer is not None
        picture = self._look(parts, state) if writing.picture else None
        most, count = enhance.MAX_NEW_TOKENS, 0

        def on_token(number: int) -> None:
            nonlocal count
            count = number
            state.report(ENHANCE, count, most)

        state.report(ENHANCE, 0, most)
        with parts.memory.phase(ENHANCE) as phase:
            text = rewrite(
                parts.text_encoder,
                parts.tokenizer,
                writing.chat,
                seed=writing.seed,
                device=parts.device,
                dtype=parts.dtype,
                picture=picture,
                chunks=phase.head,
                max_tokens=most,
                on_token=on_token,
            )
        if count < most:  # it came to an end by itself
            state.report(ENHANCE, max(count, 1), max(count, 1))
        return text

    def _look(self, parts: Parts, state: GenerationState) -> Tensor:
        """The first frame as tokens of the text model, on the host."""
        encoder = parts.picture_encoder
        assert encoder is not None
        state.report(LOOK, 0, 1)
        pixels = prepare_picture(_first_frame(state.request, state.inputs), encoder.config.image_size)
        parts.memory.convert(("picture_encoder",), state.on_progress)
        with parts.memory.phase(LOOK):
            tokens = encoder(pixels.to(device=parts.device, dtype=parts.dtype)).cpu()
        state.report(LOOK, 1, 1)
        return tokens


def chat_for(parts: Parts, request: GenerateRequest) -> Chat | None:
    """What the text model will be given; None when the request does not ask for it."""
    if not request.enhance_prompt:
        return None
    assert parts.tokenizer is not None
    vision = parts.picture_encoder if _looks(parts, request) else None
    tokens = 0 if vision is None else vision.config.num_tokens
    return chat_of(parts.tokenizer, request.prompt, picture_tokens=tokens)


def writing_of(parts: Parts, request: GenerateRequest, inputs: Inputs) -> Writing:
    """Everything that decides the enhanced prompt of a request that asks for one and has a seed."""
    chat = chat_for(parts, request)
    assert chat is not None
    assert request.seed is not None
    picture = ""
    if chat.picture is not None:
        frame = _first_frame(request, inputs).convert("RGB")
        picture = hashlib.sha256(f"{frame.size}".encode() + frame.tobytes()).hexdigest()
    return Writing(chat=chat, seed=request.seed, picture=picture)


def known_enhancement(parts: Parts, request: GenerateRequest, inputs: Inputs) -> str | None:
    """The enhanced prompt that an earlier run wrote for the same request; None when there is none."""
    if not request.enhance_prompt or parts.enhanced_cache is None:
        return None
    return parts.enhanced_cache.get(writing_of(parts, request, inputs))


def _looks(parts: Parts, request: GenerateRequest) -> bool:
    """Whether the text model is shown the first frame: there is one, and it can see."""
    assert parts.tokenizer is not None
    can_see = parts.picture_encoder is not None and parts.tokenizer.token_id(PICTURE_TOKEN) is not None
    return can_see and FIRST_FRAME in request.image_frames()


def _first_frame(request: GenerateRequest, inputs: Inputs) -> Image.Image:
    return inputs.images[request.image_frames().index(FIRST_FRAME)]
