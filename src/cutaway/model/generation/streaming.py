"""Generation step by step: `generate` runs in a thread of its own, which waits while the caller looks at a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.run import Generation
from cutaway.model.generation.decoding import GenerationStep

Generate = Callable[[Callable[[GenerationStep, Callable[[], None]], object]], Generation]


class GenerationStream:
    """Iterate over it for `GenerationStep`s; `generation` is the whole afterwards.

    Nothing is computed ahead: the model works while the caller waits for the next step. Leaving the loop early and
    `close()` (or a `with` block) end the generation after the step that was last handed out, and `generation` holds
    what was made until then.
    """

    def __init__(self, generate: Generate) -> None:
        self._state = _State(generate)
        # a stream that is dropped must not leave its thread waiting
        weakref.finalize(self, self._state.cancel)

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> GenerationStep:
        step = self._state.next()
        if step is None:
            raise StopIteration
        return step

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation after the last step that was handed out."""
        self._state.finish()

    @property
    def generation(self) -> Generation:
        """What was written. Ends a generation that is still going on; raises what went wrong in it."""
        self._state.finish()
        if self._state.error is not None:
            raise self._state.error
        if self._state.result is None:
            raise CutawayError("This generation was closed before its first step; iterate over the stream.")
        return self._state.result


class _State:
    """What the caller and the thread share."""

    def __init__(self, generate: Generate) -> None:
        self.generate = generate
        self.steps: SimpleQueue[GenerationStep | None] = SimpleQueue()
        self.go_on = threading.Semaphore(0)
        self.cancelled = False
        self.thread: threading.Thread | None = None
        self.over = False
        self.result: Generation | None = None
        self.error: BaseException | None = None

    def next(self) -> GenerationStep | None:
        if self.over:
            return None
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="cutaway generation", daemon=True)
            self.thread.start()
        else:
            self.go_on.release()
        step = self.steps.get()
        if step is None:
            self.thread.join()
            self.over = True
            if self.error is not None:
                raise self.error
        return step

    def _work(self) -> None:
        try:
            self.result = self.generate(self._on_step)
        except BaseException as error:  # for the caller, who waits in another thread
            self.error = error
        finally:
            self.steps.put(None)

    def _on_step(self, step: GenerationStep, stop: Callable[[], Any]) -> None:
        if self.cancelled:
            return
        self.steps.put(step)
        self.go_on.acquire()
        if self.cancelled:
            stop()

    def cancel(self) -> None:
        self.cancelled = True
        self.go_on.release()

    def finish(self) -> None:
        if not self.over and self.thread is not None:
            self.cancel()
            self.thread.join()
        self.over = True
