"""What a `LanguageModel` does to write: `generate`, step by step or whole, and `chat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.edits.edit import Edit
from cutaway.model.edits.resolve import edits_for
from cutaway.model.familiar import GENERATE_OPTIONS, understands
from cutaway.model.forward.run import Generation
from cutaway.model.generation.generate import generate
from cutaway.model.generation.settings import DECODING, Decoding, Settings
from cutaway.model.generation.streaming import GenerationStream
from cutaway.model.latents import Capture, sites_of
from cutaway.model.reading import Inputs, Message, Reads


class Generates(Reads):
    """The part of a `LanguageModel` that continues prompts."""

    @understands(GENERATE_OPTIONS)
    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 40,
        edits: Edit | Sequence[Edit] = (),
        capture: Capture = None,
        temperature: float = 0.0,
        seed: int = 0,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] = (),
        bos: bool | None = None,
        decoding: Decoding = DECODING,
    ) -> Generation:
        """Continue prompts, greedily at temperature 0, else by sampling with `seed`, or with the best of some beams.

        Positions of an edit are resolved once on the prompt and hold in the cache; without a cache the same set is
        applied again at every step. A sample depends on the seed, the prompt and the number of the sequence, not on the
        batch around it. Of the checkpoint's own generation settings only the tokens that end a text count.

        Args:
            inputs: the prompts, as in `run`.
            max_new_tokens: the most tokens that are added to a prompt. A row also ends at an end-of-text token.
            edits: one edit or several, in force at every step as their `phase` says; row edits follow
                `num_return_sequences`.
            capture: sites (and dictionaries) whose values at every token, prompt and new, the result holds in the
                columns of its `tokens`.
            temperature: 0 takes the most probable token, else what the logits are divided by.
            seed: of the samples.
            num_return_sequences: continuations per prompt.
            stop: a text at which a row ends, and which is cut off, or several.
            bos: as in `run`.
            decoding: what is seldom changed: top_k, top_p, num_beams, use_cache, limit_bytes.

        Returns:
            Texts, new ids, log-probabilities, captured values and the receipts of the edits.

        Raises:
            NoSuchSite, TooLarge: as in `run`.
            CutawayError: what `run` raises for tokens and edits, a prompt that leaves no room in the context for the
                new tokens, settings out of range, beams with edits of single rows, a cache that would keep what new
                tokens change (attention that is not causal, rotary angles that depend on the length).

        Example:
            lm.generate("The capital of France is", max_new_tokens=5).texts
        """
        lm = cast("Attached", self)
        settings = Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            num_return_sequences=num_return_sequences,
            stop=stop,
            capture=sites_of(capture),
            **vars(decoding),
        )
        return generate(lm, self.tokens(inputs, bos=bos), edits_for(lm, edits), settings)

    @understands(GENERATE_OPTIONS)
    def generate_stream(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 40,
        edits: Edit | Sequence[Edit] = (),
        capture: Capture = None,
        temperature: float = 0.0,
        seed: int = 0,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] = (),
        bos: bool | None = None,
        decoding: Decoding = DECODING,
    ) -> GenerationStream:
        """`generate` step by step, without beams.

        Args:
            inputs: the prompts; this and all that follow are those of `generate`.
            max_new_tokens: see `generate`.
            edits: see `generate`.
            capture: see `generate`.
            temperature: see `generate`.
            seed: see `generate`.
            num_return_sequences: see `generate`.
            stop: see `generate`.
            bos: see `generate`.
            decoding: see `generate`.

        Returns:
            A stream: iterate for a `GenerationStep` each (ids and pieces of text, row by row). Its `generation` is what
            `generate` returns, of what was made until the loop was left.

        Raises:
            CutawayError: what `generate` raises, or beams.

        Example:
            for step in lm.generate_stream("The capital of France is"):
                print(step.texts[0], end="")
        """
        lm = cast("Attached", self)
        tokens, found = self.tokens(inputs, bos=bos), edits_for(lm, edits)
        settings = Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            num_return_sequences=num_return_sequences,
            stop=stop,
            capture=sites_of(capture),
            **vars(decoding),
        )
        if settings.num_beams > 1:
            raise CutawayError("Beams are known only at the end, so they cannot be streamed; use generate.")
        return GenerationStream(lambda on_step: generate(lm, tokens, found, settings, on_step))

    @understands(GENERATE_OPTIONS)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 40,
        edits: Edit | Sequence[Edit] = (),
        capture: Capture = None,
        temperature: float = 0.0,
        seed: int = 0,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] = (),
        decoding: Decoding = DECODING,
    ) -> Generation:
        """Answer a conversation or several, through the model's chat template.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            max_new_tokens: this and all that follow are those of `generate`.
            edits: see `generate`.
            capture: see `generate`.
            temperature: see `generate`.
            seed: see `generate`.
            num_return_sequences: see `generate`.
            stop: see `generate`.
            decoding: see `generate`.

        Returns:
            What `generate` returns.

        Raises:
            CutawayError: what `chat_tokens` and `generate` raise.

        Example:
            lm.chat([{"role": "user", "content": "What is the capital of France?"}]).texts[0]
        """
        return self.generate(
            self.chat_tokens(messages),
            max_new_tokens=max_new_tokens,
            edits=edits,
            capture=capture,
            temperature=temperature,
            seed=seed,
            num_return_sequences=num_return_sequences,
            stop=stop,
            decoding=decoding,
        )
