"""The unit that lets the text model rewrite the prompt, and what is known of it before it runs."""

import logging
from dataclasses import dataclass

from diffsynth.conditioning import enhance
from diffsynth.conditioning.enhance import Chat, chat_of, rewrite
from diffsynth.pipelines.enhanced_cache import Writing
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.phases import ENHANCE
from diffsynth.pipelines.state import GenerationState
from diffsynth.request import GenerateRequest

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
        writing = writing_of(parts, state.request)
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
                chunks=phase.head,
                max_tokens=most,
                on_token=on_token,
            )
        if count < most:  # it came to an end by itself
            state.report(ENHANCE, max(count, 1), max(count, 1))
        return text


def chat_for(parts: Parts, request: GenerateRequest) -> Chat | None:
    """What the text model will be given; None when the request does not ask for it."""
    if not request.enhance_prompt:
        return None
    assert parts.tokenizer is not None
    return chat_of(parts.tokenizer, request.prompt)


def writing_of(parts: Parts, request: GenerateRequest) -> Writing:
    """Everything that decides the enhanced prompt of a request that asks for one and has a seed."""
    chat = chat_for(parts, request)
    assert chat is not None
    assert request.seed is not None
    return Writing(chat=chat, seed=request.seed)


def known_enhancement(parts: Parts, request: GenerateRequest) -> str | None:
    """The enhanced prompt that an earlier run wrote for the same request; None when there is none."""
    if not request.enhance_prompt or parts.enhanced_cache is None:
        return None
    return parts.enhanced_cache.get(writing_of(parts, request))
